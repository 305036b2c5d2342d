"""Deltas: small files that make task models of one untouched base, in any process, and of no other base."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.nouns import chain
from lynceus.rewrite.adapters import Adapt, ApplyDelta, Delta, Fuse, PruneChannels, apply_delta, delta
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def predictor(name="resnet_nano", seed=0, classes=5):
    torch.manual_seed(seed)
    return Classify(num_classes=classes).build(lynceus.create_model(name)).eval()


def task_model(base, seed, adapter=None, ratio=0.6):
    """Adapted, learned (here: at random, statistics of norms included), pruned."""
    made = (adapter or Adapt(rank=4))(base)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw)
        for n, b in made.named_buffers():
            if n.endswith("running_var"):
                b += torch.rand(b.shape, generator=draw)
    return PruneChannels(ratio=ratio)(made, X) if ratio else made


@pytest.mark.parametrize("name", ["resnet_nano", "vit_nano"])
def test_two_deltas_on_one_base(name, tmp_path):
    base = predictor(name)
    before = {n: v.clone() for n, v in base.state_dict().items()}
    models = [task_model(base, s, Adapt(rank=2)) for s in (1, 2)]
    files = [delta(m).save(tmp_path / f"{k}.safetensors") for k, m in enumerate(models)]
    for model, file in zip(models, files):
        again = apply_delta(base, Delta.load(file))
        fused = Fuse()(model)
        assert torch.equal(again(X), fused(X))
        assert {n: v.shape for n, v in again.state_dict().items()} == {
            n: v.shape for n, v in fused.state_dict().items()
        }
        assert all(torch.equal(v, fused.state_dict()[n]) for n, v in again.state_dict().items())
        assert file.stat().st_size < 0.7 * sum(4 * p.numel() for p in fused.parameters())
    assert not torch.equal(models[0](X), models[1](X))
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())


def test_what_is_left_is_what_is_counted():
    """r (|I| + |O|) + |O| numbers per layer, of the pruned sizes."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
    x = torch.rand(2, 3, 4, 4)
    small = PruneChannels(ratio=0.5)(Adapt(rank=2)(base), x)
    a, b = small[1].out_features, small[3].out_features
    assert a + b == 16
    change = delta(small)
    assert change.parameters == 2 * (48 + a) + a + 2 * (a + b) + b + 2 * (b + 5) + 5
    bits = [v for n, v in change.state.items() if n.startswith("mask.")]
    assert sum(v.numel() for v in bits) == 3 + 2  # 20 and 12 bits
    assert torch.equal(apply_delta(base, change)(x), Fuse()(small)(x))


@pytest.mark.parametrize(
    "adapter", [Adapt(kind="sppara"), Adapt(kind="splopa", prototypes=4, block=(8, 8)), Adapt(rank=0.1)]
)
def test_all_kinds(adapter, tmp_path):
    base = predictor("vit_nano") if adapter.kind == "splopa" else predictor()
    model = task_model(base, 3, adapter, ratio=0.0 if adapter.kind == "splopa" else 0.5)
    if adapter.kind == "splopa":
        keep = torch.rand(36, 12, generator=torch.Generator().manual_seed(0)) < 0.3
        model.backbone.blocks[0].attn.qkv.prune_blocks(keep)
    change = delta(model)
    if adapter.kind == "splopa":
        held = change.state["backbone.blocks.0.attn.qkv.adapter.pos_weights"]
        assert held.shape == (4, int(keep.sum()))
    again = apply_delta(base, Delta.load(change.save(tmp_path)))
    assert torch.equal(again(X), Fuse()(model)(X))
    assert torch.equal(apply_delta(base, change, fused=False)(X), model(X))


def test_a_task_of_other_classes_brings_its_classifier(tmp_path):
    base = predictor(classes=5)
    from lynceus.recipes.specialise import for_classes

    class Data:
        classes = ("a", "b", "c")

    start, fresh = for_classes(base, Data())
    assert fresh
    model = task_model(start, 4, Adapt(rank=2, full=r"^backbone\.fc$"))
    again = apply_delta(base, delta(model))
    assert again.classes == ["a", "b", "c"]
    assert torch.equal(again(X), Fuse()(model)(X))
    save_model(again, tmp_path)
    assert torch.equal(load_model(tmp_path)(X), again(X))
    assert torch.equal(apply_delta(base.backbone, delta(model))(X), again(X))


def test_a_fresh_process_by_names_only(tmp_path):
    base = predictor()
    model = task_model(base, 5)
    save_model(base, tmp_path / "base")
    delta(model).save(tmp_path / "d.safetensors")
    torch.save((X, Fuse()(model)(X)), tmp_path / "want.pt")
    code = """
import sys, torch
from lynceus.rewrite.adapters import Delta, apply_delta
from lynceus.train.checkpoint import load_model
x, want = torch.load(sys.argv[1] + "/want.pt", weights_only=True)
made = apply_delta(load_model(sys.argv[1] + "/base"), Delta.load(sys.argv[1] + "/d.safetensors"))
sys.exit(0 if torch.equal(made(x), want) else 3)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    assert ran.returncode == 0


def test_as_a_rewrite_it_saves_without_its_file(tmp_path):
    base = predictor()
    model = task_model(base, 6)
    file = delta(model).save(tmp_path / "d.safetensors")
    made = ApplyDelta(delta=file)(base, X)
    save_model(made, tmp_path / "made")
    file.unlink()
    assert torch.equal(load_model(tmp_path / "made")(X), made(X))
    again = chain(PruneChannels(ratio=0.3))(made, X)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in made.parameters())


# what is refused ----------------------------------------------------------------------------------
def test_another_base_is_refused():
    change = delta(task_model(predictor(), 7))
    with pytest.raises(AdviceError, match=r"belongs to another base: its digest is .* Give apply_delta the model"):
        apply_delta(predictor(seed=1), change)
    with pytest.raises(AdviceError):
        apply_delta(predictor("vit_nano"), change)
    near = predictor()
    with torch.no_grad():
        near.backbone.conv1.weight[0, 0, 0, 0] += 1e-4
    with pytest.raises(AdviceError, match="another base"):
        apply_delta(near, change)


def test_no_delta_without_adapters(tmp_path):
    base = predictor()
    with pytest.raises(AdviceError, match="was not adapted by Adapt"):
        delta(base)
    with pytest.raises(AdviceError, match=r"was not adapted by Adapt|came after the adapters"):
        delta(Fuse()(task_model(base, 8)))
    with pytest.raises(MissingError, match="There is no delta at"):
        Delta.load(tmp_path / "nowhere.safetensors")
    save_model(base, tmp_path / "m.safetensors")
    with pytest.raises(AdviceError, match="is no delta"):
        Delta.load(tmp_path / "m.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(AdviceError, match=r"not a whole \.safetensors"):
        Delta.load(tmp_path / "half.safetensors")


def test_a_damaged_delta_is_told(tmp_path):
    base = predictor()
    whole = delta(task_model(base, 1, Adapt(rank=2)))
    lost = next(n for n in whole.state if n.endswith("adapter.cols"))
    without = {n: v for n, v in whole.state.items() if n != lost}
    with pytest.raises(AdviceError, match=lost):
        apply_delta(base, Delta(state=without, about=whole.about))
    for change, said in (
        (Delta(state={n: v for n, v in whole.state.items() if n != "mask.0"}, about=whole.about), r"lacks mask\.0"),
        (Delta(state=whole.state, about={"format": 1}), "lacks adapt"),
        (Delta(state=whole.state, about={**whole.about, "format": "one"}), "damaged"),
    ):
        with pytest.raises(AdviceError, match=said):
            Delta.load(change.save(tmp_path))
    noise = {"about": torch.arange(9, dtype=torch.uint8)}
    save_file(noise, tmp_path / "noise.safetensors", metadata={"format": "lynceus-delta"})
    with pytest.raises(AdviceError, match="damaged"):
        Delta.load(tmp_path / "noise.safetensors")
    file = whole.save(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdviceError, match="not a whole"):
        Delta.load(file)
