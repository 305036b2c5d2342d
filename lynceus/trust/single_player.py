"""SafeCV's one player: patches of pixels around keypoints, whose weights follow what the patches did to the answer.

Feature-Guided Black-Box Safety Testing of Deep Neural Networks, TACAS 2018, arXiv 1710.07859. Reference code:
matthewwicker/SafeCV (written from the paper and a description: the released file does not run).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lynceus.core.errors import AdviceError
from lynceus.core.rng import numpy_generator
from lynceus.trust.oracle import NOTHING, Oracle, State
from lynceus.trust.plays import Play, Pool, known, scrutinise

REWARD = 25.0  # by which a simulated drop of the class's probability is divided before a keypoint's weight gets it
SPREAD = 15.0  # pixels that a patch reaches beyond its keypoint's size, at 224 pixels and above; in proportion below
BACK = 10  # pixels that backtracking gives back at a time
TRIES = 8  # patches tried per level of the tree


@dataclass(kw_only=True)
class OnePlayer:
    """A state grows by patches: `visit` pixels drawn around a keypoint from a normal density of its size + `spread` in
    each axis, clipped to the image. A patch that raises the probability of the class is undone. A drop is added to the
    keypoint's weight: whole / level in the tree, / 25 in the simulations."""

    oracle: Oracle
    points: np.ndarray
    draw: np.random.Generator
    visit: int
    spread: float
    weights: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        response = self.points[:, 3]
        self.weights = response / response.sum() if response.sum() > 0 else np.full(len(response), 1 / len(response))
        self.counts = np.zeros(len(response))

    def keypoint(self, explore: bool) -> int:
        """Drawn by weight, or by weight + sqrt(ln(all plays) / own plays), where those never played come first."""
        score = self.weights
        if explore:
            if (self.counts == 0).any():
                score = (self.counts == 0) * (self.weights + 1e-9)
            else:
                score = self.weights + np.sqrt(np.log(self.counts.sum()) / self.counts)
        chosen = int(self.draw.choice(len(score), p=score / score.sum()))
        self.counts[chosen] += 1
        return chosen

    def patch(self, keypoint: int) -> list[int]:
        """Movable pixels around a keypoint."""
        h, w = self.oracle.image.shape[1:]
        row, col, size, _ = self.points[keypoint]
        at = self.draw.normal((row, col), size + self.spread, (self.visit, 2)).round().astype(int)
        flat = at[:, 0].clip(0, h - 1) * w + at[:, 1].clip(0, w - 1)
        return [p for p in dict.fromkeys(flat.tolist()) if self.oracle.movable[p]]

    def learn(self, keypoint: int, drop: float) -> None:
        """Adds to a weight; weights stay non-negative and sum to 1."""
        self.weights[keypoint] = max(0.0, self.weights[keypoint] + drop)
        total = self.weights.sum()
        self.weights = self.weights / total if total > 0 else np.full(len(self.weights), 1 / len(self.weights))

    def fits(self, state: State) -> bool:
        """Whether a state could still become the best example once it is scrutinised."""
        return self.oracle.size(state) <= self.oracle.distance

    def game(self) -> Play[bool]:
        """From the original image to an example, a state that is too far, or as many levels as there are patches."""
        state, level = NOTHING, 0
        most = 4 * max(1, len(self.oracle.cost) // self.visit)
        while level < most:
            level += 1
            tried = [(k, state.union(self.patch(k))) for k in (self.keypoint(True) for _ in range(TRIES))]
            tried = [(k, s) for k, s in tried if s != state and self.fits(s)]
            new = [s for _, s in tried if s not in self.oracle.answers]
            if new:
                yield new
            if not tried:
                return False
            left = self.oracle.answers[state].remaining
            drops = [left - self.oracle.answers[s].remaining for _, s in tried]
            for (k, _), drop in zip(tried, drops, strict=True):
                self.learn(k, drop / level)
            best = int(np.argmax(drops))
            if drops[best] < 0 and not self.oracle.answers[tried[best][1]].changed:
                continue
            state = tried[best][1]
            if self.oracle.answers[state].changed:
                yield from self.back(state)
                return True
            if (yield from self.simulate(state)):
                return True
        return False

    def simulate(self, state: State) -> Play[bool]:
        """Patches by weight alone, to the end."""
        for _ in range(max(1, len(self.oracle.cost) // self.visit)):
            k = self.keypoint(False)
            more = state.union(self.patch(k))
            if more == state:
                continue
            if not self.fits(more):
                return False
            answer = yield from known(self.oracle, more)
            drop = self.oracle.answers[state].remaining - answer.remaining
            self.learn(k, drop / REWARD)
            if answer.changed:
                yield from self.back(more)
                return True
            if drop >= 0:
                state = more
        return False

    def back(self, state: State) -> Play[None]:
        """Gives back clusters of pixels that are not needed, then single ones to a fixed point."""
        order = sorted(state)
        self.draw.shuffle(order)
        for i in range(0, len(order), BACK):
            less = state.difference(order[i : i + BACK])
            if less and (yield from known(self.oracle, less)).changed:
                state = less
        yield from scrutinise(self.oracle, state)


def sample_pixels(
    oracle: Oracle,
    points: np.ndarray,
    *,
    visit: int | None = None,
    spread: float | None = None,
    width: int = 32,
    seed: int = 0,
    stop_at_first: bool = False,
) -> OnePlayer:
    """Plays one player's games, `width` states at a time, until the budget ends; the oracle keeps what is found.

    visit: pixels per patch, None: 6 up to 48 pixels of side (and no more than a tenth of the image), else 100. spread:
    None: 15 at 224 pixels and above, in proportion below.
    """
    if visit is not None and visit < 1:
        raise AdviceError(f"A patch has at least one pixel, not {visit}.")
    h, w = oracle.image.shape[1:]
    side = max(h, w)
    player = OnePlayer(
        oracle=oracle,
        points=np.asarray(points, dtype=np.float64),
        draw=numpy_generator(seed, "one player"),
        visit=visit or (max(1, min(6, h * w // 10)) if side <= 48 else 100),
        spread=SPREAD * min(1.0, side / 224) if spread is None else spread,
    )
    pool = Pool(oracle, lambda: (player.game(), lambda _: None), width=width)
    idle = 0
    while not oracle.ended and idle < 200 and not (stop_at_first and oracle.best is not None):
        before = oracle.spent
        pool.round()
        idle = 0 if oracle.spent > before else idle + 1
    return player
