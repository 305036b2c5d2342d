"""ViT beside timm and torchvision at equal weights, its tokens, sizes and options, and what its card says it learns."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import lynceus
from lynceus.backbones.keys.vit import SOURCES
from lynceus.backbones.vit import VARIANTS, ViT, ViTConfig
from lynceus.core.errors import AdviceError, OptionError
from lynceus.core.rules import apply_rules
from lynceus.layers.position import cubic_matrix, resize_position
from lynceus.reengineer.keys import vit as keys

PARITY = Path(__file__).resolve().parents[1] / "parity"
_spec = importlib.util.spec_from_file_location("filling", PARITY / "filling.py")
filling = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(filling)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def fill(model):
    model.double().eval()
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(np.asarray(filling.filled(name, tuple(value.shape)))))
    model.load_state_dict(state)
    return model


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.std()


@pytest.mark.parametrize("path", sorted((PARITY / "vit").glob("*.json")), ids=lambda p: p.stem)
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


OPTIONS = {
    "plain": {},
    "avg": {"global_pool": "avg"},
    "avg_no_token": {"global_pool": "avg", "class_token": False},
    "avg_norm_first": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "token_fc_norm": {"fc_norm": True},
    "max": {"global_pool": "max", "class_token": False},
    "avgmax": {"global_pool": "avgmax"},
    "pool_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "registers": {"reg_tokens": 4},
    "registers_dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "registers_avg": {"reg_tokens": 2, "global_pool": "avg", "class_token": False, "no_embed_class": True},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
    "pre_norm": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "no_position": {"pos_embed": "none"},
    "no_final_norm": {"final_norm": False},
    "mlp_ratio": {"mlp_ratio": 2.5},
    "grey": {"in_chans": 1},
    "rectangular": {"img_size": (24, 56)},
    "other_size": {"dynamic_img_size": True},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "padded_registers": {"dynamic_img_size": True, "dynamic_img_pad": True, "reg_tokens": 3, "no_embed_class": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees_with_timm(name):
    options = {**SMALL, **OPTIONS[name]}
    size = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    shape = (40, 24) if "size" in name else (45, 61) if "padded" in name else size
    theirs = fill(VisionTransformer(**options))
    ours = keys.build(options).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(3, options.get("in_chans", 3), *shape)
    with torch.no_grad():
        close(ours(x), theirs(x))
        close(ours.forward_features(x), theirs.forward_features(x))
        close(ours.pool(ours.forward_features(x)), theirs.forward_head(theirs.forward_features(x), pre_logits=True))
        maps = theirs.forward_intermediates(x, indices=[0, 2], norm=True, intermediates_only=True)
        for a, b in zip(ours.features(x, [0, 2], norm=True), maps):
            close(a, b)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_record_of_an_unlisted_arch_is_rebuilt_from_its_state(name):
    options = {**SMALL, **OPTIONS[name]}
    theirs = VisionTransformer(**options)
    state = {k: list(p.shape) for k, p in theirs.named_parameters()}
    config = {k: options[k] for k in ("img_size", "num_heads")}
    ours = keys.build({"arch": "vit_never_heard_of", **config}, {"state": state})
    assert {k: list(p.shape) for k, p in ours.named_parameters()} == state


def test_gradients_agree_with_timm():
    theirs = fill(VisionTransformer(**SMALL)).train()
    ours = keys.build(SMALL).double().train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, y = image(4, 3, 32, 32), torch.tensor([0, 3, 6, 1])
    for model in (ours, theirs):
        torch.nn.functional.cross_entropy(model(x), y).backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        close(p.grad, wanted[name], 1e-8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_distilled_agrees_with_timm(dynamic):
    options = {**SMALL, "dynamic_img_size": dynamic, "dynamic_img_pad": dynamic}
    theirs = fill(VisionTransformerDistilled(**options))
    ours = keys.build({**options, "distilled": True}).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(2, 3, *((45, 61) if dynamic else (32, 32)))
    with torch.no_grad():
        close(ours(x), theirs(x))
        features = ours.forward_features(x)
        close(ours.pool(features), theirs.forward_head(features, pre_logits=True))
        first, second = ours.forward_both_heads(features)
        close((first + second) / 2, ours(x))
        ours.train().set_distilled_training()
        theirs.train().set_distilled_training()
        for a, b in zip(ours(x), theirs(x)):
            close(a, b)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n in timm.list_models(module=["vision_transformer", "deit"])])
def test_every_shared_name_has_timms_parameters(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, num_classes=1000), ViT(VARIANTS[name])
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_small_patch16_224", 22_050_664),
        ("vit_base_patch16_224", 86_567_656),
        ("vit_large_patch16_224", 304_326_632),
        ("deit_tiny_distilled_patch16_224", 5_910_800),
    ],
)
def test_parameter_counts_of_the_card(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(VARIANTS[name]).parameters()) == count


def test_torchvision_weights_load():
    theirs = fill(
        torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=192, num_classes=7
        )
    )
    ours = ViT(ViTConfig(image_size=(32, 32), patch_size=8, dim=48, depth=3, heads=4, num_classes=7)).double().eval()
    ours.load_state_dict(apply_rules(SOURCES["torchvision"], theirs.state_dict()), strict=True)
    x = image(2, 3, 32, 32)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_features_are_what_leaves_the_blocks():
    model = fill(lynceus.create_model("vit_nano", registers=2, class_token=True))
    heard = {}
    for i in (0, 3, 5):
        model.blocks[i].register_forward_hook(lambda _m, _i, o, i=i: heard.__setitem__(i, o))
    x = image(2, 3, 29, 47)
    with torch.no_grad():
        found = model.features(x, [0, 3, -1], prefix=True)
        whole = model.forward_features(x)
    for (m, prefix), i in zip(found, (0, 3, 5)):
        assert m.shape == (2, 96, 8, 12)
        assert prefix.shape == (2, 3, 96)
        assert torch.equal(torch.cat([prefix, m.flatten(2).transpose(1, 2)], 1), heard[i])
    assert torch.equal(whole, model.norm(heard[5]))
    with pytest.raises(AdviceError, match="0 to 5"):
        model.features(x, [6])


def test_options_that_contradict_each_other():
    with pytest.raises(AdviceError, match="class token"):
        ViT(ViTConfig(class_token=False))
    with pytest.raises(AdviceError, match="heads"):
        ViT(ViTConfig(dim=100, heads=3))
    with pytest.raises(AdviceError, match="levels"):
        ViT(ViTConfig(depth=4, levels=(1, 4)))
    with pytest.raises(AdviceError, match="distilled"):
        ViT(ViTConfig(distilled=True, pool="avg"))
    with pytest.raises(OptionError, match="num_heads"):
        keys.build({"arch": "vit_tiny_patch16_224", "num_head": 3})


def test_training_options_act():
    torch.manual_seed(0)
    model = lynceus.create_model("vit_nano", patch_drop=0.5, drop_path_rate=0.5, position_drop=0.1, proj_drop=0.1)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert model.embed(x).shape == (4, 32, 96)
        assert not torch.equal(model(x), model(x))
        with pytest.raises(AdviceError, match="patch_drop"):
            model.forward_stages(x)


def test_position_matrix_is_the_antialiased_resize():
    table = torch.randn(1, 1 + 7 * 5, 6, generator=torch.Generator().manual_seed(0))
    for new in [(3, 9), (7, 5), (14, 2), (8, 6)]:
        expected = resize_position(table, (7, 5), new, prefix=1)
        rows, columns = cubic_matrix(7, new[0]), cubic_matrix(5, new[1])
        grid = torch.einsum("Hh,Ww,hwd->HWd", rows, columns, table[0, 1:].reshape(7, 5, 6))
        assert torch.equal(expected[:, :1], table[:, :1])
        assert (expected[0, 1:] - grid.flatten(0, 1)).abs().max() < 1e-5


# what the card says it learns ---------------------------------------------------------------------
@pytest.mark.slow
def test_learns_digits_as_the_card_says(learn_digits):
    """The card: timm's code 95.6%, without positions 81.6%. Measured: ours 94.0 and 97.3% (two seeds), timm 96.2 and
    94.7%, ours from timm's start exactly timm's 96.2%; without positions ours 78.9%, timm 79.6%.

    Gradients are clipped at 5; unclipped, both stay on a plateau for long (10 to 77%).
    """
    config = ViTConfig(image_size=(16, 16), patch_size=2, dim=48, depth=4, heads=4, num_classes=10)

    def learned(model):
        return learn_digits(model, side=16, held=450, epochs=30)

    def fresh(maker):
        torch.manual_seed(0)
        return maker()

    theirs = fresh(lambda: VisionTransformer(16, 2, num_classes=10, embed_dim=48, depth=4, num_heads=4))
    twin = ViT(config)
    twin.load_state_dict(theirs.state_dict())
    figures = {
        "ours": learned(fresh(lambda: ViT(config))),
        "ours, from timm's start": learned(twin),
        "timm": learned(theirs),
        "ours without positions": learned(fresh(lambda: ViT(replace(config, position="none")))),
    }
    print("digits, 450 held out: " + "; ".join(f"{k} {v:.1%}" for k, v in figures.items()))
    assert figures["ours"] >= 0.93
    assert figures["ours, from timm's start"] >= 0.93
    assert abs(figures["ours, from timm's start"] - figures["timm"]) <= 0.02
    assert figures["ours without positions"] <= figures["ours"] - 0.1
