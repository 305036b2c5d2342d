"""ResNet beside torchvision and timm at equal weights, its options, folding, and what its card says it learns."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import lynceus
from lynceus.backbones.resnet import VARIANTS, ResNet, ResNetConfig
from lynceus.core.errors import AdviceError
from lynceus.layers import folded
from lynceus.reengineer.keys import resnet as keys

PARITY = Path(__file__).resolve().parents[1] / "parity"
_spec = importlib.util.spec_from_file_location("filling", PARITY / "filling.py")
filling = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(filling)


def fill(model, dtype=torch.float64):
    model.to(dtype).eval()
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(np.asarray(filling.filled(name, tuple(value.shape)))))
    model.load_state_dict(state)
    return model


def image(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.std()


@pytest.mark.parametrize("path", sorted((PARITY / "resnet").glob("*.json")), ids=lambda p: p.stem)
def test_agrees_with_the_authors_record(path):
    record = json.loads(path.read_text())
    model = fill(keys.build(record["config"]))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    x = {k: torch.from_numpy(filling.image(tuple(v["shape"]), v["seed"])) for k, v in record["inputs"].items()}
    out = keys.compare(model, x, record)
    for name, wanted in record["outputs"].items():
        got = filling.fingerprint(out[name].numpy())
        assert got["shape"] == wanted["shape"]
        for key in ("mean", "std", "values"):
            assert np.abs(np.subtract(got[key], wanted[key])).max() <= 1e-6 * wanted["std"], (name, key)


@pytest.mark.parametrize(
    ("block", "layers", "options", "size"),
    [
        ("BasicBlock", (2, 2, 2, 2), {}, (129, 97)),
        ("BasicBlock", (3, 4, 6, 3), {"num_classes": 5}, (64, 64)),
        ("Bottleneck", (1, 2, 2, 2), {"replace_stride_with_dilation": [False, True, True]}, (97, 65)),
        ("Bottleneck", (1, 2, 2, 2), {"replace_stride_with_dilation": [True, True, True]}, (40, 33)),
        ("Bottleneck", (1, 2, 2, 2), {"replace_stride_with_dilation": [False, True, False]}, (65, 64)),
        ("Bottleneck", (2, 1, 2, 1), {"groups": 32, "width_per_group": 4}, (64, 64)),
        ("Bottleneck", (1, 2, 1, 1), {"width_per_group": 128}, (33, 64)),
        ("Bottleneck", (1, 1, 2, 1), {"groups": 4, "width_per_group": 24}, (64, 64)),
    ],
)
def test_every_option_agrees_with_torchvision(block, layers, options, size):
    theirs = fill(torchvision.models.ResNet(getattr(torchvision.models.resnet, block), list(layers), **options))
    ours = keys.build({"block": block, "layers": layers, **options}).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(2, 3, *size)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-12)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for i, m in enumerate(ours.forward_stages(x)):
            y = theirs.get_submodule(f"layer{i + 1}")(y)
            close(m, y, 1e-12)
            stride = ours.stages[i].stride
            assert m.shape == (2, ours.stages[i].channels, -(-size[0] // stride), -(-size[1] // stride))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n in torchvision.models.list_models()])
def test_state_is_torchvisions(name):
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(name, weights=None), ResNet(VARIANTS[name])
    wanted = [(k, v.shape) for k, v in theirs.state_dict().items()]
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == wanted


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_parameter_counts_of_the_card(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(VARIANTS[name]).parameters()) == count


def test_agrees_with_timm():
    theirs = fill(timm.create_model("resnet18"))
    ours = lynceus.create_model("resnet18").double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(1, 3, 97, 64)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-12)
        for a, b in zip(ours.forward_stages(x), theirs.forward_intermediates(x, intermediates_only=True)[1:]):
            close(a, b, 1e-12)


def test_training_step_is_torchvisions():
    theirs = fill(torchvision.models.resnet18(num_classes=5)).train()
    ours = lynceus.create_model("resnet18", num_classes=5).double().train()
    ours.load_state_dict(theirs.state_dict())
    x = image(4, 3, 64, 64)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        close(a.grad, b.grad, 1e-9)
    for a, b in zip(ours.buffers(), theirs.buffers()):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", ["resnet_nano", "resnet50"])
def test_folding_keeps_the_logits(name):
    model = fill(lynceus.create_model(name))
    x = image(2, 3, 65, 64)
    fused = model.fused()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        close(fused(x), model(x), 1e-9)
        last = model.to(memory_format=torch.channels_last)
        close(last(x.contiguous(memory_format=torch.channels_last)), fused(x), 1e-9)
    with pytest.raises(AdviceError, match="eval"):
        model.train().fused()


def test_folds_are_kept_and_made_anew():
    model = fill(lynceus.create_model("resnet_nano"), torch.float32)
    x = image(2, 3, 32, 32, dtype=torch.float32)
    block = model.layer1[0]
    with torch.no_grad():
        model(x)
        if not block.folds.entries:
            pytest.skip("this build of torch has no fused convolutions for this CPU")
        first = block.folds.entries["first"]
        model(x)
        assert block.folds.entries["first"] is first
        block.bn1.running_mean.add_(1)
        model(x)
        assert block.folds.entries["first"] is not first
        model.eval()
        assert not block.folds.entries
        model(x)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = model(x)
        close(model(x), plain, 1e-5)
        block.conv1.weight.data = block.conv1.weight.data * 2
        close(model(x), fill_like(model)(x.double()).float(), 1e-5)
    assert block.conv1.weight.grad is None


def fill_like(model):
    """The same network in float64, where nothing is fused."""
    other = ResNet(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_fold_is_convolution_then_norm():
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, padding=1).double(), nn.BatchNorm2d(6).double()
    fill(nn.Sequential(conv, bn))
    x = image(2, 4, 9, 7)
    kernel, bias = folded.fold(conv, bn)
    close(torch.nn.functional.conv2d(x, kernel, bias, padding=1), bn(conv(x)), 1e-12)


def test_frozen_norms_stand_still():
    model = lynceus.create_model("resnet_nano", num_classes=3)
    model.freeze_bn()
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [t.clone() for m in norms for t in (*m.parameters(), *m.buffers())]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [t for m in norms for t in (*m.parameters(), *m.buffers())]))
    model.freeze_bn(False)
    model(torch.randn(4, 3, 32, 32))
    assert all(m.training for m in norms)
    assert not torch.equal(norms[0].running_mean, before[2])


def test_zero_init_residual_starts_as_identity():
    theirs = torchvision.models.resnet18(zero_init_residual=True)
    ours = ResNet(ResNetConfig(block="basic", depths=(2, 2, 2, 2), zero_init_residual=True))
    zero = [n for n, p in ours.named_parameters() if n.endswith("bn2.weight") and not p.any()]
    assert zero == [n for n, p in theirs.named_parameters() if n.endswith("bn2.weight") and not p.any()]
    assert len(zero) == 8


def test_options_that_contradict_each_other():
    with pytest.raises(AdviceError, match="bottleneck"):
        ResNet(ResNetConfig(block="basic", groups=2))
    with pytest.raises(AdviceError, match="dilate"):
        ResNet(ResNetConfig(dilate=(True,)))


@pytest.mark.slow
def test_learns_cifar10(cifar10_parquet):
    """Card: width 16, CIFAR stem, 10k images, 10 epochs of batch 100, crop and flip: 69.6% measured, 65% required."""
    import io

    import pyarrow.parquet as parquet
    from PIL import Image

    def read(rows):
        columns = table.slice(rows.start, len(rows)).to_pydict()
        label = columns.get("label") or columns["fine_label"]
        pictures = columns.get("img") or columns["image"]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(p["bytes"])).convert("RGB")) for p in pictures])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / 0.25, torch.tensor(label)

    table = parquet.read_table(cifar10_parquet)
    (x, y), (u, v) = read(range(10_000)), read(range(10_000, 12_000))
    torch.manual_seed(0)
    model = lynceus.create_model("resnet18_cifar", width=16, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 701_466
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=10, steps_per_epoch=100)
    for _ in range(10):
        for index in torch.randperm(10_000).split(100):
            batch = torch.nn.functional.pad(x[index], (4, 4, 4, 4))
            top, left = (torch.randint(9, (100,)) for _ in range(2))
            rows = top[:, None, None, None] + torch.arange(32).view(1, 1, 32, 1)
            columns = left[:, None, None, None] + torch.arange(32).view(1, 1, 1, 32)
            columns = torch.where(torch.rand(100, 1, 1, 1) < 0.5, columns, columns.flip(-1))
            batch = batch[torch.arange(100).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), y[index]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = float((model.eval()(u).argmax(1) == v).float().mean())
    print(f"CIFAR-10, 10k images, 10 epochs: {right:.1%}")
    assert right >= 0.65
