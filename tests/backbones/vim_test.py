"""Vim: places of the class token, sensitivity to what is easily got wrong, positions of other sizes, learning."""

import dataclasses

import pytest
import torch
from torch import nn

import lynceus
from lynceus.backbones.vim import VARIANTS, Vim, VimConfig
from lynceus.core.errors import AdviceError
from lynceus.core.rules import best_table
from lynceus.reengineer.filling import filled
from lynceus.reengineer.keys.vim import SOURCES
from lynceus.reengineer.keys.vim import build as authors

MICRO = VimConfig(image_size=(80, 80), dim=64, depth=4, num_classes=10)
PIXELS = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(**options):
    """A small Vim with the weights of the parity records."""
    model = Vim(dataclasses.replace(MICRO, **options)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(filled(name, p.shape)))
    return model


def logits(model, x=PIXELS):
    with torch.no_grad():
        return model(x)


def test_what_is_easily_got_wrong_shows():
    """The card's measured effects on a net of four blocks, in standard deviations."""
    y = logits(built())

    def effect(**options):
        return float((logits(built(**options)) - y).square().mean().sqrt() / y.std())

    assert effect() == 0
    assert 0.2 < effect(halve=False) < 2
    assert 1e-5 < effect(norm_eps=1e-6) < 1e-3
    assert effect(class_token="first") > 0.5


@pytest.mark.parametrize("where", ["middle", "first", "ends", "none"])
def test_class_tokens_stand_where_they_should(where):
    model = built(class_token=where)
    x = torch.arange(25.0, dtype=torch.float64)[None, :, None].expand(2, -1, 64)
    with_tokens = model.with_class_token(x)
    assert with_tokens.shape[1] == 25 + model.config.extra
    assert torch.equal(model.patches(with_tokens, (5, 5)), x)
    if where == "middle":
        assert torch.equal(with_tokens[:, 12], model.cls_token[0].expand(2, -1))
        assert torch.equal(with_tokens[:, 13], x[:, 12])
    assert logits(model).shape == (2, 10)


@pytest.mark.parametrize("pool", ["mean", "max", "last", "all"])
def test_pools_without_a_class_token(pool):
    model = built(class_token="none", pool=pool)
    with torch.no_grad():
        features = model.forward_features(PIXELS)
        each = model.head(features)
        want = {"mean": each.mean(1), "max": each.amax(1), "last": each[:, -1], "all": each}[pool]
        assert (model(PIXELS) - want).abs().max() < 1e-12


@pytest.mark.parametrize("where", ["middle", "first", "none", "ends"])
def test_positions_of_another_size_keep_the_class_token_s_row(where):
    model = built(class_token=where)
    assert model.positions((5, 5)) is model.pos_embed
    table = model.positions((7, 4))
    assert table.shape[1] == 28 + model.config.extra
    with torch.no_grad():
        row = {"middle": (12, 14), "first": (0, 0), "ends": (-1, -1), "none": None}[where]
        if row is not None:
            assert torch.equal(table[:, row[1]], model.pos_embed[:, row[0]])
        constant = built(class_token=where)
        constant.pos_embed.fill_(0.5)
        assert (constant.positions((7, 4)) - 0.5).abs().max() < 1e-5


def test_a_checkpoint_of_another_size_keeps_the_class_token_s_row():
    small = built()
    large = Vim(dataclasses.replace(MICRO, image_size=(112, 80))).double()
    found = best_table(small.state_dict(), large, SOURCES)
    assert found.account.complete
    assert any("7x5" in line for line in found.account.text(expand=True).splitlines())
    table = found.values["pos_embed"]
    assert table.shape == (1, 36, 64)
    assert torch.equal(table[:, 17], small.pos_embed[:, 12])
    with torch.no_grad():
        assert (table - small.positions((7, 5))).abs().max() < 1e-6


def test_overlapping_patches():
    model = built(stride=8)
    assert model.grid == (9, 9)
    assert model.forward_stages(PIXELS)[0].shape == (2, 64, 9, 9)
    assert model.forward_stages(PIXELS[..., :33, :50])[0].shape == (2, 64, 4, 6)
    assert model.stages[0].stride == 8


def test_drop_path_comes_one_block_late():
    model = Vim(dataclasses.replace(MICRO, drop_path_rate=0.3))
    assert [round(b.drop_path.rate, 6) for b in model.layers] == [0.0, 0.0, 0.1, 0.2]
    assert model.drop_path.rate == 0.3


def test_variants_and_their_parameters():
    assert sum(p.numel() for p in lynceus.create_model("vim_tiny").parameters()) == 7_148_008
    small = dataclasses.replace(VARIANTS["vim_small"], image_size=(160, 160), num_classes=100)
    assert sum(p.numel() for p in Vim(small).parameters()) == 25_413_220
    assert VARIANTS["vim_base"].dim == 768
    assert VARIANTS["vim_tiny_stride8"].grid == (27, 27)


def test_fresh_weights():
    torch.manual_seed(0)
    model = lynceus.create_model("vim_tiny", depth=4)
    assert abs(float(model.patch_embed.proj.weight.std()) - 768**-0.5) < 0.002
    bound = (1 / 384) ** 0.5 / 2  # PyTorch's default, over the root of the depth
    assert 0.9 * bound < float(model.layers[0].mixer.out_proj.weight.abs().max()) <= bound
    assert nn.functional.softplus(model.layers[3].mixer.dt_proj_b.bias).max() <= 0.1001
    kept = model.no_weight_decay()
    assert {"cls_token", "pos_embed", "layers.0.mixer.A_b_log", "layers.3.mixer.D", "layers.1.mixer.D_b"} <= kept


def test_stepwise_use_and_mixer_sites():
    model = built()
    sites = model.mixer_sites()
    assert [s.path for s in sites] == [f"layers.{i}.mixer" for i in range(4)]
    assert (sites[0].call, sites[0].extra, sites[0].where) == ("tokens", 1, "middle")
    assert built(class_token="ends").mixer_sites() == []


def test_authors_arguments_are_known():
    model = authors({"img_size": 32, "embed_dim": 16, "depth": 2, "if_cls_token": False, "final_pool_type": "max"})
    assert model.config.pool == "max"
    assert authors({"embed_dim": 16, "depth": 2, "if_bimamba": True}).config.direction == "v1"
    with pytest.raises(AdviceError, match="embed_dim"):
        authors({"embed_dims": 16})


def test_mistakes_are_told():
    with pytest.raises(AdviceError, match="class_token is"):
        VimConfig(class_token="centre")
    with pytest.raises(AdviceError, match="depth=4"):
        VimConfig(paired=True, depth=3)


@pytest.mark.slow
def test_learns_digits(learn_digits):
    """The card's run: width 24, depth 4, a token per pixel; 85% after 16 epochs."""
    torch.manual_seed(0)
    model = Vim(VimConfig(image_size=(8, 8), patch_size=1, stride=1, dim=24, depth=4, num_classes=10))
    assert learn_digits(model, side=8, held=360, epochs=16, batch=48) > 0.85
