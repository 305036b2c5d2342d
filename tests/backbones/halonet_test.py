"""HaloNet: counts of the paper's table and of timm's hybrids, timm's logits, ragged maps, what the halo carries."""

import dataclasses

import pytest
import timm
import torch
from timm.models import byoanet, byobnet

import lynceus
from lynceus.backbones.halonet import VARIANTS, HaloNet, HaloNetConfig
from lynceus.backbones.keys.halonet import SOURCES
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError, OptionError
from lynceus.core.rules import best_table
from lynceus.layers.halo import HaloAttention, HaloOptions
from lynceus.reengineer.keys import halonet as keys

TABLE = {  # parameters in millions, as the paper's table has them
    "halonet_h0": 5.5,
    "halonet_h1": 8.1,
    "halonet_h2": 9.4,
    "halonet_h3": 11.8,
    "halonet_h4": 19.1,
    "halonet_h5": 30.7,
    "halonet_h6": 43.4,
    "halonet_h7": 67.4,
}
COUNTED = {  # parameters, and GMACs at 256 pixels where they are known
    "halonet26t": (12_480_288, 3.17),
    "halonet50ts": (22_733_280, 5.27),
    "sehalonet33ts": (13_691_712, 3.53),
    "eca_halonext26ts": (10_756_885, 2.42),
    "halonet_h0": (5_502_248, None),
    "halonet_h1": (8_101_352, None),
    "halonet_h2": (9_405_608, None),
}


def on_meta(name, **changes):
    with torch.device("meta"):
        return HaloNet(dataclasses.replace(VARIANTS[name], **changes)).eval()


def lively(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.copy_(1 + 0.1 * noise.abs())
            elif value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                value.copy_((1 if name.endswith("weight") else 0) + 0.1 * noise)
    return model.double().eval()


@pytest.mark.parametrize("name", TABLE)
def test_parameters_of_the_papers_table(name):
    count = sum(p.numel() for p in on_meta(name).parameters())
    assert count / 1e6 == pytest.approx(TABLE[name], rel=0.005, abs=0.05)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_parameters_and_macs(name):
    parameters, gmacs = COUNTED[name]
    found = cost(on_meta(name), torch.empty(1, 3, 256, 256, device="meta"))
    assert found.params == parameters
    if gmacs is not None:
        assert found.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", ["halonet_h0", "halonet26t"])
def test_cost_is_linear_in_the_pixels(name):
    model = on_meta(name)
    small, large = (cost(model, torch.empty(1, 3, side, side, device="meta")).macs for side in (256, 512))
    assert large / small == pytest.approx(4.0, abs=0.02)


def timms(name, **changes):
    """timm's net, with changes of its block configuration, and that configuration as a record would hold it."""
    config = dataclasses.replace(byoanet.model_cfgs[name], **changes)
    fields = dataclasses.asdict(config)
    record = {k: v for k, v in fields.items() if k not in ("aa_layer", "head_hidden_size")}
    return lively(byobnet.ByobNet(config, num_classes=10)), {**record, "num_classes": 10}


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("eca_halonext26ts", (256, 256), {}),
        ("sehalonet33ts", (256, 256), {}),
        ("halonet_h1", (256, 256), {"width_factor": 0.25}),
        ("halonet26t", (256, 512), {"width_factor": 0.25, "downsample": "avg", "stem_pool": "avgpool"}),
        ("halonet26t", (256, 256), {"width_factor": 0.25, "stem_type": "deep", "num_features": 64}),
        (
            "halonet26t",
            (256, 256),
            {"width_factor": 0.25, "self_attn_kwargs": {"avg_down": True, "qkv_bias": True, "scale_pos_embed": True}},
        ),
        ("halonet26t", (224, 224), {"width_factor": 0.25, "self_attn_kwargs": {"block_size": 7, "halo_size": 1}}),
        ("halonet26t", (256, 256), {"width_factor": 0.25, "stem_type": "7x7", "stem_pool": "", "act_layer": "gelu"}),
    ],
    ids=str,
)
def test_timms_weights_give_timms_logits(name, size, changes):
    theirs, config = timms(name, **changes)
    ours = keys.build(config)
    found = best_table(theirs.state_dict(), ours, SOURCES, resize=False)
    assert found.account.complete
    ours.load_state_dict(found.values, strict=False, assign=True)
    x = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(x)
        assert (ours.double().eval()(x) - want).abs().max() < 1e-9 * want.std()


def test_a_timm_checkpoint_fits_by_name(tmp_path):
    theirs = timm.create_model("halonet26t").eval()
    torch.save(theirs.state_dict(), tmp_path / "halonet.pt")
    ours = lynceus.create_model("halonet26t", weights=tmp_path / "halonet.pt")
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        want = theirs(x)
        assert (ours(x) - want).abs().max() < 1e-3 * want.std()


def test_maps_that_are_no_multiple_of_the_block():
    """As H7 meets them at 600 pixels: sides 75 and 38 with blocks of 10. What is padded is cropped again."""
    config = dataclasses.replace(
        VARIANTS["halonet_h7"], layout=("a", "a", "aa", "a"), hidden=(8, 16, 16, 16), widths=(8, 16, 16, 16)
    )
    model = lively(HaloNet(config)).float()
    with torch.no_grad():
        maps = model.forward_stages(torch.randn(1, 3, 600, 600))
    assert [m.shape[-1] for m in maps] == [150, 75, 38, 19]
    assert all(torch.isfinite(m).all() for m in maps)


def test_late_attention_is_a_word_of_the_layout():
    """Convolution early, attention late: the paper's trade of accuracy and speed."""
    late = on_meta("halonet_h0", layout=("ccc", "ccc", "a" * 7, "aaa"))
    kinds = [isinstance(b.self_attn if b.attends else None, HaloAttention) for _, b in late.blocks()]
    assert kinds == [False] * 6 + [True] * 10


def test_mixers_that_may_be_exchanged():
    model = lynceus.create_model("halonet_nano", num_classes=10)
    sites = model.mixer_sites()
    assert [s.path for s in sites] == ["layers.0.1.self_attn", "layers.1.1.self_attn", "layers.2.1.self_attn"]
    assert [s.place.grid for s in sites] == [(16, 16), (8, 8), (4, 4)]
    for site in sites:
        x = torch.randn(1, *site.place.grid, site.place.dim)
        assert model.get_submodule(site.path)(x).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layout": ("aa", "aa", "ax")}, "'a' and 'c'"),
        ({"widths": (8,)}, "entry per stage"),
        ({"activation": "sine"}, "activation is one of"),
        ({"attention": (HaloOptions(), HaloOptions())}, "one entry for all stages or"),
        ({"shortcut": "max"}, "shortcut is one of"),
    ],
    ids=str,
)
def test_bad_options_advise(changes, match):
    with pytest.raises(AdviceError, match=match):
        dataclasses.replace(VARIANTS["halonet_nano"], **changes)


def test_an_unknown_name_in_a_record_advises():
    with pytest.raises(OptionError, match="block_size"):
        keys.build({"dim": 8, "blocksize": 4})


@pytest.mark.slow
def test_overlap_carries_information_across_block_borders():
    """300 steps a net; without a halo nothing crosses, by the mean of the map alone two colours cannot be compared."""
    from bench.halonet import marks

    with_halo, without = [marks(1, seed) for seed in (0, 1)], [marks(0, seed) for seed in (0, 1)]
    print(f"two marks: halo 1 {with_halo}, halo 0 {without}")
    assert min(with_halo) >= 0.98
    assert max(without) <= 0.80


@pytest.mark.slow
def test_learns_digits(learn_digits):
    """58,954 parameters; measured 99.1 % (seed 0)."""
    from bench.halonet import DIGITS

    torch.manual_seed(0)
    reached = learn_digits(HaloNet(DIGITS), side=32, held=450, epochs=30)
    print(f"digits {100 * reached:.1f}%")
    assert reached >= 0.98


def test_config_holds_plain_values():
    config = HaloNetConfig()
    assert config.options(3) == config.attention[0]
    assert hash(config) == hash(HaloNetConfig())
