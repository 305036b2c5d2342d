"""PlainMamba: maps of dense outputs, layers without shortcut, frozen stems, released numbers, the ablation."""

import dataclasses

import pytest
import torch

import lynceus
from lynceus.backbones.plain_mamba import VARIANTS, PlainMamba, PlainMambaConfig
from lynceus.core.errors import AdviceError
from lynceus.reengineer.keys.plain_mamba import build as authors

SMALL = PlainMambaConfig(image_size=(64, 64), dim=24, depth=4, states=4, conv=3, num_classes=10)


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def built(**options):
    torch.manual_seed(0)
    return PlainMamba(dataclasses.replace(SMALL, **options)).eval()


def test_parameters():
    """As measured on the authors' code: with no norm on intermediate maps, and with three."""
    counts = {"plain_mamba_l1": 7_551_656, "plain_mamba_l2": 26_145_832, "plain_mamba_l3": 50_956_456}
    for name, count in counts.items():
        with torch.device("meta"):
            model = PlainMamba(VARIANTS[name])
        assert sum(p.numel() for p in model.parameters()) == count
    with torch.device("meta"):
        dense = PlainMamba(dataclasses.replace(VARIANTS["plain_mamba_l1"], out_indices=(5, 11, 17, 23)))
    assert sum(p.numel() for p in dense.parameters()) == 7_552_808


def test_dense_maps():
    model = built(out_indices=(0, 3))
    with torch.no_grad():
        maps = model.forward_stages(images(192, 260))
    assert [m.shape for m in maps] == [(2, 24, 12, 17)] * 2
    # each through a norm of its own
    for m in maps:
        assert m.mean(1).abs().max() < 1e-5
        assert (m.std(1, unbiased=False) - 1).abs().max() < 0.01
    assert {n for n, _ in model.named_children()} >= {"norm_layer0", "ln1"}
    with pytest.raises(AdviceError, match="out_indices"):
        built(out_indices=(4,))


def test_a_3x3_layer_replaces_the_stream():
    model = built(dwconv=(1,))
    layer = model.layers[1]
    with torch.no_grad():
        layer.dw[0].weight.zero_()
        y = layer(torch.randn(1, 3, 3, 24))
    assert y.abs().max() == 0  # a shortcut would let x through
    assert model.layers[0].dw is None


def test_padding_is_after_the_stem():
    """65 pixels make 33 columns, which are filled up to 40: five tokens, as ceil(65 / 16)."""
    model = built()
    with torch.no_grad():
        assert model.forward_features(images(65, 33)).shape == (2, 24, 5, 3)
    assert built(image_size=(65, 65)).config.grid == (4, 4)


def test_frozen_stem():
    model = built(freeze_patch_embed=True).train()
    assert not model.patch_embed.stem[1].training
    assert not any(p.requires_grad for p in model.patch_embed.parameters())
    assert model.layers[0].training


def test_authors_arguments_are_known():
    nested = {"use_rms_norm": True, "mamba_cfg": {"d_state": 4, "conv_size": 3, "bias": True}}
    config = {"arch": None, "embed_dims": 16, "num_layers": 2, "out_indices": [-1], "layer_cfgs": nested}
    model = authors(config)
    assert model.config.out_indices == (1,)
    assert model.config.rms_norm
    assert model.config.states == 4
    assert config["layer_cfgs"]["mamba_cfg"] == {"d_state": 4, "conv_size": 3, "bias": True}  # left as it was
    assert authors({"arch": "L1", "embed_dims": 7}).config.dim == 192  # an arch settles it
    with pytest.raises(AdviceError, match="L1"):
        authors({"arch": "L4"})


def test_no_decay_and_sites():
    model = built()
    assert {"pos_embed", "layers.0.mamba.A_log", "layers.3.mamba.D", "layers.1.mamba.direction_Bs"} <= (
        model.no_weight_decay()
    )
    assert [s.path for s in model.mixer_sites()] == [f"layers.{i}.mamba" for i in range(4)]
    assert model.mixer_sites()[0].call == "map"


@pytest.mark.parametrize(
    "options",
    [{"order": "raster"}, {"directions": False}, {"reorder_all": True}, {"order": "raster", "directions": False}],
)
def test_ablations_train(options):
    model = built(**options).train()
    (model(images(48, 32)) * torch.randn(2, 10)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_ablations_by_name():
    model = lynceus.create_model("plain_mamba_nano", order="raster", directions=False, num_classes=4)
    assert not any("direction_Bs" in name for name, _ in model.named_parameters())
