"""Probes: what frozen features know, read with the simplest classifiers.

Razavian, Azizpour, Sullivan, Carlsson, "CNN Features off-the-shelf", CVPR 2014 workshops, arXiv 1403.6382 (linear SVM,
jitter, power transform); Goldblum et al., "Battle of the Backbones", NeurIPS 2023, arXiv 2310.19909, code
hsouri/Battle-of-the-Backbones (linear probe, few-shot).

Every probe is a Check: `probe(subject, data, seed=0)`, where data is a labelled data set (divided by class, seeded) or
a pair (train, test); and a function of vectors: `probe.on(train, test, seed=0)` with `Features`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.core.rng import borrowed, derive, generator, numpy_generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.gauntlet.features import Extractor, FeatureBank, Features, batches, split, stratified
from lynceus.gauntlet.scores import average_precision_of_scores, mean_interval, report_scores
from lynceus.gauntlet.views import JITTERED, jittered, random_crops


def unit(vectors: np.ndarray, power: float | None = None) -> np.ndarray:
    """L2-normalised rows; with `power` p the rows then go through sign(x) |x|^p and are normalised again."""
    out = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    if power is None:
        return out
    out = np.sign(out) * np.abs(out) ** power
    return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the probes share. test_fraction: share of every class that is tested on when one data set is given.

    layer: an inner layer by its module name; None reads the pooled vector before the classifier."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "labels"})
    name: ClassVar[str] = "probe"

    test_fraction: float = 0.3
    layer: str | None = None

    def __call__(self, subject: Subject, data: Any, *, seed: int = 0, bank: FeatureBank | None = None) -> Report:
        """bank: shared features; None extracts them for this call alone."""
        subject.require(self.needs)
        bank = bank or FeatureBank()
        train, test = split(data, subject, bank, test_fraction=self.test_fraction, seed=seed, layer=self.layer)
        report = self.on(train, test, seed=seed)
        report.environment = environment(seed=seed, subject=subject.name, layer=self.layer or "pooled")
        return report

    def on(self, train: Features, test: Features, *, seed: int = 0) -> Report:
        """The probe on vectors: trained on `train`, scored on `test`; a row per class, intervals, what was chosen."""
        classes = _classes(train, test)
        scores, chosen = self.scores(train.vectors, np.asarray(train.labels), test.vectors, classes=classes, seed=seed)
        report = report_scores(self.name, scores, np.asarray(test.labels), train.classes, seed=seed)
        return _describe(report, train, test, chosen)

    def scores(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, seed: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """(m, classes) scores of the test vectors, and the hyper-parameters that were chosen on the training side."""
        raise NotImplementedError(f"{type(self).__name__} must write scores")


def _classes(train: Features, test: Features) -> int:
    ours, theirs = np.asarray(train.labels), np.asarray(test.labels)
    if ours.ndim == 2:
        return int(ours.shape[1])
    known = len(train.classes) if train.classes else 0
    return max(known, int(ours.max()) + 1, int(theirs.max()) + 1)


def _describe(report: Report, train: Features, test: Features, chosen: dict[str, float]) -> Report:
    report.summary |= chosen
    report.notes.append(f"{len(train)} training and {len(test)} test vectors of {train.vectors.shape[-1]} numbers.")
    ours, theirs = np.asarray(train.labels), np.asarray(test.labels)
    missing = set(np.unique(theirs)) - set(np.unique(ours)) if theirs.ndim == 1 else set()
    if missing:
        report.notes.append(
            f"{len(missing)} classes of the test set have no training image; the probe cannot name them."
        )
    return report


def _folds(labels: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified (train, validation) index pairs; fewer folds when a class is small, none when it is tiny."""
    from sklearn.model_selection import KFold, StratifiedKFold

    state = derive(seed, "folds") % 2**32
    if labels.ndim == 2:
        return list(KFold(min(folds, len(labels)), shuffle=True, random_state=state).split(labels))
    least = int(np.bincount(labels)[np.unique(labels)].min())
    if least < 2:
        return []
    return list(StratifiedKFold(min(folds, least), shuffle=True, random_state=state).split(labels, labels))


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 2:
        return float(np.nanmean(average_precision_of_scores(scores, labels)))
    return float((scores.argmax(1) == labels).mean())


@dataclass(frozen=True, kw_only=True)
class KNN(Probe):
    """Nearest neighbours by cosine.

    k: neighbours; None chooses among `ks` on a fifth of the training vectors. weighted: votes weigh
    exp(cos / temperature), else one each."""

    name: ClassVar[str] = "kNN"

    k: int | None = None
    ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    weighted: bool = True
    temperature: float = 0.07

    def scores(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, seed: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        k = self.k
        if k is None:
            rest, held = stratified(labels, 0.2, seed=seed, keys=("knn",))
            ks = [v for v in self.ks if v <= len(rest)] or [1]
            votes = self._votes(train[rest], labels[rest], train[held], ks, classes)
            k = ks[int(np.argmax([_accuracy(v, labels[held]) for v in votes]))]
        k = min(k, len(train))
        return self._votes(train, labels, test, [k], classes)[0], {"k": float(k)}

    def _votes(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, ks: list[int], classes: int
    ) -> list[np.ndarray]:
        base, query = (torch.from_numpy(unit(v)) for v in (train, test))
        multi = labels.ndim == 2
        targets = torch.from_numpy(labels).float() if multi else torch.from_numpy(labels).long()
        out: list[list[Tensor]] = [[] for _ in ks]
        for part in query.split(1024):
            cosine, index = (part @ base.T).topk(max(ks), dim=1)
            weight = (cosine / self.temperature).exp() if self.weighted else torch.ones_like(cosine)
            for row, k in zip(out, ks):
                if multi:
                    row.append((weight[:, :k, None] * targets[index[:, :k]]).sum(1))
                else:
                    votes = torch.zeros(len(part), classes)
                    row.append(votes.scatter_add_(1, targets[index[:, :k]], weight[:, :k]))
        return [torch.cat(row).numpy() for row in out]


@dataclass(frozen=True, kw_only=True)
class LinearSVM(Probe):
    """One linear SVM per class on L2-normalised vectors; the highest response wins. C by cross-validation.

    power: p of the signed power transform, followed by L2 again; None leaves it out. loss: "hinge" as in the paper, or
    "squared_hinge". augment: 16 jittered views per picture, all for training, and their responses summed at test time.
    Vectors are centred on the training mean, since liblinear penalises the intercept. Multi-hot labels give a mAP."""

    name: ClassVar[str] = "linear SVM"

    power: float | None = None
    cs: tuple[float, ...] = (0.1, 1.0, 10.0)
    folds: int = 3
    loss: Literal["hinge", "squared_hinge"] = "hinge"
    augment: bool = False
    max_iter: int = 1000

    def __call__(self, subject: Subject, data: Any, *, seed: int = 0, bank: FeatureBank | None = None) -> Report:
        report = super().__call__(subject, data, seed=seed, bank=None if self.augment and bank is None else bank)
        if not self.augment:
            return report
        bank = bank or FeatureBank()
        parts = divided(data, self.test_fraction, seed)
        train, test = (jittered_features(bank.extractor(subject, layer=self.layer), part) for part in parts)
        jitter = self.on(train, test, seed=seed)
        jitter.environment = report.environment
        jitter.summary["accuracy without views"] = report.summary["accuracy"]
        return jitter

    def scores(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, seed: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """train, test: (n, c), or (n, v, c) with v views whose responses are summed."""
        train, test = (unit(v, self.power) for v in (train, test))
        folds = _folds(labels, self.folds, seed) if len(self.cs) > 1 else []
        if folds:
            value = [
                np.mean(
                    [_accuracy(self._fit(train[a], labels[a], train[b], c, classes, seed), labels[b]) for a, b in folds]
                )
                for c in self.cs
            ]
            c = self.cs[int(np.argmax(value))]
        else:
            c = self.cs[len(self.cs) // 2]
        return self._fit(train, labels, test, c, classes, seed), {"C": c}

    def _fit(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, c: float, classes: int, seed: int
    ) -> np.ndarray:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        views = train.shape[1] if train.ndim == 3 else 1
        flat, repeated = train.reshape(-1, train.shape[-1]), np.repeat(labels, views, axis=0)
        centre = flat.mean(0)
        flat, test = flat - centre, test - centre
        present = np.unique(labels) if labels.ndim == 1 else np.flatnonzero((labels > 0).any(0) & (labels <= 0).any(0))
        out = np.full((*test.shape[:-1], classes), -1e3)
        for k in present:
            svm = LinearSVC(
                C=c,
                loss=self.loss,
                dual=self.loss == "hinge" or len(flat) < flat.shape[1],
                max_iter=self.max_iter,
                tol=1e-3,
                random_state=derive(seed, "svm", int(k)) % 2**32,
            )
            wanted = repeated == k if labels.ndim == 1 else repeated[:, k] > 0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # large C need not converge to be compared
                svm.fit(flat, wanted)
            out[..., k] = test @ svm.coef_[0] + svm.intercept_[0]
        return out.sum(1) if out.ndim == 3 else out


def divided(data: Any, test_fraction: float, seed: int) -> tuple[Any, Any]:
    """The pictures of train and test, divided as `split` divides their features."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], Sample):
        return data[0], data[1]
    samples = [s for chunk in batches(data, 256) for s in chunk if s.label is not None]
    labels = [s.label for s in samples if s.label is not None]
    multi = any(isinstance(v, Tensor) and v.ndim for v in labels)
    values = np.stack([np.asarray(v) for v in labels]) if multi else np.array([int(v) for v in labels])
    rest, taken = stratified(values, test_fraction, seed=seed)
    return [samples[i] for i in rest], [samples[i] for i in taken]


def jittered_features(extractor: Extractor, data: Any) -> Features:
    """Vectors (n, 16, c) of the 16 views of every picture, and the labels."""
    plain = extractor.of(data)
    vectors = []
    for samples in batches(data, max(extractor.batch_size // 4, 1)):
        views = [jittered(as_float(s.image)[None])[0] for s in samples]
        if len({v.shape for v in views}) == 1:
            out = extractor(torch.stack(views).flatten(0, 1))
        else:
            out = extractor([v for picture in views for v in picture])
        vectors.append(out.view(len(samples), JITTERED, -1).numpy())
    return dataclasses.replace(plain, vectors=np.concatenate(vectors))


@dataclass(frozen=True, kw_only=True)
class Logistic(Probe):
    """Multinomial logistic regression (L-BFGS) with C by cross-validation, on standardised or L2-normalised vectors."""

    name: ClassVar[str] = "logistic"

    cs: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    folds: int = 3
    prepare: Literal["standard", "l2"] = "standard"
    max_iter: int = 300

    def scores(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, seed: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        if labels.ndim == 2:
            raise AdviceError("Logistic takes one class per image; for multi-hot labels use LinearSVM.")
        if self.prepare == "l2":
            train, test = unit(train), unit(test)
        else:
            mean, scale = train.mean(0), train.std(0) + 1e-6
            train, test = (train - mean) / scale, (test - mean) / scale
        folds = _folds(labels, self.folds, seed) if len(self.cs) > 1 else []
        c = self.cs[len(self.cs) // 2]
        if folds:
            value = [
                np.mean([_accuracy(self._fit(train[a], labels[a], train[b], c, classes), labels[b]) for a, b in folds])
                for c in self.cs
            ]
            c = self.cs[int(np.argmax(value))]
        return self._fit(train, labels, test, c, classes), {"C": c}

    def _fit(self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, c: float, classes: int) -> np.ndarray:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c, max_iter=self.max_iter).fit(train, labels)
        out = np.full((len(test), classes), -1e9)
        seen = model.decision_function(test)
        out[:, model.classes_] = np.stack([-seen, seen], 1) / 2 if seen.ndim == 1 else seen
        return out


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Probe):
    """Batch norm without affine parameters (eps 1e-6) and a linear layer: features of any scale are read fairly.

    optimizer: "lbfgs" solves the convex problem, its L2 penalty chosen among `l2` on a fifth of the training vectors;
    "lars" is the paper's protocol: rate `lr` x batch / 256, no weight decay, `epochs`, `warmup` of them rising, cosine.
    On few images 90 epochs of LARS are few updates; the report says how many. lr: of several values the best on the
    held-out fifth. views: random resized, mirrored crops per training picture, one drawn per epoch, as in the protocol;
    0 trains on the pictures as they are, whose features are shared with the other probes."""

    name: ClassVar[str] = "linear probe"

    optimizer: Literal["lbfgs", "lars"] = "lbfgs"
    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    lr: tuple[float, ...] = (0.1,)
    batch_size: int = 256
    epochs: int = 90
    warmup: int = 10
    views: int = 0

    def __call__(self, subject: Subject, data: Any, *, seed: int = 0, bank: FeatureBank | None = None) -> Report:
        if not self.views:
            return super().__call__(subject, data, seed=seed, bank=bank)
        subject.require(self.needs)
        bank = bank or FeatureBank()
        extractor = bank.extractor(subject, layer=self.layer)
        train_part, test_part = divided(data, self.test_fraction, seed)
        train, test = extractor.of(train_part), extractor.of(test_part)
        draw, stacks = generator(seed, "views"), []
        for samples in batches(train_part, 256):
            crops = [[random_crops(as_float(s.image)[None], draw)[0] for s in samples] for _ in range(self.views)]
            stacks.append(torch.stack([extractor(c) for c in crops], 1).numpy())
        vectors = np.concatenate([train.vectors[:, None], np.concatenate(stacks)], 1)
        report = self.on(dataclasses.replace(train, vectors=vectors), test, seed=seed)
        report.environment = environment(seed=seed, subject=subject.name, layer=self.layer or "pooled")
        return report

    def scores(
        self, train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, seed: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """train: (n, c), or (n, v, c) with v views; the first is the picture itself."""
        if labels.ndim == 2:
            raise AdviceError("LinearProbe takes one class per image; for multi-hot labels use LinearSVM.")
        x, y = (
            torch.from_numpy(np.atleast_3d(train).reshape(len(train), -1, train.shape[-1])),
            torch.from_numpy(labels).long(),
        )
        fit = self._lbfgs if self.optimizer == "lbfgs" else self._lars
        options, key = (self.l2, "l2") if self.optimizer == "lbfgs" else (self.lr, "lr")
        value = options[0]
        if len(options) > 1:
            rest, held = stratified(labels, 0.2, seed=seed, keys=("linear",))
            score = [_accuracy(fit(x[rest], y[rest], classes, v, seed)(x[held, 0]), labels[held]) for v in options]
            value = options[int(np.argmax(score))]
        chosen = {key: value}
        if self.optimizer == "lars":
            chosen["updates"] = float(self.epochs * -(-len(x) // self.batch_size))
        return fit(x, y, classes, value, seed)(torch.from_numpy(test)), chosen

    def _lbfgs(self, x: Tensor, y: Tensor, classes: int, l2: float, seed: int) -> Any:
        flat = x.flatten(0, 1)
        mean, scale = flat.mean(0), (flat.var(0, unbiased=False) + 1e-6).sqrt()
        z, target = (flat - mean) / scale, y.repeat_interleave(x.shape[1])
        weight = torch.zeros(classes, z.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(z @ weight.T + bias, target) + l2 / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return lambda t: ((t - mean) / scale @ weight.detach().T + bias.detach()).numpy()

    def _lars(self, x: Tensor, y: Tensor, classes: int, lr: float, seed: int) -> Any:
        with borrowed(seed, "linear probe"):
            linear = nn.Linear(x.shape[-1], classes)
            nn.init.trunc_normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        probe = nn.Sequential(nn.BatchNorm1d(x.shape[-1], affine=False, eps=1e-6), linear)
        size, draw = min(self.batch_size, len(x)), generator(seed, "probe batches")
        per_epoch = -(-len(x) // size)
        peak, warm, total = lr * size / 256, self.warmup * per_epoch, self.epochs * per_epoch
        momentum = [torch.zeros_like(p) for p in probe.parameters()]
        step = 0
        with torch.enable_grad():
            for _ in range(self.epochs):
                order = torch.randperm(len(x), generator=draw)
                view = torch.randint(x.shape[1], (len(x),), generator=draw)
                for index in order.split(size):
                    if len(index) < 2:  # batch norm needs two
                        continue
                    part = min(step / max(warm, 1), 1.0)
                    rate = peak * part
                    if step >= warm:
                        rate = peak * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(total - warm, 1)))
                    probe.zero_grad()
                    F.cross_entropy(probe(x[index, view[index]]), y[index]).backward()
                    _lars_step(list(probe.parameters()), momentum, rate)
                    step += 1
        probe.eval()

        def predict(t: Tensor) -> np.ndarray:
            with torch.no_grad():
                return probe(t).numpy()

        return predict


@torch.no_grad()
def _lars_step(parameters: list[Tensor], momentum: list[Tensor], lr: float, trust: float = 0.001) -> None:
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv 1708.03888); biases are not scaled."""
    for p, m in zip(parameters, momentum):
        assert p.grad is not None
        step = p.grad
        if p.ndim > 1:
            size, slope = p.norm(), step.norm()
            step = step * torch.where((size > 0) & (slope > 0), trust * size / slope.clamp(min=1e-12), 1.0)
        m.mul_(0.9).add_(step)
        p.sub_(lr * m)


@dataclass(frozen=True, kw_only=True)
class FewShot(Probe):
    """n labelled images per class: mean accuracy over `episodes` random draws, with a 95% interval.

    method: "centroid" (nearest class mean of unit vectors) or "logistic" (L2-penalised, on unit vectors)."""

    name: ClassVar[str] = "few-shot"

    shots: tuple[int, ...] = (1, 5, 10)
    episodes: int = 20
    method: Literal["centroid", "logistic"] = "centroid"
    c: float = 10.0

    def on(self, train: Features, test: Features, *, seed: int = 0) -> Report:
        labels, wanted = np.asarray(train.labels), np.asarray(test.labels)
        if labels.ndim == 2:
            raise AdviceError("FewShot takes one class per image, not multi-hot labels.")
        base, query = unit(train.vectors), unit(test.vectors)
        names = np.unique(labels)
        report = Report(name=self.name, environment=environment(seed=seed))
        for shots in self.shots:
            if np.bincount(labels)[names].min() < shots:
                report.notes.append(f"{shots} shots were left out: a class has fewer training images.")
                continue
            found = []
            for episode in range(self.episodes):
                rng = numpy_generator(seed, "few-shot", shots, episode)
                pick = np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:shots] for k in names])
                found.append(float((names[self._guess(base[pick], labels[pick], query)] == wanted).mean()))
            mean, low, high = mean_interval(np.array(found))
            report.rows.append(
                {
                    "shots": shots,
                    "accuracy": mean,
                    "low": low,
                    "high": high,
                    "episodes": self.episodes,
                    "classes": len(names),
                }
            )
            report.summary[f"accuracy, {shots} per class"] = mean
        if not report.rows:
            raise AdviceError(
                f"No class has {min(self.shots)} training images, the smallest number of shots asked for."
            )
        report.summary["accuracy"] = report.rows[-1]["accuracy"]
        return _describe(report, train, test, {})

    def _guess(self, base: np.ndarray, labels: np.ndarray, query: np.ndarray) -> np.ndarray:
        names, index = np.unique(labels, return_inverse=True)
        if self.method == "centroid":
            means = np.stack([base[index == k].mean(0) for k in range(len(names))])
            return (query @ unit(means).T).argmax(1)
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=self.c, max_iter=200).fit(base, index).predict(query)
