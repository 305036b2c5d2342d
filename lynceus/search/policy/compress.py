"""`compress`: a smaller student of any trained convolutional network, found by the removal and the shrinkage policy.

N2N Learning, ICLR 2018, arXiv 1709.06030. The removal search runs on the teacher, the shrinkage search on the best
student that it found; both are always taught by the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core import plots
from lynceus.core.errors import AdviceError
from lynceus.core.guard import collect
from lynceus.core.identity import model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import Progress, progress
from lynceus.core.report import Report, environment
from lynceus.core.rng import borrowed, derive, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.rewrite.restructure import Bones, Invalid, Restructure
from lynceus.rewrite.structure import Layer, layers_of
from lynceus.search.policy.files import load_policy
from lynceus.search.policy.moves import after_removal, after_shrinking, merged, narrowed, removable, shrinkable
from lynceus.search.policy.reinforce import Reinforce, ReinforceConfig
from lynceus.search.policy.reward import Reward
from lynceus.search.policy.scoring import DistilConfig, Lessons, Scorer, bare, teach
from lynceus.search.policy.sequences import FACTORS, Policy, RemovalPolicy, ShrinkPolicy, raw

Stage = Literal["remove", "shrink"]
Score = Callable[[list[Restructure]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """student: trained, in eval mode, saved by `save_model` like its teacher. plan: the rewrite that builds it.
    policies: stage -> policy, to start another search from. log: one dict per rollout: stage, iteration, plan, C
    (compression), A (accuracy), R (reward), parameters, invalid (why, or ""). report: table and curves."""

    student: nn.Module
    plan: Restructure
    policies: dict[str, Policy]
    log: list[dict[str, Any]]
    report: Report


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """stages: which searches run. iterations, rollouts: students per search are their product. size_limit: parameters
    that the student may have. accuracy_limit: share of held-out images it must answer right. strategy: "reinforce", or
    "random" draws of the same kind as a yardstick. scaled: layers are described by logarithms and one-hot kinds; else
    by raw numbers as in the paper's code. critic: the actor-critic variant. held_out: share of the images that students
    are judged on. seconds: end the searches after so long. workers: processes that teach students. seed: of every
    draw."""

    stages: tuple[Stage, ...] = ("remove", "shrink")
    iterations: int = 100
    rollouts: int = 5
    size_limit: int | None = None
    accuracy_limit: float | None = None
    strategy: Literal["reinforce", "random"] = "reinforce"
    scaled: bool = True
    critic: bool = False
    held_out: float = 0.2
    seconds: float | None = None
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        wrong = [s for s in self.stages if s not in ("remove", "shrink")]
        if wrong or not self.stages or len(set(self.stages)) < len(self.stages):
            raise AdviceError(
                f"stages={self.stages} is one or both of 'remove' and 'shrink', in this order of running."
            )
        if min(self.iterations, self.rollouts, self.workers) < 1:
            raise AdviceError(
                f"iterations={self.iterations}, rollouts={self.rollouts} and workers={self.workers} are at least 1."
            )
        if not 0 < self.held_out < 1:
            raise AdviceError(f"held_out={self.held_out} is a share of the images, such as 0.2.")
        if self.size_limit is not None and self.size_limit < 1:
            raise AdviceError(f"size_limit={self.size_limit} is a number of parameters, such as 50000.")
        if self.accuracy_limit is not None and not 0 < self.accuracy_limit <= 1:
            raise AdviceError(f"accuracy_limit={self.accuracy_limit} is a share, such as 0.95.")
        if self.seconds is not None and not self.seconds > 0:
            raise AdviceError(f"seconds={self.seconds} is above 0; leave it out for no limit.")
        if self.strategy not in ("reinforce", "random"):
            raise AdviceError(f"strategy={self.strategy!r} is 'reinforce' or 'random'.")


def compress(
    teacher: nn.Module,
    data: Iterable[Sample],
    *,
    config: PolicyConfig | None = None,
    learning: ReinforceConfig | None = None,
    distil: DistilConfig | None = None,
    policies: Mapping[str, Policy | str | Path] | None = None,
    keep: Path | None = None,
) -> Compressed:
    """A student of `teacher` with fewer parameters, taught to answer like it.

    teacher: any trained convolutional classifier. data: labelled images in [0, 1]; `config.held_out` of them judge.
    policies: stage -> a policy, or the file of one, to start from: any depth fits. keep: folder in which finished
    students are kept, so that a second run goes on. AdviceError when no student keeps `size_limit`, naming the
    smallest."""
    c, learning, distil = config or PolicyConfig(), learning or ReinforceConfig(), distil or DistilConfig()
    start = time.monotonic()
    subject = Subject(teacher, needs_grad=False)
    teacher = subject.model
    if not isinstance(teacher, nn.Module):
        raise AdviceError(f"{subject.name} is a plain function; a student is built from the layers of a module.")
    material = collect(subject, data, needs=frozenset({"labels"}))
    inputs = torch.cat([subject.prepare(x) for x in material.images.split(256)])
    image = (int(inputs.shape[1]), int(inputs.shape[2]), int(inputs.shape[3]))
    layers = layers_of(teacher, image)
    if not any(l.kind == "Conv2d" for l in layers):
        raise AdviceError(f"{subject.name} has no convolution; these policies make convolutional networks smaller.")
    if not shrinkable(layers).any() and int(removable(layers).sum()) < 2:
        raise AdviceError(
            f"{subject.name} has no layer that these policies may remove or shrink; they are for convolutional "
            "networks such as resnet_nano. Of a transformer, BlockPrune (lynceus rewrite block_prune) takes weights."
        )
    softmax = tuple(l.name for l in layers[-1:] if l.kind in ("Softmax", "LogSoftmax"))
    lessons = _lessons(bare(teacher, softmax), inputs, material.labels, c)
    reward = Reward(
        teacher_size=sum(p.numel() for p in teacher.parameters()),
        teacher_accuracy=lessons.accuracy(teacher),
        size_limit=c.size_limit,
        accuracy_limit=c.accuracy_limit,
    )
    identity = (model_key(subject), asdict(distil), c.held_out, c.seed, len(inputs), float(inputs.double().sum()))
    scorer = Scorer(teacher, lessons, distil, softmax=softmax, workers=c.workers)
    try:
        search = Search(
            teacher, image, reward, scorer, config=c, learning=learning, ledger=Ledger(keep, "students", identity)
        )
        base = search.run(_opened(policies or {}, c), start)
    finally:
        scorer.close()
    best = search.best() or search.narrowest(base)
    with borrowed(c.seed, "final student"):
        plan: Restructure = best["plan"]
        student = plan(teacher)
    teach(student, lessons, distil, epochs=distil.final_epochs, seed=c.seed, falling=True, softmax=softmax)
    report = _report(subject, teacher, student, lessons, search, best, reward, time.monotonic() - start)
    report.notes += material.notes
    return Compressed(student=student, plan=plan, policies=search.policies, log=search.log, report=report)


class Search:
    """The searches of one teacher: rollouts, scores, and what the policies learn from them.

    image: channels, height and width. score: plans -> accuracies; anything may stand in for training."""

    def __init__(
        self,
        teacher: nn.Module,
        image: tuple[int, int, int],
        reward: Reward,
        score: Score,
        *,
        config: PolicyConfig,
        learning: ReinforceConfig,
        ledger: Ledger | None = None,
    ):
        self.teacher, self.image, self.reward, self.score = teacher, image, reward, score
        self.config, self.learning = config, learning
        self.ledger = Ledger(None, "students", ()) if ledger is None else ledger
        self.bones = Bones.of(teacher, image)
        self.log: list[dict[str, Any]] = []
        self.policies: dict[str, Policy] = {}
        self.notes: list[str] = []
        self.spent = 0.0
        self.taught = 0

    def run(self, policies: Mapping[str, Policy], start: float) -> Restructure:
        """All stages; returns the plan that the last one started from."""
        c = self.config
        base = Restructure(image=self.image)
        with progress("searching", total=len(c.stages) * c.iterations * c.rollouts, unit="students") as bar:
            for i, stage in enumerate(c.stages):
                if i:
                    found = self.best()
                    base = replace(found["plan"], seed=0) if found else base
                self.stage(stage, base, policies.get(stage), start, bar)
        return base

    def stage(self, stage: str, base: Restructure, policy: Policy | None, start: float, bar: Progress) -> None:
        """One search around the network of `base`."""
        c = self.config
        network = base(self.teacher) if base.removed or base.changed else self.teacher
        layers = layers_of(network, self.image)
        rows = raw(layers)
        free = removable(layers) if stage == "remove" else shrinkable(layers)
        if policy is None:
            kind = RemovalPolicy if stage == "remove" else ShrinkPolicy
            with borrowed(c.seed, "policy", stage):
                policy = kind(scaled=c.scaled, critic=c.critic)
        self.policies[stage] = policy
        learner, draw = Reinforce(policy, self.learning), generator(c.seed, "rollouts", stage)
        for iteration in range(c.iterations):
            if c.seconds is not None and time.monotonic() - start > c.seconds:
                self.notes.append(
                    f"The {stage} search ended after {iteration} of {c.iterations} iterations: {c.seconds:g} s were "
                    "over."
                )
                bar.advance((c.iterations - iteration) * c.rollouts)
                return
            if c.strategy == "random":
                actions = _random(free, c.rollouts, draw)
            else:
                actions = policy.sample(rows, free, c.rollouts, draw)
            plans = [self._plan(stage, base, layers, a) for a in actions]
            rewards = self.judge(stage, iteration, plans)
            if c.strategy == "reinforce":
                learner.step(rows, free, actions, rewards)
            bar.advance(c.rollouts, reward=max(e["R"] for e in self.log))

    def _plan(self, stage: str, base: Restructure, layers: Sequence[Layer], actions: Tensor) -> Restructure:
        if stage == "remove":
            return merged(base, Restructure(removed=after_removal(layers, actions), image=self.image))
        return merged(base, Restructure(changed=after_shrinking(layers, actions), image=self.image))

    def judge(self, stage: str, iteration: int, plans: Sequence[Restructure]) -> list[float]:
        """Rewards of the students of `plans`; equal structures are taught once, those that make no network get -1."""
        entries, fresh = [], {}
        for plan in plans:
            entry: dict[str, Any] = {"stage": stage, "iteration": iteration, "invalid": "", "A": 0.0, "C": 0.0}
            key = repr((plan.removed, tuple(sorted(plan.changed))))
            plan = replace(plan, seed=derive(self.config.seed, "student", key) % 2**31)
            entry |= {"plan": plan, "key": key}
            try:
                entry["parameters"] = plan.parameters(self.teacher, plan.planned(self.teacher, self.bones))
                entry["C"] = 1 - entry["parameters"] / self.reward.teacher_size
                if entry["C"] <= 0:
                    raise Invalid(f"{entry['parameters']} parameters are not fewer than the teacher's.")
                if self.ledger.get(key) is None:
                    fresh[key] = plan
            except Invalid as error:
                entry["invalid"], entry["R"] = str(error), -1.0
            entries.append(entry)
        if fresh:
            begin = time.monotonic()
            for key, accuracy in zip(fresh, self.score(list(fresh.values()))):
                self.ledger.put(key, accuracy)
            self.spent += time.monotonic() - begin
            self.taught += len(fresh)
        for entry in entries:
            if not entry["invalid"]:
                entry["A"] = float(self.ledger.get(entry["key"]))
                entry["R"] = self.reward(entry["parameters"], entry["A"], iteration)
        self.log += entries
        return [e["R"] for e in entries]

    def best(self) -> dict[str, Any] | None:
        """The rollout with the highest reward among those that keep the limits (the size alone, if none keeps both)."""
        valid = [e for e in self.log if not e["invalid"]]
        both = [e for e in valid if self.reward.keeps(e["parameters"], e["A"])]
        limit = self.reward.size_limit
        small = [e for e in valid if limit is None or e["parameters"] <= limit]
        at_least = both or sorted(small, key=lambda e: -e["A"])[:1]
        return max(at_least, key=lambda e: e["R"], default=None)

    def narrowest(self, base: Restructure) -> dict[str, Any]:
        """When no rollout was small enough: all widths by one factor, the largest that keeps the limit."""
        sizes = []
        for around in (base, Restructure(image=self.image)):
            network = around(self.teacher) if around.removed or around.changed else self.teacher
            layers = layers_of(network, self.image)
            for factor in (*reversed(FACTORS), 0.125, 0.06, 0.03, 0.0):
                plan = merged(around, Restructure(changed=narrowed(layers, factor), image=self.image))
                self.judge("narrow", 0, [plan])
                last = self.log[-1]
                if not last["invalid"]:
                    sizes.append(last["parameters"])
                    if last["parameters"] <= (self.reward.size_limit or last["parameters"]):
                        self.notes.append(
                            "No rollout kept the size limit; the student is the network with all widths times "
                            f"{factor:g}. More iterations give the policies time to learn the limit."
                        )
                        return last
        if not sizes:
            raise AdviceError(
                f"No smaller student of this network could be built: {self.log[-1]['invalid']} Train longer searches "
                "(iterations, rollouts), or start from another teacher."
            )
        raise AdviceError(
            f"No student with at most {self.reward.size_limit} parameters was found; the smallest has "
            f"{min(sizes)}. Raise size_limit, or start from a narrower teacher."
        )


def _random(free: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Actions as an untrained policy draws them: even chances."""
    if free.ndim == 1:
        return ((torch.rand(count, len(free), generator=draw) < 0.5) | ~free).long()
    drawn = torch.randint(len(FACTORS), (count, *free.shape), generator=draw)
    return torch.where(free, drawn, len(FACTORS) - 1)


def _lessons(teacher: nn.Module, inputs: Tensor, labels: Tensor, config: PolicyConfig) -> Lessons:
    """Splits the images and asks the teacher once."""
    held = round(config.held_out * len(inputs))
    if held < 1 or held >= len(inputs):
        raise AdviceError(f"{len(inputs)} images are too few to hold {config.held_out:.0%} of them out.")
    order = torch.randperm(len(inputs), generator=generator(config.seed, "held out"))
    learn, judge = order[held:], order[:held]
    with torch.no_grad():
        logits = torch.cat([teacher(x) for x in inputs[learn].split(256)])
    return Lessons(
        inputs=inputs[learn],
        logits=logits,
        labels=labels[learn],
        held_inputs=inputs[judge],
        held_labels=labels[judge],
    )


def _opened(policies: Mapping[str, Policy | str | Path], config: PolicyConfig) -> dict[str, Policy]:
    """Policies by stage; files are read."""
    out: dict[str, Policy] = {}
    for stage, policy in policies.items():
        if stage not in ("remove", "shrink"):
            raise AdviceError(f"A policy is for 'remove' or 'shrink', not for {stage!r}.")
        out[stage] = policy if isinstance(policy, nn.Module) else load_policy(policy)
        wanted = RemovalPolicy if stage == "remove" else ShrinkPolicy
        if not isinstance(out[stage], wanted):
            raise AdviceError(f"The policy for {stage!r} is a {wanted.__name__}, not a {type(out[stage]).__name__}.")
    return out


def _report(
    subject: Subject,
    teacher: nn.Module,
    student: nn.Module,
    lessons: Lessons,
    search: Search,
    best: dict[str, Any],
    reward: Reward,
    seconds: float,
) -> Report:
    size = sum(p.numel() for p in student.parameters())
    accuracy = lessons.accuracy(student)
    log, stages = search.log, list(dict.fromkeys(e["stage"] for e in search.log))
    rows = [
        {"network": "teacher", "parameters": reward.teacher_size, "accuracy": reward.teacher_accuracy},
        {"network": "student", "parameters": size, "accuracy": accuracy, "reward": best["R"]},
    ]
    curves = {}
    for stage in stages:
        mine = [e for e in log if e["stage"] == stage]
        valid = [e["R"] for e in mine if not e["invalid"]]
        rows.append(
            {
                "network": f"{stage} search",
                "students": len(mine),
                "different": len({e["key"] for e in mine}),
                "invalid": sum(bool(e["invalid"]) for e in mine),
                "mean reward": float(np.mean([e["R"] for e in mine])),
                "best reward": max(valid, default=-1.0),
            }
        )
        steps = sorted({e["iteration"] for e in mine})
        means = [float(np.mean([e["R"] for e in mine if e["iteration"] == i])) for i in steps]
        curves[stage] = (steps, means)
    valid_log = [e for e in log if not e["invalid"]]
    summary = {
        "parameters": float(size),
        "times smaller": reward.teacher_size / size,
        "accuracy": accuracy,
        "accuracy lost": reward.teacher_accuracy - accuracy,
        "students taught": float(search.taught),
        "seconds per student": search.spent / max(search.taught, 1),
        "seconds": seconds,
    }
    notes = [
        f"Accuracies are on {len(lessons.held_labels)} images held out; the search chose its student by them, so that "
        "images seen by neither say more.",
        *search.notes,
    ]
    if not reward.keeps(size, accuracy):
        notes.append(f"No student keeps the accuracy limit of {reward.accuracy_limit:.1%} after the last training.")
    return Report(
        name=f"a smaller {subject.name}",
        answer=f"{reward.teacher_size / size:.1f} times fewer parameters ({size:,}), "
        f"{accuracy:.1%} right instead of {reward.teacher_accuracy:.1%}.",
        rows=rows,
        summary=summary,
        notes=notes,
        figures={
            "mean reward.plotly": plots.lines(curves, x_title="iteration", y_title="mean reward of its rollouts"),
            "students.plotly": plots.scatter(
                [e["parameters"] for e in valid_log],
                [e["A"] for e in valid_log],
                groups=[e["stage"] for e in valid_log],
                x_title="parameters",
                y_title="accuracy after the short training",
                log_x=True,
                show_labels=False,
            ),
        },
        arrays={
            "rewards": np.array([e["R"] for e in log]),
            "accuracies": np.array([e["A"] for e in log]),
            "compressions": np.array([e["C"] for e in log]),
        },
        environment=environment(search.config.seed),
    )
