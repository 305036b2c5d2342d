"""Hyena ViT: counts, hybrids, pooling, other grids, and the claim that a few images are enough."""

import copy

import pytest
import torch
from torch import nn

import lynceus
from lynceus.backbones.hyena_vit import VARIANTS, HyenaViT, HyenaViTConfig
from lynceus.core.errors import OptionError
from lynceus.layers.attention import MapAttention
from lynceus.layers.hyena import Hyena, RowHyena
from lynceus.reengineer.keys import hyena_vit as keys

MICRO = HyenaViTConfig(
    image_size=(16, 16), patch_size=4, dim=24, depth=4, heads=3, mlp_ratio=2.0, width=16, num_classes=5
)


def changed(**options):
    torch.manual_seed(0)
    fields = {f: getattr(MICRO, f) for f in MICRO.__dataclass_fields__}
    return HyenaViT(HyenaViTConfig(**{**fields, **options})).eval()


def image(*size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_counts():
    with torch.device("meta"):
        assert count(HyenaViT(VARIANTS["hyena_vit_tiny"])) == 6_042_400
        hybrid = lynceus.create_model("hyena_vit_tiny_hybrid", num_classes=40)
    assert count(hybrid) == 5_721_550
    assert count(Hyena(32, (14, 14), form="product")) == 26_570
    assert count(Hyena(32, (14, 14))) == 16_138


@pytest.mark.parametrize(
    ("method", "hyenas"),
    [
        ("hyena", (0, 1, 2, 3)),
        ("attention", ()),
        ("hyena2dattn", (0, 1, 2)),
        ("attnhyena2d", (3,)),
        ("onebyone", (0, 2)),
    ],
)
def test_methods(method, hyenas):
    model = changed(method=method)
    for i, block in enumerate(model.blocks):
        assert type(block.attn) is (Hyena if i in hyenas else MapAttention)
        if i in hyenas:
            assert block.attn.direction == ("seq" if i % 2 == 0 else "standard")
    model(image(19, 13)).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"axes": 1},
        {"form": "product", "direction": "4dir"},
        {"form": "direct", "decay": "no"},
        {"direction": "parallel", "order": 3},
        {"direction": "4dirp", "decay": "learn", "sqrt_decay": True},
        {"decay": "symmetric"},
    ],
    ids=str,
)
def test_options_reach_the_layers(options):
    model = changed(**options)
    layer = model.blocks[1].attn
    assert isinstance(layer, RowHyena if options.get("axes") == 1 else Hyena)
    for size in [(16, 16), (21, 9), (3, 2)]:
        out = model(image(*size))
        assert out.shape == (2, 5)
        assert torch.isfinite(out).all()


def test_the_first_token_or_the_mean():
    mean, first = changed(), changed(pool="token")
    first.load_state_dict(mean.state_dict())
    with torch.no_grad():
        features = mean.forward_features(image(16, 16))
        normed = mean.norm(features.permute(0, 2, 3, 1))
        assert torch.allclose(mean.pool(features), normed.mean((1, 2)), atol=1e-6)
        assert torch.allclose(first.pool(features), normed[:, 0, 0], atol=1e-6)


def test_in_standard_mode_the_first_token_sees_its_corner_alone():
    """The trap of the card: causal filters leave the top left token to itself and its neighbours."""
    x = image(16, 16).double().requires_grad_()
    for direction, sees in (("standard", False), ("seq", True), ("4dir", True)):
        x.grad = None
        model = changed(direction=direction, pool="token", depth=2).double()
        with torch.no_grad():
            for p in model.parameters():  # fresh filters are next to nothing
                p.add_(0.2 * torch.randn_like(p))
        model(x).square().sum().backward()
        far = x.grad[..., 12:, 12:].abs().max() / x.grad.abs().max()
        assert (far > 1e-9) if sees else (far < 1e-14)


def test_another_grid_gives_what_a_net_made_for_it_gives():
    """Untrained positions of the filters are rebuilt; with them and the resized table the nets are one."""
    small, large = changed(), changed(image_size=(28, 28))
    state = copy.deepcopy(small.state_dict())
    own = large.state_dict()
    state |= {n: v for n, v in own.items() if n.endswith("pos_emb.z")}
    state["pos_embed"] = (
        nn.functional.interpolate(
            state["pos_embed"].view(1, 4, 4, -1).permute(0, 3, 1, 2), (7, 7), mode="bicubic", antialias=True
        )
        .permute(0, 2, 3, 1)
        .reshape(1, 49, -1)
    )
    large.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(small(image(28, 28)), large(image(28, 28)), atol=1e-5)


def test_the_authors_names_are_read(tmp_path):
    model = changed(decay="learn")
    torch.save(
        {"model": {**model.state_dict(), "blocks.0.attn.filter_fn.pos_emb.t": torch.rand(1, 4, 1)}}, tmp_path / "a.pt"
    )
    with pytest.raises(OptionError, match="hyena2dattn"):
        HyenaViTConfig(method="hyena2datt")
    names = {
        "image_size": (16, 16),
        "patch_size": 4,
        "dim": 24,
        "depth": 4,
        "mlp_ratio": 2.0,
        "width": 16,
        "decay": "learn",
    }
    read = lynceus.create_model("hyena_vit_tiny", weights=tmp_path / "a.pt", num_classes=5, **names)
    with torch.no_grad():
        assert torch.equal(read(image(16, 16)), model(image(16, 16)))


def test_constructor_names():
    config = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4, "patch_size": 8}
    layer = {"hyena_order": 3, "hyena_filter_order": 16, "window_mode": "symettric", "hyena2d_filter": True}
    made = keys.build({**config, **layer, "method": "onebyone", "directional_mode": "4dir", "grad_cp": False})
    c = made.config
    assert (c.method, c.order, c.width, c.decay, c.form, c.direction) == (
        "onebyone", 3, 16, "symmetric", "joint", "4dir",
    )  # fmt: skip
    assert c.pool == "token"
    assert keys.build({**config, "method": "hyena"}).config.axes == 1
    with pytest.raises(OptionError, match="hyena_order"):
        keys.build({**config, "hyena_ordr": 2})


def test_filters_are_never_decayed():
    model = changed()
    plain = model.no_weight_decay()
    assert {n for n, _ in model.named_parameters() if "filter_fn" in n} <= plain
    assert "pos_embed" in plain


@pytest.mark.slow
def test_three_hundred_images_are_enough():
    """The paper's headline at the card's scale: every Hyena form at least 88 % and 25 points above attention."""
    bench = pytest.importorskip("bench.hyena")
    data = bench.digits()
    found = {name: bench.accuracy(options, 0, data) for name, options in bench.FORMS.items()}
    for name in ("hyena, joint, seq", "hyena, product, 4dir", "hybrid, hyena first"):
        assert found[name] >= 88
        assert found[name] >= found["attention"] + 25
