"""CvT: counts, any size, its class token, pooling without it, foreign names, options, and positions by convolution."""

from dataclasses import replace

import pytest
import torch

import lynceus
from lynceus.backbones.cvt import VARIANTS, CvT, CvTConfig
from lynceus.backbones.keys.cvt import SOURCES
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError, OptionError
from lynceus.core.rules import apply_rules
from lynceus.layers.mlp import Mlp, QuickGELU
from lynceus.reengineer.keys import cvt as keys

MICRO = CvTConfig(dims=(16, 32, 48), heads=(1, 2, 3), depths=(1, 2, 2), num_classes=10)
FACTS = {  # parameters, GMACs at the variant's size
    "cvt_13": (19_997_480, 4.57),
    "cvt_21": (31_622_696, 7.18),
    "cvt_13_384": (19_997_480, 16.27),
    "cvt_21_384": (31_622_696, 24.9),
    "cvt_w24": (277_196_392, 193.2),
}
SPEC = {
    "num_stages": 3, "patch_size": [7, 3, 3], "patch_stride": [4, 2, 2], "patch_padding": [2, 1, 1],
    "dim_embed": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 2], "cls_token": [False] * 3,
}  # fmt: skip


def lively(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point():
                z = torch.randn(p.shape, generator=generator)
                if "var" in name:
                    p.copy_(1 + 0.2 * z.abs())
                elif p.ndim > 1:
                    p.copy_(z * 0.2 if p.shape[0] == 1 else z / p[0].numel() ** 0.5)
                else:
                    p.copy_(1 + 0.1 * z if name.endswith("weight") else 0.1 * z)
    return model


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().std())


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_macs(name):
    config, (parameters, gmacs) = VARIANTS[name], FACTS[name]
    with torch.device("meta"):
        model = CvT(config).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    counted = cost(model, torch.empty(1, 3, *config.image_size, device="meta"))
    assert counted.macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_one_model_runs_any_size():
    model = lively(CvT(MICRO)).eval()
    shapes = {n: p.shape for n, p in CvT(replace(MICRO, image_size=(512, 96))).state_dict().items()}
    assert shapes == {n: p.shape for n, p in model.state_dict().items()}  # nothing depends on the picture
    with torch.no_grad():
        for size, last in (((224, 224), (14, 14)), ((203, 318), (13, 20)), ((96, 96), (6, 6)), ((1, 2), (1, 1))):
            assert model(torch.randn(1, 3, *size)).shape == (1, 10)  # one picture keeps its axis
            assert model.forward_stages(torch.randn(2, 3, *size))[-1].shape[2:] == last
        assert [tuple(m.shape[2:]) for m in model.forward_stages(torch.randn(1, 3, 203, 318))] == [
            (51, 79), (26, 40), (13, 20)
        ]  # fmt: skip
    assert replace(MICRO, image_size=(203, 318)).grid(2) == (13, 20)


def test_maps_leave_the_token_out():
    model, x = lively(CvT(MICRO)).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, maps = model.features_and_stages(x)
        assert features.shape == (2, 1 + 4 * 6, 48)
        assert torch.equal(features[:, 1:], maps[-1].flatten(2).transpose(1, 2))
        assert torch.equal(model.pool(features), model.norm(features[:, 0]))
        mean = lively(CvT(replace(MICRO, class_token=(False,) * 3))).eval()
        features = mean.forward_features(x)
        assert features.shape == (2, 4, 6, 48)
        assert torch.allclose(mean.pool(features), mean.norm(features.flatten(1, 2)).mean(1), atol=1e-6)


def test_only_the_last_queries_are_silent_behind_a_token():
    """The classifier reads the token alone, so the map's queries of the last block lead nowhere; all else learns."""
    model = lively(CvT(MICRO)).train()
    (model(torch.randn(4, 3, 64, 64)) * torch.randn(4, 10)).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {f"stage2.blocks.1.attn.conv_proj_q.{n}" for n in ("conv.weight", "bn.weight", "bn.bias")}


def test_folded_and_unfolded_logits_agree():
    model, x = lively(CvT(MICRO)).eval(), torch.randn(3, 3, 64, 80)
    unfolded = model(x)  # with gradients nothing is folded
    with torch.no_grad():
        assert (model(x) - unfolded).abs().max() < 1e-5
        assert relative(model(x), model.double()(x.double()).float()) < 1e-5


def test_quick_gelu_in_the_kernel_is_the_formula():
    mlp = lively(Mlp(8, 32, act=QuickGELU())).eval()
    x, shortcut = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    hidden = mlp.fc1(x)
    wanted = mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
    with torch.no_grad():
        assert torch.allclose(mlp(x), wanted, atol=1e-5)
        assert torch.allclose(mlp(x, shortcut), wanted + shortcut, atol=1e-5)
    assert torch.allclose(mlp(x), wanted, atol=1e-5)


@pytest.mark.slow
def test_exports_with_its_token():
    """The nano of the sheet has none. Below 35 pixels the last map is one pixel wide, a shape that torch.export keeps
    apart from all others when it follows the memory formats behind the token."""
    model = lively(CvT(replace(MICRO, depths=(1, 1, 1)))).eval()
    free = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=35), 3: torch.export.Dim("w", min=35)}
    with torch.no_grad():
        run = torch.export.export(model, (torch.randn(2, 3, 66, 92),), dynamic_shapes=(free,), strict=False).module()
        for shape in ((1, 3, 64, 64), (3, 3, 101, 37), (2, 3, 35, 35)):
            x = torch.randn(shape)
            assert relative(run(x), model(x)) < 1e-5


# options --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"qkv_proj_method": ["avg"] * 3},
        {"qkv_proj_method": ["linear"] * 3},
        {"cls_token": [True, False, True], "stride_kv": [4, 2, 1], "qkv_bias": [False] * 3, "mlp_ratio": [2, 3.0, 4]},
        {"kernel_qkv": [5, 3, 3], "padding_q": [2, 1, 1], "padding_kv": [2, 1, 1], "init": "xavier"},
    ],
)
def test_options_of_the_authors_build_and_learn(options):
    model = keys.build({**SPEC, **options, "num_classes": 4}).train()
    x = torch.randn(4, 3, 45, 70)
    loss = model(x).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    with torch.no_grad():
        for a, b in zip(model.eval().forward_stages(x), model.double().forward_stages(x.double())):
            assert relative(a.double(), b) < 1e-4


def test_specification_in_capitals():
    spec = {k.upper(): v for k, v in SPEC.items()} | {"DROP_PATH_RATE": [0.0, 0.1, 0.2], "STRIDE_Q": [1, 1, 1]}
    config = keys.build({"spec": spec, "num_classes": 3}).config
    assert [config.rates(i) for i in range(3)] == [[0.0], [0.0, 0.1], [0.0, 0.2]]
    assert replace(MICRO, drop_path_rate=0.3).rates(2) == [0.0, 0.3]
    assert replace(MICRO, drop_path_rate=0.3).rates(1) == [0.0, 0.0]


def test_hugging_face_names():
    """Their names, made from ours by hand. Their perceptron has the exact GELU, so their logits are not these."""
    model = CvT(MICRO)
    theirs = {}
    for name, value in model.state_dict().items():
        for ours, other in (
            ("patch_embed.proj", "embedding.convolution_embeddings.projection"),
            ("patch_embed.norm", "embedding.convolution_embeddings.normalization"),
            ("attn.proj.", "attention.output.dense."),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("head.", "classifier."),
            ("blocks.", "layers."),
            ("stage", "cvt.encoder.stages."),
            *(
                pair
                for s, word in (("q", "query"), ("k", "key"), ("v", "value"))
                for pair in (
                    (f"attn.conv_proj_{s}.", f"attention.attention.convolution_projection_{word}."),
                    (f"attn.proj_{s}.", f"attention.attention.projection_{word}."),
                    (f"_{word}.conv.", f"_{word}.convolution_projection.convolution."),
                    (f"_{word}.bn.", f"_{word}.convolution_projection.normalization."),
                )
            ),
        ):
            name = name.replace(ours, other)
        theirs["layernorm" + name[4:] if name.startswith("norm.") else name] = value
    assert "cvt.encoder.stages.2.cls_token" in theirs
    CvT(MICRO).load_state_dict(apply_rules(SOURCES["huggingface"], theirs), strict=True)


def test_sites_groups_and_decay():
    model = CvT(MICRO)
    sites = model.mixer_sites()
    assert [s.path for s in sites] == [f"stage{i}.blocks.{j}.attn" for i, d in enumerate((1, 2, 2)) for j in range(d)]
    assert [(s.call, s.extra) for s in sites] == [("map", 0)] * 3 + [("tokens", 1)] * 2
    assert [s.place.grid for s in sites] == [(56, 56), (28, 28), (28, 28), (14, 14), (14, 14)]
    assert model.no_weight_decay() == {"stage2.cls_token"}


def test_mistakes_advise():
    with pytest.raises(AdviceError, match="each of the 3 stages"):
        replace(MICRO, heads=(1, 2))
    with pytest.raises(AdviceError, match="stride_q must be 1"):
        keys.build({**SPEC, "stride_q": [2, 1, 1]})
    with pytest.raises(AdviceError, match="depth"):
        keys.build({**SPEC, "depths": [1, 1, 1]})
    with pytest.raises(OptionError, match="class_token"):
        lynceus.create_model("cvt_nano", clas_token=(True,))


# learning -------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_convolutions_tell_positions(learn_digits):
    """Card: 99.1% measured on the authors' code without positions; 97% required. bench/cvt.py sets it beside ViTs."""
    from bench.cvt import MICRO as NET

    torch.manual_seed(0)
    reached = learn_digits(CvT(NET), side=16, held=450, epochs=30)
    print(f"digits {100 * reached:.1f}%")
    assert reached >= 0.97
