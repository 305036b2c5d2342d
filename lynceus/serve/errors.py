"""What a request may be refused for: each kind has its HTTP status, and a text for the client."""

from __future__ import annotations


class Refused(Exception):
    """A request that gets no answer. `status` is HTTP's, `kind` is counted in the metrics."""

    status = 400
    kind = "bad_request"

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text


class UnknownModel(Refused):
    status, kind = 404, "unknown_model"


class TooLarge(Refused):
    status, kind = 413, "too_large"


class NotAPicture(Refused):
    status, kind = 415, "not_a_picture"


class Corrupt(Refused):
    status, kind = 422, "corrupt"


class ModelFailed(Refused):
    """The model raised, or gave numbers that are not finite, for this request."""

    status, kind = 500, "model_failed"


class WorkerLost(Refused):
    """The request killed its worker as often as it is tried."""

    status, kind = 500, "worker_lost"


class Overloaded(Refused):
    """Too many requests are on the way; `retry_after` is in seconds."""

    status, kind = 503, "overloaded"

    def __init__(self, text: str, *, retry_after: float = 1.0):
        super().__init__(text)
        self.retry_after = retry_after


class Draining(Overloaded):
    kind = "draining"


class Expired(Refused):
    status, kind = 504, "expired"


class Cancelled(Refused):
    """The client has gone; nobody reads this."""

    status, kind = 499, "cancelled"


KINDS: dict[str, type[Refused]] = {
    c.kind: c
    for c in (
        Refused,
        UnknownModel,
        TooLarge,
        NotAPicture,
        Corrupt,
        ModelFailed,
        WorkerLost,
        Overloaded,
        Draining,
        Expired,
        Cancelled,
    )
}


def refused(kind: str, text: str) -> Refused:
    """The error of that kind, as it comes back from another process."""
    return KINDS.get(kind, Refused)(text)
