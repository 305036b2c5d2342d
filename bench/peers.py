"""The nets that ours are compared with (timm's, torchvision's, Hugging Face's, the authors'), on equal weights."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lynceus

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}  # timm's ways to take any


class Absent(Exception):
    """This peer cannot be had here; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One comparison. ours: a name of ours. peer: "timm:NAME", "torchvision:NAME", "hf:CLASS" (its default
    configuration) or "authors:NAME" (of bench/authors.py).

    goal: whether it counts in the geometric means. changes: of our configuration. options: of the peer's constructor.
    size: of the pictures instead of --size, for networks that are made for another.
    """

    ours: str
    peer: str
    goal: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None

    @property
    def family(self) -> str:
        from lynceus.backbones._table import variants

        return variants().get(self.ours, "unknown")


class Wrapped(nn.Module):
    """A peer whose output is not the logits: `pick` takes them out. Weights are read from `inner`."""

    def __init__(self, inner: nn.Module, pick: Callable[[Any], Tensor]):
        super().__init__()
        self.inner, self.pick = inner, pick

    def forward(self, image: Tensor) -> Tensor:
        return self.pick(self.inner(image))


def peer_model(name: str, options: Mapping[str, Any], *, any_size: bool = False) -> nn.Module:
    """The peer with fresh weights; Absent when its package or code is not here."""
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        if any_size:
            for extra in (ANY_SIZE, *({k: v} for k, v in ANY_SIZE.items() if k != "dynamic_img_pad")):
                try:
                    return timm.create_model(model, **{**options, **extra})
                except TypeError:
                    continue
        return timm.create_model(model, **options)
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(model, weights=None, **options)
    if library == "hf":
        try:
            import transformers
        except ImportError:
            raise Absent("the package transformers is not installed") from None
        cls = getattr(transformers, model)
        return Wrapped(cls(cls.config_class(num_labels=1000, **options)), lambda out: out.logits)
    if library == "authors":
        from bench.authors import author_model

        return author_model(model, **options)
    raise ValueError(f"There is no library of peers {library!r}: timm, torchvision, hf, authors.")


def fill(model: nn.Module) -> None:
    """Weights and statistics that leave no branch silent (fresh ones have layer scales near 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(1 + 0.1 * noise.abs())
            elif value.ndim >= 2:
                value.copy_(noise * (0.2 if value.shape[0] == 1 else value[0].numel() ** -0.5))
            else:
                value.copy_((1 if name.endswith(("weight", "gamma")) else 0) + 0.1 * noise)


def pair(peer: Peer, workdir: str, *, any_size: bool = False) -> tuple[nn.Module, nn.Module]:
    """Ours and the peer in eval mode with the peer's weights, brought over by a checkpoint file and our name tables.

    Stochastic depth is off in both, so that training steps do equal work."""
    theirs = peer_model(peer.peer, peer.options, any_size=any_size).eval()
    fill(theirs)
    getattr(theirs, "settle", lambda: None)()  # nets whose signal would grow through random weights
    file = f"{workdir}/weights.pt"
    torch.save(getattr(theirs, "inner", theirs).state_dict(), file)
    for module in theirs.modules():
        if "DropPath" in type(module).__name__ and hasattr(module, "drop_prob"):
            vars(module)["drop_prob"] = 0.0
    mine = lynceus.create_model(peer.ours, weights=file, **{"drop_path_rate": 0.0, **peer.changes})
    return mine, theirs


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float,
    least: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times of each function, taken in turn so that a busy machine slows both.

    clock: `time.process_time` counts this process alone, which on one thread is fair on a machine shared with others.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for f in functions.values():
        f()
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, f in functions.items():
            start = clock()
            f()
            times[name].append(clock() - start)
    return times


def median_ratio(times: Mapping[str, list[float]]) -> float:
    """The peer's time over ours, as the median of the turns."""
    return statistics.median(p / o for o, p in zip(times["ours"], times["peer"]))


def forward_of(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(image)

    return run


def step_of(model: nn.Module, image: Tensor, label: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        optimizer.step()

    return run


# memory ---------------------------------------------------------------------------------------------
def peak_memory(peer: Peer, which: int, *, train: bool, batch: int, size: int, threads: int) -> float:
    """MB that one of the two nets (0 ours, 1 the peer) and two of its runs need: its weights, and the highest resident
    size of a fresh child process while they run less its size before, so that kept tables and repacked weights count.
    Linux only."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_memory, args=(send, peer, which, train, batch, size, threads))
    child.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        answer = "the child process was killed, probably for want of memory"
    child.join()
    if isinstance(answer, str):
        raise Absent(answer)
    return float(answer)


def _memory(send: Any, peer: Peer, which: int, train: bool, batch: int, size: int, threads: int) -> None:
    import ctypes
    import gc
    import tempfile

    try:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as workdir:
            both = list(pair(peer, workdir))
        model, both[:] = both[which], []
        image = torch.randn(batch, 3, size, size)
        run = step_of(model, image, torch.arange(batch) % 1000) if train else forward_of(model, image)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the runs take
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest size so far
        before = _status("VmRSS")
        for _ in range(2):
            run()
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        send.send((_status("VmHWM") - before) / 1e3 + weights / 1e6)
    except Exception as error:
        send.send(f"{type(error).__name__}: {str(error)[:200]}")


def _status(key: str) -> int:
    """kB of /proc/self/status."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1])
