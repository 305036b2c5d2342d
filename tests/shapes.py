"""Holds lynceus to the shapes that its signatures name, at every call that a test leads to.

A call that breaks an annotation must end in an advising error of the function itself; otherwise the test fails.
"""

import functools
import inspect
import re
import sys

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

SHAPE = re.compile(r"\b(Float|Float32|Float64|Int|Int32|Int64|UInt8|Bool|Num|Shaped|Integer|Inexact|Complex|Real)\[")

# an int is a float, as type checkers see it
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


def _names_shapes(thing):
    return any(SHAPE.search(str(a)) for a in inspect.get_annotations(thing).values())


def jaxtyped(thing=None, *, typechecker):
    """`jaxtyping.jaxtyped` for what names a shape; rests while torch traces: comparing symbolic sizes fixes them."""
    if thing is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if isinstance(thing, (classmethod, staticmethod)):
        return type(thing)(jaxtyped(thing.__func__, typechecker=typechecker))
    if isinstance(thing, property) or not _names_shapes(thing):
        return thing
    checked = _jaxtyped(thing, typechecker=typechecker)
    if not inspect.isfunction(thing):
        return checked
    own = f"checking the parameters of {thing.__module__}.{thing.__qualname__}."

    @functools.wraps(thing)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return thing(*args, **kwargs)
        try:
            return checked(*args, **kwargs)
        except jaxtyping.TypeCheckError as wrong:
            if own in str(wrong).split("\n")[0]:
                _must_advise(thing, args, kwargs)
            raise

    return call


def _must_advise(function, args, kwargs):
    from lynceus.core.errors import AdviceError

    try:
        function(*args, **kwargs)
    except AdviceError:
        raise
    except Exception:
        return


def install():
    """Before the first import of lynceus."""
    assert not any(name.split(".")[0] == "lynceus" for name in sys.modules)
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("lynceus", f"{__name__}.check")
