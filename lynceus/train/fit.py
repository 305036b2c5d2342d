"""fit: the one loop. A Recipe says what is learned; this file says when, on which device, and survives being killed.

Hugging Face Accelerate places modules, scales half-precision losses and runs several processes (`torchrun`,
`accelerate launch`). Every random number of step s is a function of (seed, s): a resumed run is the unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core import rng
from lynceus.core.config import differences, to_dict
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.nouns import Check, Recipe
from lynceus.core.plots import lines
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.train.checkpoint import exportable, read_state, save_model, write_state
from lynceus.train.ema import Ema
from lynceus.train.feed import Feed, as_map, known_labels, pieces
from lynceus.train.guard import Interrupted as Interrupted
from lynceus.train.guard import memory_advice, not_finite, seed_everything, signals
from lynceus.train.log import Clock, RunFolder, Table
from lynceus.train.optim import SCHEDULES, lr_factor, make_optimizer, set_lr
from lynceus.train.place import accelerator_of


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How long, how fast, on what.

    epochs: passes over the data; or steps: optimiser steps (wins when both are given). 30 epochs when neither is.
    seconds: stops at the first step after that many seconds, over all parts of a resumed run; the schedule stays.
    batch_size: images of one optimiser step, over all processes and accumulated parts together.
    accumulate: parts that each step is computed in; less memory, the same result.
    optimizer: "adamw", "adam", "sgd", "nesterov", or any name of timm's. lr: its peak.
    weight_decay: of weights; biases and norms have none.
    momentum: of SGD and kin. betas: of Adam and kin (0.95 suits runs of minutes, 0.999 long ones).
    schedule: "cosine", "one-cycle", "linear", "step" or "constant". warmup: share of the run.
    final_lr: share of the peak that is left at the end.
    clip: largest norm of the gradient, 0 for no limit.
    precision: "no" (float32), "bf16" or "fp16" (fp16 needs a GPU).
    ema: decay of the averaged weights, e.g. 0.999; 0 for none. Averaged weights are what is evaluated and kept.
    seed: of order, augmentation and dropout. The model is made by the caller, who seeds it.
    workers: processes that read images. device: "auto", "cpu", "cuda", "mps" ...
    channels_last: memory order that convolutions like.
    evaluate_every: epochs between evaluations, 0 for one at the end.
    save_every: steps between checkpoints, 0 for every 30 seconds.
    log_every: steps between rows of log.csv. quiet: no progress.
    """

    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "one-cycle", "linear", "step", "constant"] = "cosine"
    warmup: float = 0.1
    final_lr: float = 0.0
    clip: float = 5.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float = 0.0
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    channels_last: bool = False
    evaluate_every: float = 0.0
    save_every: int = 0
    log_every: int = 10
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.precision not in ("no", "bf16", "fp16"):
            raise unknown("precision", self.precision, ("no", "bf16", "fp16"))
        for name in ("epochs", "steps", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise AdviceError(f"{name} must be above 0, not {value}.")
        for name in ("batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise AdviceError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.lr > 0:
            raise AdviceError(f"lr must be above 0, not {self.lr}; 2e-3 suits AdamW on small networks, 0.1 SGD.")
        if not 0 <= self.warmup < 1:
            raise AdviceError(f"warmup is a share of the run in [0, 1), not {self.warmup}; 5 of 100 epochs are 0.05.")
        if not 0 <= self.ema < 1:
            raise AdviceError(f"ema is a decay in [0, 1), such as 0.999, not {self.ema}.")


# options that change how a run goes, not what comes out
_HARMLESS = frozenset({"workers", "save_every", "log_every", "quiet", "seconds", "device", "evaluate_every"})


def fit(
    recipe: Recipe,
    data: Any,
    *,
    config: FitConfig | None = None,
    evaluate: Check | Callable[[Subject, Any], Any] | None = None,
    held_out: Any = None,
    out: str | Path | None = None,
    resume: bool | Literal["changed"] = False,
) -> Report:
    """Trains `recipe` on `data`; afterwards `recipe.export()` is the trained module (averaged weights if `ema` is on).

    data: a lynceus.data Dataset, any dataset with len and [], or samples.
    evaluate: a Check, or a function (subject, data) -> Report or dict of numbers, run on `held_out` (`data` if there is
      none) every `config.evaluate_every` epochs and at the end; with `held_out`, classification accuracy by default.
    out: the run folder; without one nothing is written.
    resume: goes on from the folder's checkpoint, to the weights that an unbroken run has, bit for bit on a CPU. Another
      configuration or other data is refused, unless resume="changed".
    Returns a Report: numbers, curves, and what the evaluation found. Raises AdviceError for data that cannot be learnt
    from, a loss that is not finite, too little memory; Interrupted (a KeyboardInterrupt) after Ctrl-C.
    """
    config = config or FitConfig()
    data = as_map(data)
    check: Any = getattr(recipe, "check_data", None)
    if check is not None:
        check(data, known_labels(data))
    if evaluate is None and held_out is not None:
        from lynceus.train.evaluate import Evaluate

        evaluate = Evaluate()
    state = rng.capture()
    try:
        with accelerator_of(config.device, config.precision) as accelerator:
            run = _Run(recipe, data, config, accelerator, evaluate, held_out, out, resume)
            return run.go()
    finally:
        rng.restore(state)


class _Run:
    """One call of fit."""

    def __init__(
        self,
        recipe: Recipe,
        data: Any,
        config: FitConfig,
        accelerator: Any,
        evaluate: Any,
        held_out: Any,
        out: Any,
        resume: Any,
    ):
        self.recipe, self.data, self.config, self.accelerator = recipe, data, config, accelerator
        self.evaluate, self.held_out = evaluate, held_out
        self.main = bool(accelerator.is_main_process)
        self.world, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.device: torch.device = accelerator.device
        self.feed = Feed(
            data, recipe, batch=config.batch_size, seed=config.seed, workers=config.workers,
            rank=self.rank, world=self.world, device=self.device,
        )  # fmt: skip
        self.total = config.steps or max(1, round((config.epochs or 30) * self.feed.per_epoch))
        self.folder = RunFolder(out if self.main else None)
        self.out = None if out is None else Path(out)
        self.identity = self._identity()
        self.step, self.best, self.best_step = 0, -float("inf"), 0
        saved = self._saved(resume)
        recipe.to(self.device)
        if config.channels_last:
            recipe.to(memory_format=torch.channels_last)
        self.ema = Ema(recipe, config.ema) if config.ema else None
        groups = [g for g in recipe.param_groups() if g["params"]]
        optimizer = make_optimizer(
            groups,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            betas=config.betas,
        )
        self.parameters = [p for g in groups for p in g["params"]]
        self.model, self.optimizer = accelerator.prepare(recipe, optimizer)
        if accelerator.scaler is None and str(accelerator.distributed_type.value) in ("NO", "MULTI_CPU", "MULTI_GPU"):
            self.optimizer = optimizer  # the wrapper would look for optional packages on disk at every step
        if saved is not None:
            self._restore(saved)
        self.clock = Clock(0.0 if saved is None else float(saved["seconds"]))
        keep = self.step if saved is not None else None
        self.log = Table(self.folder.path("log.csv"), keep_until=keep)
        self.metrics = Table(self.folder.path("metrics.csv"), keep_until=keep)
        self.sums: dict[str, Tensor] = {} if saved is None else {k: v.to(self.device) for k, v in saved["sums"].items()}
        self.stop: str | None = None
        self.last_save, self.last_saved_step = time.monotonic(), -1

    # what the run is ------------------------------------------------------------------------------
    def _identity(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        describe: Any = getattr(self.recipe, "describe", None)
        described = describe() if describe is not None else {"recipe": type(self.recipe).__name__}
        fingerprint = self.data.fingerprint() if hasattr(self.data, "fingerprint") else None
        data = {
            "name": str(getattr(self.data, "name", type(self.data).__name__)),
            "images": len(self.data),
            "fingerprint": fingerprint,
        }
        return {**to_dict(described), "fit": to_dict(self.config), "data": data}

    def _saved(self, resume: bool | str) -> dict[str, Any] | None:
        if self.out is None:
            if resume:
                raise AdviceError(
                    "resume=True needs the folder of the run to resume: fit(..., out='runs/mine', resume=True)."
                )
            return None
        path = self.out / "checkpoints" / "last.pt"
        there = path.is_file()
        self.accelerator.wait_for_everyone()
        if there and not resume:
            raise AdviceError(
                f"{self.out.resolve()} already holds a run. Go on with it: resume=True; or give another `out`, or "
                "delete that folder."
            )
        if not there:
            return None  # killed before its first checkpoint: the same as a new run
        saved = read_state(path)
        changes = [
            line for line in differences(saved["identity"], self.identity)
            if not (line.startswith("fit.") and line.split(":")[0].removeprefix("fit.").split(".")[0] in _HARMLESS)
        ]  # fmt: skip
        if changes and resume != "changed":
            raise AdviceError(
                f"The run in {self.out.resolve()} was started with other options; changed (then -> now): "
                f"{'; '.join(changes)}. "
                "Give it the old ones, start another folder, or insist with resume='changed' (the result is then "
                "no longer that of one unbroken run)."
            )
        return saved

    # one run --------------------------------------------------------------------------------------
    def go(self) -> Report:
        from lynceus.core.report import environment

        self.environment = environment(
            self.config.seed, used_device=self.device, processes=self.world, precision=self.config.precision
        )
        self.folder.describe(self.identity, self.environment)
        config, feed = self.config, self.feed
        every = max(1, round(config.evaluate_every * feed.per_epoch)) if self.evaluate and config.evaluate_every else 0
        first = self.step
        self._train_mode()
        bar = progress(
            "training",
            total=self.total * feed.batch,
            unit="images",
            done=first * feed.batch,
            quiet=config.quiet or not self.main,
        )
        with bar, signals(self), memory_advice(config.batch_size, config.accumulate):
            source = f" in {self.out.resolve()}" if self.out else ""
            if first:
                bar.note(f"resuming at step {first} of {self.total}{source}")
            for batch in feed.batches(first, self.total):
                numbers = self._step(batch)
                if numbers is not None:
                    shown = {k: numbers[k] for k in ("loss", "accuracy") if k in numbers}
                    bar.advance(0, epoch=f"{self.step / feed.per_epoch:.1f}", **shown)
                bar.advance(feed.batch)
                if every and self.step % every == 0 and self.step < self.total:
                    self._evaluate()
                if self._time_to_save():
                    self._save()
                if self.stop is not None:
                    self._interrupted()
                if self._out_of_time():
                    break
            if self.last_saved_step != self.step:
                self._save()
        return self._finish()

    def _step(self, batch: Any) -> dict[str, float] | None:
        """One optimiser step; gives the averaged numbers when a row of the log is due."""
        config, accelerator, step = self.config, self.accelerator, self.step
        lr = config.lr * lr_factor(step, self.total, config.schedule, config.warmup, config.final_lr)
        set_lr(self.optimizer, lr)
        seed_everything(rng.derive(config.seed, "step", step, self.rank))
        if config.channels_last and hasattr(batch, "image"):
            batch.image = batch.image.contiguous(memory_format=torch.channels_last)
        parts = pieces(batch, config.accumulate)
        terms: dict[str, Tensor] = {}
        share, here = self.feed.part(self.feed.batch), sum(count for _, count in parts)
        # gradients are averaged over processes, whose parts of the batch may differ by one image
        scale = (share.stop - share.start) * self.world / self.feed.batch / here
        for i, (part, count) in enumerate(parts):
            weight = count * scale
            last = i == len(parts) - 1
            with nullcontext() if last or self.world == 1 else accelerator.no_sync(self.model):
                losses = self.model(part)
                if not isinstance(losses, dict) or "loss" not in losses:
                    raise AdviceError(
                        f"{type(self.recipe).__name__}.forward must give a dict with 'loss'; it gave {_kind(losses)}."
                    )
                loss = losses["loss"]
                if loss.ndim:
                    raise AdviceError(f"The loss must be one number, not a tensor {tuple(loss.shape)}; take its mean.")
                if (self.device.type == "cpu" or step % config.log_every == 0) and not bool(torch.isfinite(loss)):
                    raise self._diverged({k: v for k, v in losses.items() if isinstance(v, Tensor)}, part, lr)
                accelerator.backward(loss if weight == 1 else loss * weight)
            for name, value in losses.items():
                number = (
                    value.detach().float()
                    if isinstance(value, Tensor)
                    else torch.tensor(float(value), device=self.device)
                )
                if number.ndim == 0:
                    terms[name] = terms.get(name, 0) + number * (count / here)
        if config.clip:
            norm = accelerator.clip_grad_norm_(self.parameters, config.clip)
            if accelerator.scaler is None and self.device.type == "cpu" and not bool(torch.isfinite(norm)):
                raise self._diverged(terms, batch, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.recipe.after_step(self.step, self.total)
        if self.ema is not None:
            self.ema.update(self.step)
        self.clock.images += self.feed.batch
        return self._log(terms, lr)

    def _log(self, terms: dict[str, Tensor], lr: float) -> dict[str, float] | None:
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if self.step % self.config.log_every and self.step != self.total:
            return None
        since = (self.step - 1) % self.config.log_every + 1
        row = {"step": float(self.step), "epoch": self.step / self.feed.per_epoch, "lr": lr}
        names = list(self.sums)
        values = torch.stack([self.sums[n] for n in names])
        if self.world > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        row |= {n: v / since for n, v in zip(names, values.tolist())}
        row |= {"images_per_second": self.clock.rate, "seconds": self.clock.seconds}
        self.sums = {}
        self.log.add(row)
        return row

    # looking at it --------------------------------------------------------------------------------
    def _subject(self) -> Subject:
        model = (self.ema.recipe if self.ema else self.recipe).export()
        return Subject(model, name=getattr(model, "name", None))

    def _evaluate(self, *, final: bool = False) -> Report | None:
        """Runs the evaluation on the main process, logs its numbers and keeps the best predictor."""
        report: Report | None = None
        if self.main and self.evaluate is not None:
            from dataclasses import replace

            from lynceus.train.evaluate import Evaluate

            subject = self._subject()
            seen = self.held_out if self.held_out is not None else self.data
            check = self.evaluate
            if isinstance(check, Evaluate):
                found = (
                    replace(check, quiet=check.quiet or self.config.quiet)
                    if final
                    else replace(check, details=False, quiet=True)
                )(subject, seen, seed=self.config.seed)
            elif hasattr(check, "needs"):
                found = check(subject, seen, seed=self.config.seed)
            else:
                found = check(subject, seen)
            report = (
                found
                if isinstance(found, Report)
                else Report(name="evaluation", summary={k: float(v) for k, v in dict(found or {}).items()})
            )
            self.metrics.add({"step": float(self.step), "epoch": self.step / self.feed.per_epoch, **report.summary})
            score = report.summary.get("accuracy", next(iter(report.summary.values()), -float("inf")))
            if score > self.best:
                self.best, self.best_step = score, self.step
                self._keep("best", subject.model)
        self._train_mode()
        return report

    def _train_mode(self) -> None:
        self.model.train()

    def _keep(self, name: str, model: nn.Module) -> None:
        path = self.folder.path("checkpoints", f"{name}.safetensors")
        if path is not None and exportable(model):
            save_model(model, path)

    def _finish(self) -> Report:
        report = Report(name="training", environment=self.environment)
        found = self._evaluate(final=True)
        if self.ema is not None:
            self.recipe.load_state_dict(self.ema.recipe.state_dict())
        self.recipe.eval()
        if self.main:
            if found is not None:
                report.rows, report.figures, report.arrays = found.rows, dict(found.figures), dict(found.arrays)
                report.notes += found.notes
            _steps, losses = self.log.column("loss")
            report.summary = {
                **(found.summary if found is not None else {}),
                **({"train_loss": losses[-1]} if losses else {}),
                "steps": float(self.step),
                "epochs": self.step / self.feed.per_epoch,
                "seconds": self.clock.seconds,
                "images_per_second": self.clock.rate
                if self.clock.images
                else (self.log.rows or [{}])[-1].get("images_per_second", 0.0),
            }
            if self.best_step and self.best_step != self.step:
                report.summary |= {"best": self.best, "best_step": float(self.best_step)}
                report.notes.append(
                    f"The best evaluation was {self.best:.4g} at step {self.best_step}; it was chosen on the "
                    "evaluated images, so it flatters."
                )
            if self.step < self.total:
                report.notes.append(
                    f"Stopped at step {self.step} of {self.total}: the {self.config.seconds:g} seconds were over."
                )
            if found is None:
                report.notes.append("No held-out images were given, so nothing was measured: fit(..., held_out=...).")
            self._curves(report)
            self._keep("last", self.recipe.export())
            if self.out is not None:
                report.save(self.out)
        self.accelerator.wait_for_everyone()
        return report

    def _curves(self, report: Report) -> None:
        for name in ("loss", "accuracy"):
            series = {
                f"training {name}": self.log.column(name),
                f"held-out {name}": self.metrics.column({"loss": "nll"}.get(name, name)),
            }
            series = {k: v for k, v in series.items() if v[0]}
            if series:
                report.figures[f"{name}.plotly"] = lines(series, x_title="step", y_title=name)
        for table, prefix in ((self.log, "log"), (self.metrics, "metrics")):
            for column in dict.fromkeys(k for r in table.rows for k in r):
                report.arrays[f"{prefix}.{column}"] = np.array([r.get(column, float("nan")) for r in table.rows])

    # surviving ------------------------------------------------------------------------------------
    def _time_to_save(self) -> bool:
        if self.config.save_every:
            return self.step % self.config.save_every == 0
        return time.monotonic() - self.last_save > 30

    def _save(self) -> None:
        self.last_save, self.last_saved_step = time.monotonic(), self.step
        if self.folder.state is None:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise self._diverged({}, None, float("nan"))  # the checkpoint before this one stays
        write_state(
            self.folder.state,
            {
                "identity": self.identity,
                "step": self.step,
                "recipe": self.recipe.state_dict(),
                "ema": None if self.ema is None else self.ema.recipe.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "sums": self.sums,
                "best": self.best,
                "best_step": self.best_step,
                "seconds": self.clock.seconds,
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.best, self.best_step = saved["step"], saved["best"], saved["best_step"]
        self.recipe.load_state_dict(saved["recipe"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.recipe.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _out_of_time(self) -> bool:
        if self.config.seconds is None:
            return False
        late = self.clock.seconds > self.config.seconds
        if self.world > 1:  # all processes stop together
            flag = torch.tensor(float(late), device=self.device)
            late = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        return late

    def _interrupted(self) -> None:
        where = "nothing was saved, since fit had no `out` folder"
        if self.out is not None:
            self._save()
            again = f"fit(..., out={str(self.out)!r}, resume=True), or the same command with --resume"
            where = f"saved in {self.out.resolve()}; go on with {again}"
        raise Interrupted(f"Stopped by {self.stop} after step {self.step} of {self.total}: {where}.")

    def _diverged(self, terms: dict[str, Tensor], batch: Any, lr: float) -> AdviceError:
        config, state = self.config, self.folder.state
        last = f" The last good checkpoint is {state}." if state and state.is_file() else ""
        bf16 = ", precision='bf16'" if config.precision == "fp16" else ""
        return AdviceError(
            f"Training diverged at step {self.step} of {self.total} (epoch {self.step / self.feed.per_epoch:.1f}, "
            f"lr {lr:.3g}): {not_finite(self.recipe, terms, batch)}. Try lr={config.lr / 4:g}, a longer warmup, "
            f"clip=1.0{bf16}, and look at data.check().{last}"
        )


def _kind(value: Any) -> str:
    return f"a dict with {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
