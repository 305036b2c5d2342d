"""Configurations are frozen keyword-only dataclasses; this file changes, writes, reads and compares them, strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lynceus.core.errors import AdviceError, MissingError, unknown

T = TypeVar("T")


def changed(config: T, changes: dict[str, Any], *, kind: str | None = None) -> T:
    """`dataclasses.replace` whose unknown field is an error that names the nearest one."""
    names = [f.name for f in dataclasses.fields(config) if f.init]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise unknown(f"{kind or type(config).__name__} option", name, names)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def to_dict(config: Any) -> Any:
    """A configuration as plain values: dicts, lists, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple, set, frozenset)):
        return [to_dict(v) for v in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "", given: dict[str, Any] | None = None) -> T:
    """The reverse of `to_dict`: builds `cls`, nested dataclasses and tuples included; unknown names are errors.

    given: values that are taken as they are, unchecked."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise unknown(f"option in {where}" if where else f"{cls.__name__} option", name, fields)
    read = {k: _cast(hints.get(k, Any), v, f"{where or cls.__name__}.{k}") for k, v in values.items()}
    return cls(**read, **(given or {}))


def _cast(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        tries = [a for a in args if a is not type(None)]
        for arg in tries:
            if isinstance(arg, type) and type(value) is arg:
                return value
        for arg in tries:
            try:
                return _cast(arg, value, where)
            except (TypeError, ValueError):
                continue
        raise AdviceError(f"{where} cannot be {value!r}; it takes {hint}.")
    if origin is typing.Literal:
        if value not in args:
            raise unknown(where, str(value), [str(a) for a in args])
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where=where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return tuple(_cast(inner or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is list and isinstance(value, (list, tuple)):
        return [_cast(args[0], v, where) for v in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and hint in (int, float, str, bool) and type(value) is not hint:
        raise AdviceError(f"{where} takes a {hint.__name__}, not {value!r} ({type(value).__name__}).")
    return value


def dump_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. A missing file or a file that is no mapping is an advising error."""
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There is no configuration file {str(path)!r} (looked at {path.resolve()}).")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise AdviceError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise AdviceError(f"{path} must hold 'name: value' lines, not a {type(values).__name__}.")
    return values


def digest(value: Any, length: int = 12) -> str:
    """A short, stable hash of a configuration or any plain value: the key of caches and cells."""
    text = json.dumps(to_dict(value), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:length]


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Lines "name: left -> right" for every value in which two configurations differ."""
    a, b = to_dict(a), to_dict(b)
    if isinstance(a, dict) and isinstance(b, dict):
        lines = []
        for key in dict.fromkeys([*a, *b]):
            lines += differences(a.get(key), b.get(key), f"{prefix}{key}.")
        return lines
    return [] if a == b else [f"{prefix.rstrip('.')}: {a} -> {b}"]
