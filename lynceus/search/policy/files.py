"""Policies as files: weights in safetensors, what kind of policy in the header."""

from __future__ import annotations

from pathlib import Path

from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic
from lynceus.search.policy.sequences import Policy, RemovalPolicy, ShrinkPolicy


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Writes a policy to a .safetensors file."""
    from safetensors.torch import save

    told = {
        "policy": type(policy).__name__,
        "scaled": str(int(policy.scaled)),
        "skips": str(int(policy.skips)),
        "critic": str(int(policy.critic is not None)),
    }
    return write_atomic(Path(path), save(policy.state_dict(), told))


def load_policy(path: str | Path) -> Policy:
    """A policy that `save_policy` wrote."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    kinds: dict[str, type[RemovalPolicy] | type[ShrinkPolicy]] = {
        "RemovalPolicy": RemovalPolicy,
        "ShrinkPolicy": ShrinkPolicy,
    }
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        made: Policy = kinds[told["policy"]](**{k: told[k] == "1" for k in ("scaled", "skips", "critic")})
        made.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, OSError, RuntimeError) as error:
        raise AdviceError(
            f"{path} is no policy of a search ({error}); runs keep theirs as remove.safetensors."
        ) from None
    return made
