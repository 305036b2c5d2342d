"""How many machines: a queueing estimate of a server from two measured numbers, to be checked against a measured run.

The server is taken as c equal places with one queue: M/G/c, waiting by Erlang's C formula with the correction of Allen
and Cunneen (Allen, "Probability, Statistics, and Queueing Theory", 1978). How many places it has follows from the two
numbers by Little's law; cores are not places where one thread runs the model. What it leaves out: stages with queues of
their own, and that batches make the work per picture less as the load grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lynceus.core.errors import AdviceError


def erlang_c(places: int, load: float) -> float:
    """Probability that a request has to wait: `load` requests on average in `places` places, load < places."""
    if places < 1 or not 0 <= load < places:
        raise AdviceError(f"Erlang's C needs at least one place and 0 <= load < places, not {places} and {load}.")
    blocked = 1.0  # Erlang's B by its recursion, which does not overflow
    for n in range(1, places + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1 - load / places * (1 - blocked))


def at_once(top: float, alone: float, most: int) -> int:
    """Requests that a server works on at once when it answers `top` per second and one alone takes `alone` seconds:
    the product (Little's law), rounded, from 1 to `most`, its cores."""
    return max(1, min(most, round(top * alone)))


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A server as the estimate sees it.

    top: most answers per second, measured under saturation. alone: seconds of one request with nobody else there.
    places: requests that are worked on at once, see `at_once`. spread: variation of the work per request (standard
    deviation over mean): 1 for exponential, 0 for equal requests.
    """

    top: float
    alone: float
    places: int
    spread: float = 1.0

    def waiting(self, rate: float) -> float:
        """Mean seconds in the queue at `rate` requests per second; inf at or above `top`."""
        if rate >= self.top:
            return math.inf
        load = self.places * rate / self.top
        return erlang_c(self.places, load) / (self.top - rate) * (1 + self.spread**2) / 2

    def latency(self, rate: float) -> float:
        """Mean seconds from when a request is due to its answer."""
        return self.alone + self.waiting(rate)

    def percentile(self, rate: float, point: float) -> float:
        """Seconds that `point` percent of the requests stay below; the waiting of those that wait is exponential."""
        if rate >= self.top:
            return math.inf
        if rate <= 0:
            return self.alone
        waits = erlang_c(self.places, self.places * rate / self.top)
        beyond = 1 - point / 100
        if beyond >= waits:
            return self.alone
        return self.alone + self.waiting(rate) / waits * math.log(waits / beyond)

    def rate_for(self, seconds: float, point: float = 99.0) -> float:
        """Requests per second that one machine takes while `point` percent of them stay below `seconds`; 0: none."""
        low, high = 0.0, self.top
        if self.percentile(0.0, point) > seconds:
            return 0.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.percentile(middle, point) <= seconds else (low, middle)
        return low

    def machines(self, rate: float, seconds: float, point: float = 99.0) -> int:
        """Machines of this kind for `rate` requests per second in all. Raises AdviceError when none would do."""
        each = self.rate_for(seconds, point)
        if each <= 0:
            raise AdviceError(
                f"One request alone takes {1e3 * self.alone:.0f} ms, so no number of machines answers within "
                f"{1e3 * seconds:.0f} ms: take a smaller model or picture, or a later limit."
            )
        return max(1, math.ceil(rate / each))
