"""The sheet of swaps: any family that lists its mixers takes any mixer of the table; both join by being listed."""

import pytest
import torch
from torch import nn

import lynceus
from lynceus.layers.mixers import MIXERS
from lynceus.rewrite.swap import Swap
from lynceus.train.checkpoint import load_model, save_model

NANOS = lynceus.list_models("*nano*")
FAMILIES = [n for n in NANOS if lynceus.create_model(n, num_classes=2).mixer_sites()]
SIZES = [(37, 53), (64, 32), (5, 3), (1, 1)]
# ConvNeXt's mixers read maps that no norm has been on: their cells are so far apart that the Gaussian kernel of
# softmax-free attention is the identity, to 25 digits, and its queries learn nothing
FAINT = {("convnext_nano", "softmax_free")}


def often(name: str, mixer: str) -> bool:
    """The pairs of every run: each family with the two mixers that most want it, and each mixer in a ViT."""
    return mixer in ("attention", "hyena") or name in ("vit_nano", "swin_nano")


PAIRS = [
    pytest.param(name, mixer, id=f"{name}-{mixer}", marks=() if often(name, mixer) else pytest.mark.slow)
    for name in FAMILIES
    for mixer in MIXERS
]


def enliven(model: nn.Module) -> None:
    """Branches that start at nothing, and biases at 0, would hide a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if name.endswith("fc1.bias"):
                p.abs_()  # a gate of four units may be dead otherwise
            if "gamma" in name:
                p.fill_(0.5)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("name", "mixer"), PAIRS)
def test_any_mixer_in_any_family(name, mixer, tmp_path):
    torch.manual_seed(0)
    model = lynceus.create_model(name, num_classes=4, drop_path_rate=0.0)
    made = Swap(mixer=mixer, blocks=(0, -1))(model)
    # what is not swapped keeps its weights
    sites = made.mixer_sites()
    paths = [sites[0].path, sites[-1].path]
    old = model.state_dict()
    outside = [k for k in made.state_dict() if not k.startswith(tuple(f"{p}." for p in paths))]
    assert outside
    assert all(torch.equal(made.state_dict()[k], old[k]) for k in outside)
    enliven(made)
    # any size
    with torch.no_grad():
        for size in SIZES:
            out = made(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)))
            assert out.shape == (2, 4)
            assert torch.isfinite(out).all()
        # what is written is what is read
        save_model(made, tmp_path)
        again, x = load_model(tmp_path), torch.randn(2, 3, 40, 40)
        assert torch.allclose(again(x), made(x), atol=1e-5 * float(made(x).std()))
    # it learns, the new mixers included
    made.train()
    side = max(32, 2 * made.stages[-1].stride)  # more than one cell at every mixer
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(2))
    label = torch.arange(8) % 4
    loss = nn.functional.cross_entropy(logits(made, x), label)
    loss.backward()
    for path in paths:
        for n, p in made.get_submodule(path).named_parameters():
            assert p.grad is not None, n
            assert torch.isfinite(p.grad).all(), n
            assert p.grad.abs().sum() > 0 or (name, mixer) in FAINT, n
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    steepness = sum(g.square().sum() for g in grads)
    with torch.no_grad():
        for p in made.parameters():
            if p.grad is not None:
                p -= 0.02 * loss / steepness * p.grad  # 2 % less, if the loss were a plane
    assert nn.functional.cross_entropy(logits(made, x), label) < loss
