"""Bounds of auto_LiRPA in our search, for those who have it: `verify(..., engine="auto_lirpa")`.

Verified-Intelligence/auto_LiRPA (BSD-3-Clause); arXiv 2002.12920. Only its public calls are used; it is installed from
its source, since the wheel on the package index asks for an old torch.
"""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.subject import Subject
from lynceus.trust.bounds import Box, Method
from lynceus.trust.verify_query import Query
from lynceus.trust.verify_search import Bounder

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN"}


def need() -> None:
    """Raises MissingError when auto_LiRPA is not installed."""
    if find_spec("auto_LiRPA") is None:
        raise MissingError(
            'engine="auto_lirpa" needs auto_LiRPA, which is not installed: pip install '
            '"git+https://github.com/Verified-Intelligence/auto_LiRPA", or take engine="own".'
        )


def lirpa_bounder(query: Query, method: Method) -> Bounder:
    """Margins by auto_LiRPA on the float64 copy of the model; it gives no slopes here, so the widest side is split.

    Raises MissingError when it is not installed, AdviceError when it cannot read the model."""
    need()
    library: Any = import_module("auto_LiRPA")
    if isinstance(query.model, Subject):
        module: nn.Module = _whole(query.model)
    else:
        module = query.model
    module = copy.deepcopy(module).double().eval()
    try:
        bounded = library.BoundedModule(module, query.x.double()[None])
    except Exception as error:
        raise AdviceError(f"auto_LiRPA cannot read this model ({error}); take engine='own'.") from None

    def bound(box: Box, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        region = library.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper)
        x = library.BoundedTensor(box.centre, region)
        c = rows.expand(len(box), -1, -1)
        least, _ = bounded.compute_bounds(x=(x,), C=c, method=NAMES[method], bound_upper=False)
        return least.detach(), None, torch.full((len(box),), 10**9)

    return bound


def _whole(subject: Subject) -> nn.Module:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = subject.model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(subject.prepare(x))
            return out

    return Whole()
