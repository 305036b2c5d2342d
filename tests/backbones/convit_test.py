"""ConViT: counts, timm's weights, odd options, the late class token, rectangles, digits, and what it learns to see."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import lynceus
import lynceus.data
from lynceus import FitConfig, fit
from lynceus.backbones.convit import VARIANTS, ConViT, ConViTConfig
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.attention import Attention
from lynceus.layers.gated_position import GatedPositionAttention
from lynceus.layers.position import resize_position, sincos_table
from lynceus.recipes.supervised import Supervised
from lynceus.reengineer.keys import convit as keys
from lynceus.tasks.classify import Classify
from lynceus.train.optim import param_groups

MICRO = ConViTConfig(image_size=(16, 16), patch_size=2, dim=48, depth=4, heads=4, local_layers=3, num_classes=10)
FACTS = {"convit_tiny": 5_710_512, "convit_small": 27_777_322, "convit_base": 86_540_040}


def on_meta(config):
    with torch.device("meta"):
        return ConViT(config).eval()


def filled(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(z * 0.2 if p.shape[0] == 1 else z / p[0].numel() ** 0.5)
            else:
                p.copy_((1 if n.endswith("weight") else 0) + 0.1 * z)
    return model


@pytest.mark.parametrize("name", FACTS)
def test_parameters(name):
    assert sum(p.numel() for p in on_meta(VARIANTS[name]).parameters()) == FACTS[name]


def test_macs_are_those_of_the_formula():
    """Linear layers and two products per attention; position costs a few per cent of the second."""
    macs = cost(on_meta(VARIANTS["convit_tiny"]), torch.empty(1, 3, 224, 224, device="meta")).macs
    n, d = 196, 192
    want = n * d * 768 + 12 * (12 * n * d * d + 2 * n * n * d) + 1000 * d
    assert macs == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("size", [32, 48])
def test_timm_weights_give_timm_logits(size):
    options = {"patch_size": 8, "num_classes": 7, "depth": 4, "local_up_to_layer": 2}
    peer = filled(timm.create_model("convit_tiny", img_size=size, **options)).double().eval()
    for m in peer.modules():
        if hasattr(m, "get_rel_indices"):
            m.rel_indices = m.get_rel_indices((size // 8) ** 2)
    ours = lynceus.create_model(
        "convit_tiny", image_size=(size, size), patch_size=8, num_classes=7, depth=4, local_layers=2
    ).double()
    ours.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x) - peer(x)).abs().max() / peer(x).std() < 1e-9


def test_the_generic_init_leaves_the_local_one():
    model = ConViT(MICRO)
    for i, block in enumerate(model.blocks):
        assert isinstance(block.attn, GatedPositionAttention if i < 3 else Attention)
    for block in model.blocks[:3]:
        assert torch.equal(block.attn.v.weight, torch.eye(48))
        assert torch.equal(block.attn.pos_proj.weight[:, 2], -torch.ones(4))
    assert ConViT(ConViTConfig(dim=48, depth=1, heads=4, locality=3.0)).blocks[0].attn.pos_proj.weight[0, 2] == -3


def test_init_from_scratch_keeps_the_local_start():
    """Xavier and sines where "small" has normals of 0.02; values, offsets and the classifier start as there."""
    torch.manual_seed(0)
    small, scratch = ConViT(MICRO), ConViT(replace(MICRO, init="scratch"))
    for a, b in zip(small.blocks[:3], scratch.blocks[:3]):
        assert torch.equal(b.attn.v.weight, torch.eye(48))
        assert torch.equal(a.attn.pos_proj.weight, b.attn.pos_proj.weight)
        assert b.attn.qk.weight.std() > 4 * a.attn.qk.weight.std()
    assert scratch.head.weight.std() < 0.03
    assert (scratch.pos_embed - sincos_table(8, 8, 48)).abs().max() < 0.15
    odd = ConViT(replace(MICRO, heads=6, init="scratch"))  # two heads beyond the square of offsets
    assert odd.blocks[0].attn.pos_proj.weight[4:].abs().max() < 0.15


def test_the_class_token_joins_late():
    model = ConViT(MICRO).eval()
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        _, found = model.run(x, range(4))
        assert [tuple(f.shape) for f in found] == [(2, 8, 12, 48)] * 3 + [(2, 97, 48)]
        assert model.forward_features(x).shape == (2, 97, 48)
        before = model.forward_stages(x)[:3]
        model.cls_token.add_(1.0)
        after = model.forward_stages(x)
        assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("local", [0, 4, 9])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_no_or_only_local_layers(local, pool):
    model = ConViT(
        ConViTConfig(image_size=(8, 8), patch_size=2, dim=16, depth=4, heads=4, local_layers=local, pool=pool)
    )
    x = torch.randn(2, 3, 8, 8)
    tokens = model.eval().forward_features(x)
    assert tokens.shape[1] == 16 + (local == 0)
    patches = tokens[:, int(local == 0) :]
    want = tokens[:, 0] if pool == "token" else patches.mean(1)
    assert torch.allclose(model.pool(tokens), want)


def test_square_tables_follow_rectangles():
    """A picture of another shape runs at its own grid, and equals the model built for that shape with its table."""
    torch.manual_seed(0)
    model = ConViT(MICRO).double().eval()
    x = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    built = ConViT(replace(MICRO, image_size=(12, 20)))
    state = model.state_dict()
    built.load_state_dict({k: v for k, v in state.items() if k != "pos_embed"}, strict=False)
    with torch.no_grad():
        built.pos_embed.copy_(resize_position(state["pos_embed"], (8, 8), (6, 10)))
        assert (built.double().eval()(x) - model(x)).abs().max() < 1e-6


def test_decay_spares_tokens_tables_gates():
    model = ConViT(MICRO)
    bare = {id(p) for g in param_groups(model) if g.get("weight_decay") == 0.0 for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in bare}
    assert {"cls_token", "pos_embed", "blocks.0.attn.gating_param", "blocks.0.attn.pos_proj.bias"} <= names
    assert "blocks.0.attn.pos_proj.weight" not in names


def test_sites_of_mixers():
    model = ConViT(MICRO)
    sites = model.mixer_sites()
    assert [s.call for s in sites] == ["map", "map", "map", "tokens"]
    assert sites[3].extra == 1
    assert all(isinstance(model.get_submodule(s.path), nn.Module) for s in sites)


def test_mistakes_are_explained():
    with pytest.raises(AdviceError, match="avg"):
        ConViTConfig(pool="mean")
    with pytest.raises(AdviceError, match="scratch"):
        ConViTConfig(init="xavier")
    with pytest.raises(AdviceError, match="local_layers"):
        ConViTConfig(local_layers=-1)
    with pytest.raises(AdviceError, match="levels"):
        ConViT(ConViTConfig(depth=2, levels=(5,)))


def learn_digits(model, size, *, epochs, seed=0, evaluate=None):
    data = lynceus.data.open("digits", size=size)
    train, test = data.train_test(0.25)
    recipe = Supervised(Classify(num_classes=10), model)
    config = FitConfig(epochs=epochs, lr=2e-3, batch_size=64, schedule="one-cycle", seed=seed, quiet=True)
    return fit(recipe, train, held_out=test, config=config, evaluate=evaluate), recipe


@pytest.mark.slow
def test_learns_the_digits_and_moves_its_gates():
    torch.manual_seed(0)
    model = ConViT(MICRO)
    report, _ = learn_digits(model, 16, epochs=30)
    assert report.summary["accuracy"] >= 0.95
    gates = torch.stack([block.attn.gating_param.detach() for block in model.blocks[:3]])
    assert (gates - 1).abs().max() > 0.02


@pytest.mark.slow
def test_nano_learns_the_digits():
    """98.7% and 98.9% measured with seeds 0 and 1."""
    torch.manual_seed(0)
    report, _ = learn_digits(lynceus.create_model("convit_nano", num_classes=10).train(), 32, epochs=15)
    assert report.summary["accuracy"] >= 0.97


def test_records_of_the_attention_alone_are_rebuilt():
    """By its own constructor names; a square number of tokens is a square map."""
    layer = keys.build({"dim": 24, "num_heads": 4, "locality_strength": 2.0, "qkv_bias": True, "use_local_init": True})
    assert layer.locality == 2.0
    x = torch.randn(2, 25, 24)
    with torch.no_grad():
        found = keys.compare(layer, {"x": x}, {"outputs": {"attn": {}, "out": {}}})
        assert found["attn"].shape == (2, 4, 25, 25)
        assert torch.allclose(found["out"], layer(x.view(2, 5, 5, 24)).flatten(1, 2))
    with pytest.raises(AdviceError, match="num_heads"):
        keys.build({"dim": 24, "num_head": 4})
    with pytest.raises(AdviceError, match="local_up_to_layer"):
        keys.build({"embed_dim": 24, "local_up_to_layers": 4})
    with pytest.raises(AdviceError, match="hybrid"):
        keys.build({"hybrid_backbone": "resnet50"})
