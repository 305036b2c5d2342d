"""The two-player game on an image, and Monte-Carlo tree search on it.

Feature-Guided Black-Box Safety Testing of Deep Neural Networks, TACAS 2018, arXiv 1710.07859. Reference code:
VeriDeep/DLV-experimental-package (written from the paper; its values of 1000 - severity make all draws nearly uniform,
so that rewards here are the paper's 1 / severity, scaled to [0, 1]).

Player I chooses a feature, player II paints a pixel of it. A state is the set of painted pixels, so that the orders in
which it can be reached share one node, its visits and its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from lynceus.trust.oracle import NOTHING, Oracle, State
from lynceus.trust.plays import Play, drawn_moves, first_change, scrutinise

Mode = Literal["cooperative", "adversarial", "nature"]
REACH = 4.0  # plays go on to this many times the best severity
NOBODY = -1  # feature of a node where player I is to move


@dataclass(slots=True, eq=False)
class Node:
    """`feature`: what player I chose, NOBODY where it is player I's turn. `total`, `visits`: rewards of the plays
    through this node. `value`: of the game from here, exact once `solved`. `payoff`: of an ended game."""

    state: State
    feature: int
    visits: int = 0
    total: float = 0.0
    value: float = 0.0
    payoff: float | None = None
    solved: bool = False
    children: list[Node] | None = None


@dataclass(kw_only=True)
class Tree:
    """The game over `features` (the pixels of each) of the oracle's image, and its search.

    share, logs: how plays draw features and, within one, pixels. mode: of player I. tighten: states that cannot beat
    the best example end the game, where player I cooperates: the value of the game is not changed by it.
    each: see `first_change`.
    """

    oracle: Oracle
    features: list[np.ndarray]
    share: np.ndarray
    logs: list[np.ndarray]
    draw: np.random.Generator
    mode: Mode = "cooperative"
    tighten: bool = True
    each: bool = False
    nodes: dict[tuple[State, int], Node] = field(default_factory=dict)
    plays: int = 0
    wins: int = 0
    expansions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        costs = [self.oracle.cost[p] for pixels in self.features for p in pixels.tolist()]
        least = min(costs)
        self.least = math.sqrt(least) if self.oracle.norm == "l2" else least
        self._least_cost = least
        self.pixels = sum(len(f) for f in self.features)
        self.start = self.root = self._node(NOTHING, NOBODY)
        self._waiting: list[list[Node]] = []

    def reward(self, severity: float) -> float:
        """1 / severity in units of the least that a game can cost: in [0, 1]."""
        return self.least / severity if severity > 0 else 1.0

    @property
    def finished(self) -> bool:
        """Whether every game has been played out (or cannot beat the best): values are exact."""
        return self.start.solved and not self._waiting

    def refill(self) -> tuple[Play[float], Callable[[float], None]] | None:
        """The next play of the search, with what to do at its end; None when the game is solved."""
        for _ in range(64):
            if self._waiting:
                path = self._waiting.pop()
                if path[-1].solved:
                    self._back(path, None)
                    continue
                return self._play(path[-1]), partial(self._back, path)
            if self.root.solved:
                if self.start.solved:
                    return None
                self.root = self.start
            self._select()
        return None

    def move(self) -> None:
        """Makes the best move of the player whose turn it is; from the end of a game back to its start."""
        seen = [c for c in self.root.children or [] if c.visits and not c.solved]
        if not seen:
            self.root = self.start
            return
        sign = -1 if self.mode == "adversarial" and self.root.feature == NOBODY else 1
        if self.mode == "nature" and self.root.feature == NOBODY:
            self.root = seen[int(self.draw.integers(len(seen)))]
        else:
            self.root = max(seen, key=lambda c: sign * c.total / c.visits)

    def settle(self) -> None:
        """Values of all nodes anew, from the largest states up: a play updates only the path that it took."""
        for node in sorted(self.nodes.values(), key=lambda n: (-len(n.state), n.feature == NOBODY)):
            self._update(node)

    def _node(self, state: State, feature: int) -> Node:
        node = self.nodes.get((state, feature))
        if node is None:
            node = self.nodes[state, feature] = Node(state, feature)
        return node

    def _select(self) -> None:
        """Descends to a leaf, expands it, and puts its children into the queue."""
        path = [self.root]
        while True:
            node = path[-1]
            if node.children is None:
                children = self._expand(node)
                self._waiting += [[*path, child] for child in reversed(children)]
                if not children:
                    node.solved, node.payoff = True, 0.0
                    self._back(path, None)
                return
            open_ = [c for c in node.children if not c.solved]
            if not open_:
                self._back(path, None)
                return
            seen = [c for c in open_ if c.visits]
            if not seen:  # their first plays are under way: another one meanwhile
                self._waiting.append([*path, open_[int(self.draw.integers(len(open_)))]])
                return
            path.append(seen[self._choose(node, seen)])

    def _choose(self, node: Node, seen: list[Node]) -> int:
        turn = node.feature == NOBODY
        if turn and self.mode == "nature":
            return int(self.draw.integers(len(seen)))
        explore = 2 * math.log(max(node.visits, 2))
        weight = [c.total / c.visits + math.sqrt(explore / c.visits) for c in seen]
        if turn and self.mode == "adversarial":
            weight = [1 / w for w in weight]
        at = float(self.draw.random()) * sum(weight)
        for i, w in enumerate(weight):
            at -= w
            if at < 0:
                return i
        return len(seen) - 1

    def _expand(self, node: Node) -> list[Node]:
        if node.feature == NOBODY:
            open_ = [k for k, f in enumerate(self.features) if any(p not in node.state for p in f.tolist())]
            node.children = [self._node(node.state, k) for k in open_]
        else:
            free = [p for p in self.features[node.feature].tolist() if p not in node.state]
            node.children = [self._node(node.state | {p}, NOBODY) for p in free]
        self.expansions.append(len(node.children))
        return node.children

    def _limit(self) -> float:
        """Severities must be at most this."""
        if self.tighten and self.mode == "cooperative" and self.oracle.best is not None:
            return min(self.oracle.distance, math.nextafter(self.oracle.severity, 0))
        return self.oracle.distance

    def _room(self, state: State) -> float:
        """What may still be spent on pixels, in the units of `oracle.cost`."""
        limit = self._limit()
        return (limit**2 if self.oracle.norm == "l2" else limit) * (1 + 1e-12) - self._spent(state)

    def _spent(self, state: State) -> float:
        return sum(self.oracle.cost[p] for p in state)

    def _play(self, node: Node) -> Play[float]:
        oracle = self.oracle
        room = self._room(node.state)
        turn = node.feature == NOBODY
        if turn and room < 0:  # beyond the bound: not even asked
            node.solved, node.payoff = True, 0.0
            return 0.0
        if turn and room < self._least_cost:  # the last state that may be asked
            moves: list[int] = []
        else:
            moves = self._moves(node)
        hit = yield from first_change(oracle, node.state, moves, each=self.each)
        if hit is not None:
            self.wins += 1
        if turn and oracle.answers[node.state].changed:
            node.solved, node.payoff = True, self.reward(oracle.size(node.state))
        elif turn and room < self._least_cost:
            node.solved, node.payoff = True, 0.0
        if hit is None:
            return 0.0
        reward = self.reward(oracle.size(hit))
        yield from scrutinise(oracle, hit)
        return reward

    def _moves(self, node: Node) -> list[int]:
        """The pixels of one random play from a node, as many as its bound allows."""
        oracle, room = self.oracle, self._room(node.state)
        if self.tighten and self.mode == "cooperative":
            # a longer play may be scrutinised into a smaller example: it may reach further than the best
            limit = min(oracle.distance, REACH * oracle.severity)
            room = (limit**2 if oracle.norm == "l2" else limit) * (1 + 1e-12) - self._spent(node.state)
        count = self.pixels - len(node.state)
        if math.isfinite(room):
            count = min(count, int(room / self._least_cost))
        if count < 1:
            return []
        first = None if node.feature == NOBODY else node.feature
        moves = drawn_moves(self.features, self.logs, self.share, node.state, first=first, count=count, draw=self.draw)
        cost = np.cumsum([oracle.cost[p] for p in moves])
        return moves[: int(np.searchsorted(cost, room, side="right"))]

    def _back(self, path: list[Node], reward: float | None) -> None:
        """Adds a play's reward to every node of its path and brings values up to date; None only does the second."""
        if reward is not None:
            self.plays += 1
            for node in path:
                node.visits += 1
                node.total += reward
        for node in reversed(path):
            self._update(node)

    def _update(self, node: Node) -> None:
        if node.payoff is not None:
            node.value = node.payoff
        elif not node.children:
            node.value = node.total / node.visits if node.visits else 0.0
        else:
            node.solved = all(c.solved for c in node.children)
            values = [c.value for c in node.children if c.visits or c.solved]
            if not values:
                node.value = node.total / node.visits if node.visits else 0.0
            elif node.feature != NOBODY or self.mode == "cooperative":
                node.value = max(values)
            else:
                node.value = min(values) if self.mode == "adversarial" else sum(values) / len(values)
