"""VOLO: counts, timm's weights on rectangles, sizes, the aux maximum, mix-token, drop path, digits."""

from dataclasses import replace

import pytest
import torch
from timm.models.volo import VOLO as Peer

import lynceus
import lynceus.data
from lynceus import FitConfig, fit
from lynceus.backbones._weights import load_weights
from lynceus.backbones.volo import VARIANTS, VOLO, VOLOConfig
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.class_attention import ClassAttention
from lynceus.layers.token_mix import cut_box, draw_box, kept_share, swap_box
from lynceus.recipes.supervised import Supervised
from lynceus.reengineer.keys import volo as keys
from lynceus.tasks.classify import Classify

FACTS = {  # parameters, GMACs at 224
    "volo_d1": (26_632_040, 6.92),
    "volo_d2": (58_678_336, 14.3),
    "volo_d3": (86_325_072, 20.7),
    "volo_d4": (192_961_520, None),
    "volo_d5": (295_455_584, None),
}
MICRO = VOLOConfig(
    image_size=(32, 32),
    patch_size=4,
    stem_width=16,
    layers=(1, 1, 1, 1),
    embed_dims=(24, 48, 48, 48),
    num_heads=(2, 4, 4, 4),
    num_classes=10,
)


def on_meta(config):
    with torch.device("meta"):
        return VOLO(config).eval()


def filled(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, v in model.state_dict().items():
            if v.is_floating_point():
                z = torch.randn(v.shape, generator=generator)
                if n.endswith("running_var"):
                    v.copy_(1 + 0.1 * z.abs())
                elif v.ndim > 1:
                    v.copy_(z * 0.2 if v.shape[0] == 1 else z / v[0].numel() ** 0.5)
                else:
                    v.copy_((1 if n.endswith("weight") else 0) + 0.1 * z)
    return model


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs(name):
    model, (parameters, gmacs) = on_meta(VARIANTS[name]), FACTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    if gmacs is not None:
        assert cost(model, torch.empty(1, 3, 224, 224, device="meta")).macs / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (72, 40)])
def test_timm_weights_give_timm_logits(size):
    layout = {"layers": (2, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4), "num_classes": 5}
    peer = filled(Peer(img_size=size, stem_hidden_dim=16, **layout)).double().eval()
    ours = VOLO(VOLOConfig(image_size=size, stem_width=16, **layout)).double().eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x) - peer(x)).abs().max() / peer(x).std() < 1e-9


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (56, 32), (40, 40), (33, 47)])
def test_any_size_and_its_maps(size):
    """Fine tokens are rounded as the convolutions do; the coarse map is half of them, rounded down."""
    model = VOLO(MICRO).eval()
    with torch.no_grad():
        maps = model.forward_stages(torch.randn(1, 3, *size))
        assert torch.isfinite(model(torch.randn(1, 3, *size))).all()
    fine = tuple((side + 1) // 2 // 2 for side in size)
    assert maps[0].shape[2:] == fine
    assert maps[1].shape[2:] == tuple(side // 2 for side in fine)


def test_classes_add_half_the_largest_vote_of_the_patches():
    model = filled(VOLO(MICRO)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(x)
        logits, patches = model.token_logits(x)
        want = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
        assert torch.allclose(model(x), want, atol=1e-5)
        assert torch.allclose(logits + 0.5 * patches.amax(1), want, atol=1e-5)
        assert (model(x) - logits).abs().max() > 0.1
        plain = VOLO(replace(MICRO, dense=False)).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aux_head")})
        assert torch.allclose(plain(x), logits, atol=1e-5)
    with pytest.raises(AdviceError, match="dense=True"):
        plain.token_logits(x)


@pytest.mark.parametrize("bias", [False, True])
def test_the_short_way_of_one_query_is_the_long_one(bias):
    layer = ClassAttention(24, 4, qkv_bias=bias).eval()
    torch.nn.init.normal_(layer.kv.weight)
    if bias:
        torch.nn.init.normal_(layer.kv.bias)
    x = torch.randn(3, 7, 24)
    want = layer(x).detach()
    with torch.no_grad():
        assert torch.allclose(layer(x), want, atol=1e-4)


# mix-token --------------------------------------------------------------------------------------------
def test_box_of_the_record():
    assert cut_box(14, 14, 0.64, 5, 8) == (1, 4, 9, 12)
    assert kept_share((1, 4, 9, 12), 196) == pytest.approx(1 - 64 / 196)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_swapping_twice_gives_the_original(batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 6, 9, 5)
    for _ in range(20):
        box = draw_box(6, 9, generator)
        assert torch.equal(swap_box(swap_box(x, box), box), x)
        inside = torch.zeros(6, 9, dtype=torch.bool)
        inside[box[0] : box[2], box[1] : box[3]] = True
        mixed = swap_box(x, box)
        assert torch.equal(mixed[:, inside], x.flip(0)[:, inside])
        assert torch.equal(mixed[:, ~inside], x[:, ~inside])


def test_unmixing_with_an_identity_backbone_returns_the_originals():
    """Nothing between mixing fine tokens and un-mixing coarse ones: each patch keeps its own pooled tokens."""
    x = torch.randn(4, 12, 8, 3)
    box = (1, 0, 5, 3)
    fine = swap_box(x, box, scale=2)
    coarse = fine.unfold(1, 2, 2).unfold(2, 2, 2).mean((-2, -1))
    want = x.unfold(1, 2, 2).unfold(2, 2, 2).mean((-2, -1))
    assert torch.equal(swap_box(coarse, box), want)


def test_mixing_needs_its_partner_only_inside_the_box():
    model = filled(VOLO(MICRO)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits, patches = model.token_logits(x)
        for box in ((0, 0, 0, 0), (1, 1, 1, 3)):  # empty boxes
            again = model.token_logits(x, box)
            assert torch.equal(again[0], logits)
            assert torch.equal(again[1], patches)
        whole = model.token_logits(x, (0, 0, 4, 4))  # everything swapped, and back
        assert torch.allclose(whole[0], logits.flip(0))
        assert torch.allclose(whole[1], patches)


# other ------------------------------------------------------------------------------------------------
def test_outlook_blocks_drop_no_path_unless_asked():
    rates = [b.drop_path.rate for b in VOLO(replace(MICRO, layers=(2, 1, 1, 1), drop_path_rate=0.4)).network[0]]
    assert rates == [0, 0]
    model = VOLO(replace(MICRO, layers=(2, 1, 1, 1), drop_path_rate=0.4, outlook_drop_path=True))
    rates = [b.drop_path.rate for part in model.network if hasattr(part, "__len__") for b in part]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_resetting_the_classifier_renews_both():
    model = VOLO(MICRO).eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.token_logits(torch.randn(1, 3, 32, 32))[1].shape == (1, 16, 3)


def test_mistakes_are_explained():
    for changes, text in (
        ({"layers": (1, 1)}, "one entry"),
        ({"patch_size": 7}, "4, 8 or 16"),
        ({"pool": "avg"}, "dense=False"),
        ({"downsamples": (True, False, False, True)}, "last group"),
    ):
        with pytest.raises(AdviceError, match=text):
            replace(MICRO, **changes)


def learn_digits(model, *, epochs):
    train, test = lynceus.data.open("digits", size=32).train_test(0.25)
    config = FitConfig(epochs=epochs, lr=2e-3, batch_size=64, schedule="one-cycle", quiet=True)
    return fit(Supervised(Classify(num_classes=10), model), train, held_out=test, config=config)


@pytest.mark.slow
def test_learns_the_digits():
    torch.manual_seed(0)
    assert learn_digits(VOLO(replace(MICRO, dense=False)), epochs=30).summary["accuracy"] >= 0.98


@pytest.mark.slow
def test_nano_learns_the_digits():
    torch.manual_seed(0)
    model = lynceus.create_model("volo_nano", num_classes=10).train()
    assert learn_digits(model, epochs=10).summary["accuracy"] >= 0.97


def test_authors_names_build_what_they_say():
    small = {"layers": [1, 2], "embed_dims": [24, 48], "num_heads": [2, 4], "mlp_ratios": [3, 2], "num_classes": 3}
    model = keys.build({**small, "img_size": 64, "post_layers": None, "return_mean": True, "return_dense": False})
    assert model.cls_token is None
    assert model.config.downsamples == model.config.outlook == (True, False)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert keys.build({"dim": 24, "num_heads": 2, "kernel_size": 5, "padding": 2, "stride": 2}).kernel == 5
    with pytest.raises(AdviceError, match="'ca'"):
        keys.build({**small, "post_layers": ["sa"]})
    with pytest.raises(AdviceError, match="embed_dims"):
        keys.build({**small, "embed_dim": 3})


def test_a_checkpoint_of_another_size_and_other_classes(tmp_path):
    """The table is resized as on the fly; both classifiers are left fresh when they are to be dropped."""
    model = filled(VOLO(MICRO)).eval()
    torch.save(model.state_dict(), tmp_path / "small.pt")
    larger = VOLO(replace(MICRO, image_size=(48, 64))).eval()
    load_weights(larger, tmp_path / "small.pt")
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.allclose(larger(x), model(x), atol=1e-4)
    other = VOLO(replace(MICRO, num_classes=3)).eval()
    with pytest.raises(AdviceError, match="head"):
        load_weights(other, tmp_path / "small.pt")
    load_weights(other, tmp_path / "small.pt", head="drop")
    with torch.no_grad():
        assert torch.allclose(other.forward_stages(x)[-1], model.forward_stages(x)[-1])
