"""ViT-Res and ViT-ResNAS: counts, the definition language, embeddings, sizes, heads, reductions, the super-network."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.backbones._weights import load_weights
from lynceus.backbones.resnas import FOUND, REFERENCE, VARIANTS, Reduction, ResNAS, ResNASConfig
from lynceus.backbones.resnas_definition import BlockDefinition, Definition, StageDefinition, parse
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.block import MixerBlock
from lynceus.layers.position import resize_position
from lynceus.reengineer.keys import resnas as keys

FACTS = {  # parameters without and with the patch head, GMACs
    "vit_res_tiny": (42_012_736, 42_781_736, 1.7944),
    "resnas_tiny": (40_793_552, 41_498_552, 1.7826),
    "resnas_small": (63_724_108, None, 2.8455),
    "resnas_medium": (96_442_672, 97_323_672, 4.5131),
}
MICRO = ResNASConfig(image_size=(112, 112), definition="C 16,24,40: 2x8|32 // 3x8|48 2x8|32 // 2x16|64", num_classes=10)


def lively(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                if name.endswith("running_var"):
                    value.add_(0.3 * noise.abs())
                elif value.ndim > 1:
                    tables = name.endswith(("tokens", "pos_embed"))
                    value.copy_(0.3 * noise if tables else noise / value[0].numel() ** 0.5)
                else:
                    value.copy_(0.3 * noise + float(name.endswith("weight")))
    return model


def micro(**changes):
    return lively(ResNAS(replace(MICRO, **changes))).double().eval()


def images(side=112, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs(name):
    without, with_patches, gmacs = FACTS[name]
    with torch.device("meta"):
        model = ResNAS(VARIANTS[name]).eval()
        patches = ResNAS(replace(VARIANTS[name], patch_output=True))
    assert sum(p.numel() for p in model.parameters()) == without
    assert with_patches in (None, sum(p.numel() for p in patches.parameters()))
    macs = cost(model, torch.empty(1, 3, 224, 224, device="meta")).macs
    assert macs == model.plan.macs() == pytest.approx(gmacs * 1e9, rel=1e-4)


# the language -----------------------------------------------------------------------------------------
@st.composite
def definitions(draw):
    count = draw(st.integers(1, 4))
    widths = sorted(draw(st.lists(st.integers(1, 900), min_size=count, max_size=count)))
    block = st.builds(
        BlockDefinition,
        heads=st.integers(1, 16),
        head_dim=st.sampled_from([8, 32, 48, 64]),
        hidden=st.integers(1, 4000),
        exists=st.booleans(),
    )
    stages = tuple(StageDefinition(width=w, blocks=tuple(draw(st.lists(block, max_size=4)))) for w in widths)
    embedding = draw(st.sampled_from(["conv", "plain"]))
    middle = draw(st.sampled_from([24, 32])) if embedding == "conv" else 24
    return Definition(stages=stages, embedding=embedding, middle=middle)


@settings(max_examples=60, deadline=None)
@given(definition=definitions())
def test_text_and_tuples_say_the_same(definition):
    assert parse(definition.text()) == definition
    assert parse(definition.items(7)) == definition
    assert parse(str(definition.items())) == definition
    assert parse([list(item) for item in definition.items()]) == definition


def test_the_cards_strings_are_the_authors_tuples():
    tiny = parse(FOUND["tiny"]).items()
    assert tiny[0] == (4, 176)
    assert tiny[1] == (1, (176, 3, 32), (176, 704), 1)
    assert tiny[6] == (3, 176, 352)
    assert tiny[-2:] == ((1, (704, 8, 64), (704, 2560), 1), (2, 704, 1000))
    assert [len(s.blocks) for s in parse(FOUND["medium"]).stages] == [7, 7, 6]
    assert parse(REFERENCE).items()[14] == (1, (768, 12, 64), (768, 3072), 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3|704", "starts with the widths"),
        ("C 16,8: 1|8 // 1|8", "never shrink"),
        ("C 16: 1|8 // 1|8", "1 widths but 2 stages"),
        ("C 16: 1-8", "heads.hidden"),
        ("((4, 16), (1, (8, 1, 8), (8, 8), 1), (2, 16, 10))", "does not start from the 16 channels"),
        ("((4, 16), (7, 16))", "is no block"),
        ("((1, 2)", "no tuple"),
        ("((3, 16, 32),)", "starts with an embedding"),
        ("C 0: 1|8", "at least 1"),
    ],
)
def test_mistakes_are_told(text, words):
    with pytest.raises(AdviceError, match=words):
        parse(text)


# the network --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("front", ["", "P ", "M32 "], ids=["conv", "plain", "middle 32"])
@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"patch_output": True}], ids=str)
def test_embeddings_and_heads(front, options):
    model = micro(definition=front + MICRO.definition, **options)
    x = images()
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        assert [tuple(m.shape[1:]) for m in model.forward_stages(x)] == [(16, 8, 8), (24, 4, 4), (40, 2, 2)]
        features = model.forward_features(x)
        if "distilled" in options:
            first, second = model.forward_both_heads(features)
            assert torch.allclose(model(x), (first + second) / 2)
            model.train().set_distilled_training()
            assert len(model(x)) == 2
        if "patch_output" in options:
            assert model.forward_patches(features).shape == (2, 4, 10)
            logits, patches = model.train()(x)
            assert logits.shape == (2, 10)
            assert patches.shape == (2, 4, 10)
        else:
            with pytest.raises(AdviceError, match="patch_output=True"):
                model.forward_patches(features)


def test_a_reduction_is_what_the_card_says():
    layer = lively(Reduction(6, 10, (2, 3), extra=2, eps=1e-6)).double()
    x = torch.randn(2, 2 + 4 * 6, 6, dtype=torch.float64)
    with torch.no_grad():
        n = F.layer_norm(x, (6,), layer.norm.weight, layer.norm.bias, 1e-6)
        grid = n[:, 2:].reshape(2, 4, 6, 6).permute(0, 3, 1, 2)
        patches = F.conv2d(grid, layer.patch_reduce.weight, layer.patch_reduce.bias, 2, 1).flatten(2).transpose(1, 2)
        tokens = n[:, :2] @ layer.token_transform.weight.T + layer.token_transform.bias
        pooled = x[:, 2:].reshape(2, 2, 2, 3, 2, 6).mean((2, 4)).flatten(1, 2)
        want = torch.cat([tokens, patches + layer.pos_embed], 1)
        want[:, :, :6] += torch.cat([x[:, :2], pooled], 1)
        assert torch.allclose(layer(x, (4, 6)), want, atol=1e-12)


def test_odd_edges_are_halved_alone():
    layer = lively(Reduction(4, 4, (2, 2), extra=1, eps=1e-6)).double()
    layer.patch_reduce.weight.data.zero_()
    layer.pos_embed.data.zero_()
    layer.patch_reduce.bias.data.zero_()
    x = torch.randn(1, 1 + 9, 4, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x, (3, 3))[0, 1:].reshape(2, 2, 4)
    grid = x[0, 1:].reshape(3, 3, 4)
    assert torch.allclose(y[0, 0], grid[:2, :2].mean((0, 1)))
    assert torch.allclose(y[0, 1], grid[:2, 2].mean(0))
    assert torch.allclose(y[1, 1], grid[2, 2])


def test_the_cards_sensitivities():
    """A three-stage micro net: no skip, a skip from normed tokens, and eps 1e-5 all show in the logits."""
    model, x = micro(), images()
    with torch.no_grad():
        y = model(x)
        without = micro(skip=False)(x)
        eps = micro(norm_eps=1e-5)(x)
        for part in model.blocks:
            if isinstance(part, Reduction):
                part.forward = lambda t, size, part=part: part.reduce(part.norm(t), part.norm(t), size)
        normed = model(x)
    assert (without - y).std() > 0.3 * y.std()
    assert (normed - y).std() > 0.1 * y.std()
    assert 1e-7 * y.std() < (eps - y).abs().max() < 1e-3 * y.std()


def test_dropping_the_skip_changes_the_untrained_tiny():
    torch.manual_seed(0)
    model, x = ResNAS(VARIANTS["resnas_tiny"]).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        for part in model.blocks:
            if isinstance(part, Reduction):
                part.skip = False
        assert (model(x) - before).abs().max() > 1e-3 * before.std()


def test_absent_blocks_hold_nothing_and_keep_the_rates():
    rates = {"drop_path_rate": 0.4}
    listed = ResNAS(replace(MICRO, definition="C 16,24: 2|32 (2|32) 2|32 // 2|32", **rates))
    short = ResNAS(replace(MICRO, definition="C 16,24: 2|32 2|32 // 2|32", **rates))
    assert sum(p.numel() for p in listed.parameters()) == sum(p.numel() for p in short.parameters())
    found = [[b.drop_path.rate for b in m.blocks if isinstance(b, MixerBlock)] for m in (listed, short)]
    assert found[0] == pytest.approx([0, 0.8 / 3, 0.4])
    assert found[1] == pytest.approx([0, 0.2, 0.4])
    assert isinstance(listed.blocks[1], nn.Identity)
    assert [s.path for s in listed.mixer_sites()] == ["blocks.0.attn", "blocks.2.attn", "blocks.4.attn"]
    assert [s.place.index for s in listed.mixer_sites()] == [0, 2, 3]


def test_weights_of_112_load_at_168(tmp_path):
    """Both kinds of position table are resized bicubically, without antialias as the authors do; tokens keep theirs."""
    old = lively(ResNAS(replace(MICRO, distilled=True))).eval()
    torch.save({"model": old.state_dict()}, tmp_path / "old.pth")
    new = ResNAS(replace(old.config, image_size=(168, 168))).eval()
    account = load_weights(new, tmp_path / "old.pth")
    assert account.text(expand=True).count("resize_positions") == 3
    table = old.pos_embed[:, 2:].reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    want = F.interpolate(table, (12, 12), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(new.pos_embed[:, 2:], want, atol=1e-6)
    assert torch.equal(new.pos_embed[:, :2], old.pos_embed[:, :2])
    table = old.blocks[1].pos_embed
    assert torch.allclose(new.blocks[1].pos_embed, resize_position(table, (4, 4), (6, 6), antialias=False), atol=1e-6)
    x = images(168).float()
    with torch.no_grad():
        assert torch.allclose(new(x), old(x), atol=1e-4)


def test_initial_values():
    model = ResNAS(MICRO)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all((m.bias == 0).all() and m.weight.std() < 0.03 for m in linear)
    assert 0 < model.tokens.std() < 0.05
    assert model.no_weight_decay() == {"tokens"}
    with pytest.raises(AdviceError, match="two ways to train"):
        replace(MICRO, distilled=True, patch_output=True)
    with pytest.raises(AdviceError, match="must be even"):
        replace(MICRO, patch_size=7)


def test_the_authors_constructor_names():
    items = parse(MICRO.definition).items(10)
    model = keys.build({"img_size": 112, "patch_size": 14, "network_def": items, "distill_token": False})
    assert model.config == replace(MICRO, definition=model.config.definition)
    assert keys.build({"network_def": str(items)}).config.distilled  # their default
    with pytest.raises(AdviceError, match="distill_token"):
        keys.build({"network_def": items, "distil_token": False})


@pytest.mark.slow
def test_the_nano_learns_digits(learn_digits):
    torch.manual_seed(0)
    reached = learn_digits(ResNAS(replace(VARIANTS["resnas_nano"], num_classes=10)), side=32, held=360, epochs=12)
    print(f"digits {100 * reached:.1f}%")
    assert reached >= 0.95
