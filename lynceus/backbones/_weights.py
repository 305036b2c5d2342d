"""Loading checkpoints into our backbones: ours, the authors', timm's, torchvision's; strict, with an account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

from torch import Tensor, nn

from lynceus.backbones._checkpoint import AVERAGED, Checkpoint, read_checkpoint
from lynceus.backbones._table import FAMILIES
from lynceus.core.account import Account
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rules import Matching, Rule, best_table


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    head: Literal["strict", "drop"] = "strict",
    entry: str | None = None,
    rules: Sequence[Rule] | None = None,
    resize: bool = True,
    ignore: Sequence[str] = (),
    account: Account | None = None,
) -> Account:
    """Loads a checkpoint of ours, the authors', timm or torchvision into `model`; returns what went where.

    The name table is the one that fits completely, or `rules` when they are given. Strict: when a parameter gets no
    value, or an entry no place, nothing is loaded and the AdviceError holds the account.
    head: "drop" leaves the classifier as initialised and ignores the file's. entry: which weights of a file that holds
    several ("model_ema"). resize: position tables of another size are resized. ignore: patterns of the file's names
    that may find no place. account: an Account to fill in, for callers that need it even when loading fails.
    The text of the account also stays on the model, as `weights_account`.
    """
    if head not in ("strict", "drop"):
        raise unknown("head", str(head), ["strict", "drop"])
    checkpoint = read_checkpoint(path, entry=entry)
    found = match_weights(checkpoint.state, model, head=head, rules=rules, resize=resize, ignore=ignore)
    found.account.notes += _remarks(checkpoint)
    if account is not None:
        for name in Account.__dataclass_fields__:
            setattr(account, name, getattr(found.account, name))
    if not found.account.complete:
        told = f"{found.account.text()}{_advice(found, model, path)}"
        raise AdviceError(f"{path} does not fit {_name(model)}; nothing was loaded.\n{told}")
    model.load_state_dict(found.values, strict=False)  # complete: what is left out is in the account
    vars(model)["weights_account"] = found.account.text()
    return found.account


def match_weights(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    head: Literal["strict", "drop"] = "strict",
    rules: Sequence[Rule] | None = None,
    resize: bool = True,
    ignore: Sequence[str] = (),
) -> Matching:
    """The best match of a state with a model under our own names, its family's tables, or the given rules."""
    name = getattr(model, "head_name", "head")
    without = isinstance(getattr(model, "num_classes", None), int) and getattr(model, "num_classes", 1) == 0
    tables: dict[str, Sequence[Rule]] = (
        {"rules": rules, "ours": ()} if rules is not None else {"ours": (), **sources(model)}
    )
    if rules is not None:
        del tables["ours"]
    drop = (name, *getattr(model, "more_heads", ())) if head == "drop" or without else None
    return best_table(state, model, tables, resize=resize, ignore=ignore, head=drop)


def sources(model: nn.Module) -> Mapping[str, Sequence[Rule]]:
    """The name tables of the model's family; empty for a model of no family of ours."""
    modules = {module: family for family, module in FAMILIES.items()}
    for cls in type(model).__mro__:
        family = modules.get(cls.__module__)
        if family is not None and find_spec(f"lynceus.backbones.keys.{family}") is not None:
            return cast(Mapping[str, Sequence[Rule]], import_module(f"lynceus.backbones.keys.{family}").SOURCES)
    return {}


def _remarks(checkpoint: Checkpoint) -> list[str]:
    notes = []
    if checkpoint.entry:
        notes.append(f"weights found under: {' > '.join(checkpoint.entry)}")
    averaged = [k for k in checkpoint.others if k in (*AVERAGED, "teacher", "student")]
    if averaged:
        notes.append(f"the file also holds {', '.join(averaged)}: load_weights(model, path, entry={averaged[0]!r})")
    rest = [f"{k} ({v})" for k, v in checkpoint.others.items() if k not in averaged]
    if rest:
        notes.append("not loaded: " + "; ".join(rest[:6]) + (f"; {len(rest) - 6} more" if len(rest) > 6 else ""))
    return notes


def _advice(found: Matching, model: nn.Module, path: str | Path) -> str:
    head = getattr(model, "head_name", "head")
    account = found.account
    wrong = [*account.missing, *(w.ours for w in account.wrong_shape)]
    if wrong and all(n.startswith(head + ".") for n in wrong) and not account.unexpected:
        classes = next((w.have[0] for w in account.wrong_shape), None)
        build = f"create_model(..., num_classes={classes}, weights=...), or " if classes else ""
        fresh = f"load_weights(model, {str(path)!r}, head='drop') to leave it fresh"
        return f"\nOnly the classifier differs. Use {build}{fresh}."
    if account.unexpected and not wrong:
        accept = f"load_weights(model, {str(path)!r}, ignore=[{account.unexpected[0]!r}])"
        return f"\nThe model is filled; to accept the rest say {accept}."
    return ""


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name", type(model).__name__))
