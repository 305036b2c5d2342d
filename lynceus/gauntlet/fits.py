"""Laws of learning curves: fitted with error bars, compared, and extrapolated no further than they deserve.

Sun, Shrivastava, Singh, Gupta, "Revisiting Unreasonable Effectiveness of Data in Deep Learning Era", ICCV 2017,
arXiv 1707.02968 (performance grows with the logarithm of the number of images). No code is public.

Accuracies are fractions in 0..1, n counts training images. Three laws, all fitted to the accuracy itself so that their
AICc can be compared:

| law      | accuracy(n)                | parameters            |
|----------|----------------------------|-----------------------|
| `log`    | a + b log10 n              | a, b (gain per decade)|
| `power`  | a_inf - c n^-alpha         | a_inf, c, alpha       |
| `error`  | 1 - exp(u) n^-alpha        | u, alpha              |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from lynceus.core.errors import AdviceError
from lynceus.core.rng import numpy_generator

LAWS: dict[str, tuple[str, ...]] = {"log": ("a", "b"), "power": ("a_inf", "c", "alpha"), "error": ("u", "alpha")}
ALPHA = (0.05, 2.0)
_GRID = np.geomspace(*ALPHA, 241)
_REJECT = 0.01  # a law is rejected when its misfit would be seen by chance less often than this


@dataclass(frozen=True, kw_only=True)
class Points:
    """A learning curve: `n` (k,) increasing, `accuracy` (s, k) one row per seed, `n_test` pictures behind each value.

    The sd of one run is what the seeds show, and never less than what `n_test` coin flips would (binomial)."""

    n: Float[np.ndarray, " k"]
    accuracy: Float[np.ndarray, "s k"]
    n_test: int

    def __post_init__(self) -> None:
        if self.accuracy.ndim != 2 or self.accuracy.shape[1] != len(self.n):
            raise AdviceError(
                f"accuracy must be (seeds, {len(self.n)}), one column per size, not {self.accuracy.shape}."
            )
        if len(self.n) < 3 or np.any(np.diff(self.n) <= 0):
            raise AdviceError(f"A law needs at least 3 increasing sizes; got {list(self.n)}.")
        if self.n_test < 1 or np.isnan(self.accuracy).any() or self.accuracy.min() < 0 or self.accuracy.max() > 1:
            raise AdviceError(
                "Accuracies are fractions in 0..1 (divide percentages by 100), measured on n_test >= 1 pictures."
            )

    @property
    def mean(self) -> Float[np.ndarray, " k"]:
        return self.accuracy.mean(0)

    @property
    def floor(self) -> Float[np.ndarray, " k"]:
        p = (self.accuracy.mean(0) * self.n_test + 0.5) / (self.n_test + 1)
        return np.sqrt(p * (1 - p) / self.n_test)

    @property
    def sd(self) -> Float[np.ndarray, " k"]:
        """Standard deviation of one run, (k,)."""
        seen = self.accuracy.std(0, ddof=1) if len(self.accuracy) > 1 else np.zeros(len(self.n))
        return np.maximum(seen, self.floor)

    @property
    def error(self) -> Float[np.ndarray, " k"]:
        """Standard error of the mean over seeds, (k,)."""
        return self.sd / np.sqrt(len(self.accuracy))

    def head(self, count: int) -> Points:
        """The `count` smallest sizes."""
        return Points(n=self.n[:count], accuracy=self.accuracy[:, :count], n_test=self.n_test)

    def resampled(self, draws: int, seed: int) -> Float[np.ndarray, "d k"]:
        """Means of `draws` bootstrap repetitions: whole seeds are drawn (nested subsets make sizes correlated), widened
        by s/(s-1) for the few seeds, and topped up with noise to the binomial floor."""
        rng, seeds = numpy_generator(seed, "bootstrap"), len(self.accuracy)
        spread = np.zeros((draws, len(self.n)))
        seen = np.zeros(len(self.n))
        if seeds > 1:
            pick = rng.integers(0, seeds, (draws, seeds))
            spread = (self.accuracy[pick].mean(1) - self.mean) * np.sqrt(seeds / (seeds - 1))
            seen = self.accuracy.var(0, ddof=1) / seeds
        missing = np.sqrt(np.maximum(self.error**2 - seen, 0))
        return self.mean + spread + rng.normal(size=spread.shape) * missing


@dataclass(frozen=True, kw_only=True)
class Law:
    """One fitted law. `draws` holds the parameters of the bootstrap repetitions (d, p)."""

    name: str
    values: tuple[float, ...]
    n: tuple[float, ...]
    chi2: float
    p_value: float  # of the misfit, given the error bars
    aicc: float
    r2: float
    draws: np.ndarray = field(repr=False, compare=False)

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(LAWS[self.name], self.values))

    @property
    def rejected(self) -> bool:
        return self.p_value < _REJECT

    def __call__(self, n: Any) -> Any:
        """Accuracy at n, a number or an array."""
        return predict(self.name, np.asarray(self.values), np.asarray(n, dtype=float))

    def interval(self, parameter: str, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of a parameter."""
        if parameter not in LAWS[self.name]:
            raise AdviceError(
                f"The {self.name} law has the parameters {', '.join(LAWS[self.name])}, not {parameter!r}."
            )
        return _percentiles(self.draws[:, LAWS[self.name].index(parameter)], level)

    def band(self, n: float, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the predicted accuracy at n."""
        return _percentiles(np.array([float(predict(self.name, d, np.asarray(n, float))) for d in self.draws]), level)

    def needed(self, target: float) -> float:
        """n at which the law reaches `target`; inf when it never does."""
        return float(_solve(self.name, np.asarray(self.values)[None], np.array([target]))[0])


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def predict(name: str, values: np.ndarray, n: Any) -> Any:
    """Accuracy of law `name` with parameters `values` (..., p) at n."""
    if name == "log":
        return values[..., 0] + values[..., 1] * np.log10(n)
    if name == "power":
        return values[..., 0] - values[..., 1] * n ** -values[..., 2]
    if name == "error":
        return 1 - np.exp(values[..., 0]) * n ** -values[..., 1]
    raise AdviceError(f"There is no law {name!r}; there are {', '.join(LAWS)}.")


def _solve(name: str, values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """n with accuracy(n) = target for each row of values; inf where out of reach."""
    with np.errstate(all="ignore"):
        if name == "log":
            exponent = np.where(values[:, 1] > 0, (target - values[:, 0]) / values[:, 1], np.inf)
            out = 10.0 ** np.minimum(exponent, 300)
        elif name == "power":
            out = ((values[:, 0] - target) / values[:, 1]) ** (-1 / values[:, 2])
        else:
            out = ((1 - target) / np.exp(values[:, 0])) ** (-1 / values[:, 1])
    return np.where(np.isfinite(out) & (out < 1e250), out, np.inf)


def _linear(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted straight lines y ~ p + q x: y (d, k), x (g, k) -> p, q (d, g)."""
    total = w.sum()
    mx, my = (x * w).sum(-1) / total, (y * w).sum(-1) / total
    dx = x - mx[:, None]
    q = (y * w) @ dx.T / ((dx * dx) * w).sum(-1)
    return my[:, None] - q * mx, q


def _profile(name: str, y: np.ndarray, n: np.ndarray, w: np.ndarray, alphas: np.ndarray) -> tuple[np.ndarray, ...]:
    """For fixed exponents the laws are linear: best coefficients and misfit for every draw and exponent (d, g)."""
    x = (n[None, :] / n[-1]) ** -alphas[:, None]  # scaled by the last size, so that it is well conditioned
    if name == "power":
        top, slope = _linear(y, x, w)
        drop = -slope
        flat = drop < 0
        top, drop = np.where(flat, (y * w).sum(-1, keepdims=True) / w.sum(), top), np.where(flat, 0.0, drop)
        over = top > 1
        forced = ((1 - y) * w) @ x.T / ((x * x) * w).sum(-1)
        top, drop = np.where(over, 1.0, top), np.where(over, np.maximum(forced, 0), drop)
    else:
        top = np.ones((len(y), len(alphas)))
        drop = np.maximum(((1 - y) * w) @ x.T / ((x * x) * w).sum(-1), 1e-12)
    # ||y - top + drop x||^2 without a (d, g, k) array
    square = ((y * y) * w).sum(-1, keepdims=True) + top**2 * w.sum() + drop**2 * ((x * x) * w).sum(-1)
    cross = -2 * top * (y * w).sum(-1, keepdims=True) + 2 * drop * ((y * w) @ x.T) - 2 * top * drop * (x * w).sum(-1)
    return square + cross, top, drop


def fit_many(
    name: str, y: Float[np.ndarray, "d k"], n: Float[np.ndarray, " k"], sd: Float[np.ndarray, " k"]
) -> np.ndarray:
    """Parameters (d, p) of law `name` for many curves at once, weights 1/sd^2, alpha bounded in 0.05..2.

    The exponent is searched on a grid (the laws are linear in the rest) and refined twice around its best value."""
    w = 1 / sd**2
    if name == "log":
        a, b = _linear(y, np.log10(n)[None], w)
        return np.concatenate([a, b], 1)
    misfit, top, drop = _profile(name, y, n, w, _GRID)
    best = misfit.argmin(1)
    out = np.empty((len(y), 3))
    for index in np.unique(best):  # curves that share a grid cell are refined together
        rows = best == index
        low, high = _GRID[max(index - 1, 0)], _GRID[min(index + 1, len(_GRID) - 1)]
        alphas = np.linspace(low, high, 65)
        misfit, top, drop = _profile(name, y[rows], n, w, alphas)
        pick = misfit.argmin(1)
        take = np.arange(len(pick))
        out[rows] = np.stack([top[take, pick], drop[take, pick], alphas[pick]], 1)
    scale = n[-1] ** out[:, 2]
    out[:, 1] *= scale
    if name == "power":
        return out
    return np.stack([np.log(out[:, 1]), out[:, 2]], 1)


def fit_law(name: str, points: Points, *, draws: int = 1000, seed: int = 0) -> Law:
    """One law, by bounded least squares with weights 1/sd^2, with a bootstrap over seeds."""
    from scipy.optimize import least_squares
    from scipy.stats import chi2 as chi2_distribution

    if name not in LAWS:
        raise AdviceError(f"There is no law {name!r}; there are {', '.join(LAWS)}.")
    n, y, se = points.n.astype(float), points.mean, points.error
    values = fit_many(name, y[None], n, se)[0]
    bounds = {
        "log": ([-np.inf, -np.inf], [np.inf, np.inf]),
        "power": ([-np.inf, 0.0, ALPHA[0]], [1.0, np.inf, ALPHA[1]]),
        "error": ([-np.inf, ALPHA[0]], [np.inf, ALPHA[1]]),
    }[name]
    start = np.clip(values, np.nextafter(bounds[0], np.inf), np.nextafter(bounds[1], -np.inf))
    scale = np.maximum(np.abs(start), 1e-3)
    polished = least_squares(lambda v: (predict(name, v, n) - y) / se, start, bounds=bounds, x_scale=scale)

    def misfit(v: np.ndarray) -> float:
        return float((((predict(name, v, n) - y) / se) ** 2).sum())

    values = polished.x if misfit(polished.x) <= misfit(values) else values
    chi2, k, p = misfit(values), len(n), len(LAWS[name])
    w = 1 / se**2
    centre = (w * y).sum() / w.sum()
    r2 = 1 - chi2 / max(float((w * (y - centre) ** 2).sum()), 1e-12)
    correction = 2 * p * (p + 1) / (k - p - 1) if k - p - 1 > 0 else np.inf
    return Law(
        name=name,
        values=tuple(float(v) for v in values),
        n=tuple(float(v) for v in n),
        chi2=chi2,
        p_value=float(chi2_distribution.sf(chi2, k - p)) if k > p else 1.0,
        aicc=chi2 + 2 * p + correction,
        r2=r2,
        draws=fit_many(name, points.resampled(draws, seed), n, se),
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """All laws of one curve, the one that AICc chooses, and how well it foretold the largest size.

    last_error: |prediction of the largest size from the others - what was measured|, nan with fewer than 4 sizes.
    last_width: half the 95% interval of that prediction."""

    points: Points
    laws: dict[str, Law]
    chosen: str
    last_error: float
    last_width: float

    @property
    def best(self) -> Law:
        return self.laws[self.chosen]

    def rows(self, **labels: object) -> list[dict[str, object]]:
        """One row per law, for a Report."""
        out: list[dict[str, object]] = []
        for law in self.laws.values():
            row: dict[str, object] = {**labels, "law": law.name, "chosen": law.name == self.chosen}
            for parameter, value in law.parameters.items():
                low, high = law.interval(parameter)
                row |= {parameter: value, f"{parameter}_low": low, f"{parameter}_high": high}
            out.append(row | {"aicc": law.aicc, "r2": law.r2, "p_value": law.p_value, "rejected": law.rejected})
        return out


def fit(points: Points, *, draws: int = 1000, seed: int = 0) -> Fit:
    """Fits the three laws, chooses by AICc, and tries the choice by leaving the largest size out."""
    laws = {name: fit_law(name, points, draws=draws, seed=seed) for name in LAWS}
    finite = {k: v.aicc for k, v in laws.items() if np.isfinite(v.aicc)}
    chosen = min(finite, key=finite.__getitem__) if finite else "log"
    last_error = last_width = float("nan")
    if len(points.n) >= 4:
        without = fit_law(chosen, points.head(len(points.n) - 1), draws=draws, seed=seed)
        low, high = without.band(float(points.n[-1]))
        last_error = abs(float(without(points.n[-1])) - float(points.mean[-1]))
        # the measured value has an error of its own
        last_width = float(np.hypot((high - low) / 2, 1.96 * points.error[-1]))
    return Fit(points=points, laws=laws, chosen=chosen, last_error=last_error, last_width=last_width)


@dataclass(frozen=True, kw_only=True)
class Need:
    """How many more examples `gain` costs; `examples` is None when the curve justifies no answer, `why` says why."""

    gain: float
    examples: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""


def more_examples(found: Fit, gain: float = 0.01) -> Need:
    """Examples beyond the largest size for `gain` more accuracy (0.01: one point), with a 95% interval.

    Refused when every law is rejected, when it would take more than one decade, or when leaving the largest size out
    missed it by more than the interval of the prediction."""
    law, last = found.best, float(found.points.n[-1])
    if law.rejected:
        return Need(gain=gain, examples=None, why=f"no law fits (the best, {law.name}, has p = {law.p_value:.1e})")
    if np.isnan(found.last_error):
        return Need(
            gain=gain, examples=None, why="fewer than 4 sizes: the law could not be tried on a size it had not seen"
        )
    if found.last_error > found.last_width:
        miss, width = 100 * found.last_error, 100 * found.last_width
        return Need(
            gain=gain,
            examples=None,
            why=f"leave-last-out missed by {miss:.1f} points, more than its interval of {width:.1f}",
        )
    target = float(law(last)) + gain
    needed = law.needed(target)
    if not needed <= 10 * last:
        return Need(gain=gain, examples=None, why=f"it would take more than one decade beyond {last:.0f} examples")
    each = _solve(law.name, law.draws, predict(law.name, law.draws, np.array(last)) + gain) - last
    low, high = _percentiles(np.minimum(each, 1e12), 0.95)
    return Need(gain=gain, examples=needed - last, low=low, high=high)


def bend(points: Points, *, least: int = 4) -> int:
    """How many of the smallest sizes still lie on one log-linear line: all of them when it is not rejected."""
    for count in range(len(points.n), least - 1, -1):
        if not fit_law("log", points.head(count), draws=2).rejected:
            return count
    return least - 1
