"""What crosses a broker: a job to a worker, and its answer on the way back. JSON and bytes, never pickles."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from torch import Tensor

from lynceus.serve.decode import npy
from lynceus.serve.engine import Answer, Job
from lynceus.serve.errors import Refused, refused
from lynceus.serve.spans import Trace

_LENGTH = struct.Struct("<I")


class MalformedError(ValueError):
    """Bytes that are no message of ours."""


def pack(meta: Any, body: bytes = b"") -> bytes:
    text = json.dumps(meta, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, body))


def unpack(message: bytes) -> tuple[Any, bytes]:
    """Raises MalformedError."""
    try:
        (length,) = _LENGTH.unpack_from(message)
        if length > len(message) - _LENGTH.size:
            raise MalformedError("a message that is cut short")
        end = _LENGTH.size + length
        return json.loads(message[_LENGTH.size : end]), message[end:]
    except (struct.error, ValueError, RecursionError) as error:
        raise MalformedError(str(error)) from None


def pack_job(job: Job, sent: int) -> bytes:
    """sent: when it is handed to the broker, in monotonic nanoseconds."""
    trace = job.trace
    spans = [*trace.spans, ("publish", trace.ended, sent)]
    meta = [job.key, trace.id, trace.begun, spans, job.deadline, job.model.name, job.model.version]
    return pack(meta, npy(job.body) if isinstance(job.body, Tensor) else job.body)


def unpack_job(message: bytes, taken: int) -> tuple[str, Trace, int, str, str, bytes]:
    """(key, trace up to now, deadline, model, version, body) of a job that came from the broker at `taken`."""
    meta, body = unpack(message)
    try:
        key, identity, begun, spans, deadline, model, version = meta
        trace = Trace.read([identity, begun, spans, []])
        trace.mark("broker_wait", taken)
        return str(key), trace, int(deadline), str(model), str(version), body
    except (TypeError, ValueError) as error:
        raise MalformedError(str(error)) from None


def pack_answer(key: str, outcome: Answer | Refused, trace: Trace, sent: int) -> bytes:
    """Scores travel as float32, which they are."""
    if isinstance(outcome, Refused):
        return pack([key, trace.plain(), sent, None, outcome.kind, outcome.text])
    result = dict(outcome.result)
    scores = result.get("scores")
    body = b""
    if scores is not None and all(isinstance(s, float) for s in scores[:1]):
        body = np.asarray(result.pop("scores"), dtype="<f4").tobytes()
    return pack([key, trace.plain(), sent, result, "", ""], body)


def unpack_answer(message: bytes, taken: int) -> tuple[str, Trace, dict[str, Any] | Refused]:
    """(key, trace up to now, result or refusal) of an answer that came from the broker at `taken`."""
    meta, body = unpack(message)
    try:
        key, plain, sent, result, kind, text = meta
        trace = Trace.read(plain)
        trace.mark("publish", int(sent))
        trace.mark("broker_wait", taken)
        if result is None:
            return str(key), trace, refused(str(kind), str(text))
        if body:
            result["scores"] = np.frombuffer(body, "<f4").tolist()
        return str(key), trace, result
    except (TypeError, ValueError) as error:
        raise MalformedError(str(error)) from None
