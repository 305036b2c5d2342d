"""One schema for Python, flags and YAML: the library's own dataclasses, read from source so that help needs no torch.

`skeleton("lynceus.train.fit:FitConfig")` is a plain dataclass with the same fields, defaults and help texts, made from
the source text alone; `real(value)` turns an instance of it into the library's class. Where the text is not enough (a
default computed at run time), the class itself is imported.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

import lynceus
from lynceus.core.config import dump_yaml, from_dict, load_yaml, to_dict
from lynceus.core.errors import AdviceError, unknown

_NAMES: dict[str, Any] = {
    "Any": Any,
    "Callable": Callable,
    "ClassVar": ClassVar,
    "Iterable": Iterable,
    "Literal": Literal,
    "Mapping": collections.abc.Mapping,
    "Path": Path,
    "Sequence": Sequence,
    "Tensor": type("Tensor", (), {}),
    "dataclass": dataclasses.dataclass,
    "dataclasses": dataclasses,
    "field": dataclasses.field,
    "frozenset": frozenset,
}


def load(target: str) -> Any:
    """The object that "package.module:Name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def source_of(module: str) -> Path:
    """The file of a module of the library, found without importing anything."""
    base = Path(lynceus.__file__).parent.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def _tree(module: str) -> tuple[ast.Module, list[str]]:
    text = source_of(module).read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines()


@cache
def skeleton(target: str) -> type:
    """A dataclass with the fields of `target`, made from its source; the class itself where source is not enough."""
    try:
        return _from_source(target)
    except (NameError, SyntaxError, ValueError, AttributeError, TypeError, LookupError):
        return typing.cast(type, load(target))


def _from_source(target: str) -> type:
    module, _, name = target.partition(":")
    tree, lines = _tree(module)
    imported: dict[str, str] = {}
    names = dict(_NAMES)
    node: ast.ClassDef | None = None
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("lynceus."):
            imported |= {a.asname or a.name: f"{item.module}:{a.name}" for a in item.names}
        elif isinstance(item, ast.ClassDef) and item.name == name:
            node = item
        elif isinstance(item, ast.ClassDef):
            imported[item.name] = f"{module}:{item.name}"
        elif isinstance(item, ast.Assign) and len(item.targets) == 1 and isinstance(item.targets[0], ast.Name):
            try:
                names[item.targets[0].id] = eval(compile(ast.Expression(item.value), module, "eval"), dict(names))
            except Exception:  # a constant that needs more than its text; only an error if a field uses it
                continue
    if node is None:
        raise LookupError(target)
    for other, path in imported.items():
        if _mentions(node, other):
            names[other] = _imported(path)
    helps, doc = _helps(node, lines)
    bases = tuple(eval(compile(ast.Expression(b), module, "eval"), names) for b in node.bases if not _is_protocol(b))
    fields: list[tuple[str, Any, Any]] = []
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if item.value is not None and "repr=False" in ast.unparse(item.value):
            continue  # not an option: handed over in Python only
        hint = _without_functions(eval(compile(ast.Expression(item.annotation), module, "eval"), names))
        if typing.get_origin(hint) is ClassVar or hint is ClassVar:
            continue
        text = helps.get(item.target.id)
        if text:
            hint = typing.Annotated[hint, tyro.conf.arg(help=text)]
        if item.value is None:
            fields.append((item.target.id, hint, dataclasses.field()))
        else:
            value = eval(compile(ast.Expression(item.value), module, "eval"), names)
            if not isinstance(value, dataclasses.Field):
                immutable = value.__class__.__hash__ is not None
                value = (
                    dataclasses.field(default=value) if immutable else dataclasses.field(default_factory=_always(value))
                )
            fields.append((item.target.id, hint, value))
    made = dataclasses.make_dataclass(name, fields, bases=bases, frozen=True, kw_only=True)
    made.__doc__ = doc
    made.__lynceus__ = target  # type: ignore[attr-defined]
    return made


def _imported(target: str) -> Any:
    """A dataclass, or a constant such as a Literal, of another module of the library, from its source."""
    module, _, name = target.partition(":")
    for item in _tree(module)[0].body:
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("lynceus."):
            for alias in item.names:
                if (alias.asname or alias.name) == name:
                    return _imported(f"{item.module}:{alias.name}")
        elif isinstance(item, (ast.Assign, ast.AnnAssign)) and item.value is not None:
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return eval(compile(ast.Expression(item.value), module, "eval"), dict(_NAMES))
    return _from_source(target)


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


def _without_functions(hint: Any) -> Any:
    """A union without its functions, which no flag can name."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kept = [a for a in typing.get_args(hint) if typing.get_origin(a) is not collections.abc.Callable]
        return typing.Union[tuple(kept)]  # noqa: UP007
    return hint


def _is_protocol(base: ast.expr) -> bool:
    return isinstance(base, ast.Name) and base.id in {"Check", "Rewrite", "Task", "Protocol"}


def _mentions(node: ast.ClassDef, name: str) -> bool:
    wanted: list[ast.AST] = [*node.bases]
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            wanted += [item.annotation, *([item.value] if item.value else [])]
    return any(isinstance(n, ast.Name) and n.id == name for w in wanted for n in ast.walk(w))


def _helps(node: ast.ClassDef, lines: list[str]) -> tuple[dict[str, str], str]:
    """Help per field (the comment behind it, or "name: text" in the docstring), and the docstring without those."""
    names = [i.target.id for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)]
    out: dict[str, str] = {}
    doc = ast.get_docstring(node) or node.name
    rest = doc
    if names:
        any_name = "|".join(map(re.escape, names))
        head = rf"(?:^|(?<=[.;\n]))\s*((?:{any_name})(?:\s*[,/]\s*(?:{any_name}))*)\s*:\s+"
        marks = list(re.finditer(head, doc))
        for mark, after in zip(marks, [*marks[1:], None]):
            text = doc[mark.end() : after.start() if after else len(doc)].split("\n\n")[0]
            rest = rest.replace(doc[mark.start() : mark.end()] + text, "\n")
            for name in re.split(r"\s*[,/]\s*", mark.group(1)):
                out[name] = " ".join(text.split())
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            tail = lines[(item.end_lineno or item.lineno) - 1][item.end_col_offset or 0 :]
            if "#" in tail:
                out[item.target.id] = tail.split("#", 1)[1].strip()
    return out, re.sub(r"\s*\n\s*", " ", re.sub(r"\n{2,}", "\n\n", rest)).strip()


def real(value: Any) -> Any:
    """The library's own instance for an instance of a skeleton (nested ones included)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {f.name: real(getattr(value, f.name)) for f in dataclasses.fields(value)}
        target = type(value).__dict__.get("__lynceus__")
        return (load(target) if target else type(value))(**values)
    if isinstance(value, tuple):
        return tuple(real(v) for v in value)
    return value


def parse(cls: type, argv: Sequence[str], *, prog: str, description: str = "") -> Any:
    """Flags over the YAML of --config over the defaults. --print-config writes the result as YAML and ends.

    In YAML, nested names may be written nested or flat; an unknown one is an error that names the nearest."""
    argv = list(argv)
    path = take_option(argv, "--config")
    show = "--print-config" in argv
    if show:
        argv.remove("--print-config")
    options = tyro.cli(
        cls,
        prog=prog,
        description=(description or cls.__doc__ or "")
        + "\n\nAlso: --config FILE.yaml (defaults for all of these), --print-config.",
        args=argv,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        default=tyro.MISSING_NONPROP if path is None else _with_yaml(cls, load_yaml(path)),
    )
    if show:
        print(dump_yaml(options), end="")
        raise SystemExit(0)
    return options


def take_option(argv: list[str], flag: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == flag:
            if i + 1 >= len(argv):
                raise AdviceError(f"{flag} needs a value behind it.")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if arg.startswith(flag + "="):
            del argv[i]
            return arg.split("=", 1)[1]
    return None


def _with_yaml(cls: type, values: dict[str, Any]) -> Any:
    """An instance from YAML values; required fields that it does not give are left for the command line."""
    hints = typing.get_type_hints(cls)
    own = dataclasses.fields(cls)
    homes = {
        f.name: {g.name for g in dataclasses.fields(hints[f.name])}
        for f in own
        if dataclasses.is_dataclass(hints[f.name])
    }
    values = dict(values)
    for name in [n for n in values if n not in {f.name for f in own}]:
        inside = [home for home, names in homes.items() if name in names]
        if len(inside) == 1:
            values[inside[0]] = {**values.get(inside[0], {}), name: values.pop(name)}
    given = {n: tyro.MISSING for n in _required(cls) if n not in values}
    return from_dict(cls, values, where="configuration", given=given)


def with_options(base: type, *, defaults: dict[str, Any] | None = None, **nested: str) -> type:
    """`base` plus one field per nested configuration, whose flags carry no prefix.

    nested: name="module:Class", as in with_options(Options, fit="lynceus.train.fit:FitConfig").
    defaults: instances of the real classes whose values take the place of the classes' own."""
    tree, lines = _tree(base.__module__)
    node = next(i for i in tree.body if isinstance(i, ast.ClassDef) and i.name == base.__name__)
    helps, doc = _helps(node, lines)
    hints = typing.get_type_hints(base, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    unprefixed: Any = tyro.conf.OmitArgPrefixes
    for f in dataclasses.fields(base):
        hint = typing.Annotated[hints[f.name], tyro.conf.arg(help=helps[f.name])] if f.name in helps else hints[f.name]
        fields.append((f.name, hint, _same(f)))
    for name, target in nested.items():
        made: Any = _without(skeleton(target), {f.name for f in dataclasses.fields(base)})
        start = (defaults or {}).get(name)
        known = {f.name for f in dataclasses.fields(made)}
        blank = dataclasses.field()
        if start is not None:
            blank = dataclasses.field(default=from_dict(made, {k: v for k, v in to_dict(start).items() if k in known}))
        elif not _required(made):
            blank = dataclasses.field(default=made())
        fields.append((name, unprefixed[made], blank))
    out = dataclasses.make_dataclass(base.__name__, fields, frozen=True, kw_only=True)
    out.__doc__ = doc
    return out


def _required(cls: type) -> list[str]:
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def _without(made: type, names: set[str]) -> type:
    """A skeleton without the fields that the command itself has under the same name (see `merged`)."""
    if not names & {f.name for f in dataclasses.fields(made)}:
        return made
    hints = typing.get_type_hints(made, include_extras=True)
    fields = [(f.name, hints[f.name], _same(f)) for f in dataclasses.fields(made) if f.name not in names]
    out = dataclasses.make_dataclass(made.__name__, fields, frozen=True, kw_only=True)
    out.__doc__ = made.__doc__
    out.__lynceus__ = made.__dict__.get("__lynceus__") or f"{made.__module__}:{made.__qualname__}"  # type: ignore[attr-defined]
    return out


def merged(options: Any, name: str) -> Any:
    """The real nested configuration, with the command's own values for fields that both have."""
    made = real(getattr(options, name))
    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    shared = {f.name: own[f.name] for f in dataclasses.fields(made) if f.name in own and own[f.name] is not None}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in shared.items()}
    return dataclasses.replace(made, **plain) if plain else made


def _same(f: dataclasses.Field[Any]) -> Any:
    """A fresh field with the default of `f`."""
    if f.default is not dataclasses.MISSING:
        return dataclasses.field(default=f.default)
    if f.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=f.default_factory)
    return dataclasses.field()


def one_of(
    kind: str, table: dict[str, tuple[str, str]], argv: Sequence[str], *, usage: str
) -> tuple[str | None, list[str]]:
    """Takes the leading NAME of `lynceus check NAME ...` off argv; (None, []) after printing the list for --help."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, table))
        rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in table.items())
        print(f"usage: {usage}\n\n{rows}\n\nOptions of one: {usage.split(' NAME')[0]} NAME --help")
        return None, []
    if argv[0] not in table:
        raise unknown(kind, argv[0], table, how=f"{usage.split(' NAME')[0]} --help lists all.")
    return argv[0], list(argv[1:])


def load_function(target: str, flag: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules of the working folder count."""
    import sys

    module, colon, name = target.partition(":")
    if not colon:
        raise AdviceError(f"{flag} takes module:function, for example losses:focal; {target!r} has no colon.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError:
        raise AdviceError(f"{flag}: there is no module {module!r} here ({Path.cwd()}) or installed.") from None
    except AttributeError:
        raise unknown(
            f"function in {module}", name, [n for n in dir(import_module(module)) if not n.startswith("_")]
        ) from None
    return found
