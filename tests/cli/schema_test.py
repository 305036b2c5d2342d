"""A skeleton made from source is the class itself: same fields and defaults, for every class the command line shows."""

import dataclasses

import pytest

from lynceus.cli._schema import load, real, skeleton
from lynceus.cli.check import CHECKS
from lynceus.cli.rewrite import REWRITES
from lynceus.core.config import to_dict

TARGETS = sorted({t for t, _ in [*CHECKS.values(), *REWRITES.values()]})


def _default(field):
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@pytest.mark.parametrize("target", TARGETS)
def test_skeleton_equals_class(target):
    made, true = skeleton(target), load(target)
    assert getattr(made, "__lynceus__", None) == target, "the source was not enough: help would import torch"
    ours = {f.name: to_dict(_default(f)) for f in dataclasses.fields(made)}
    theirs = {f.name: to_dict(_default(f)) for f in dataclasses.fields(true) if f.init and f.repr}
    assert ours == theirs
    if all(
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        for f in dataclasses.fields(true)
    ):
        assert real(made()) == true()
