"""Importance and cut: every number beside a network written out by hand; what is cut equals what is masked."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus.backbones.swin import Swin, SwinConfig
from lynceus.backbones.vit import ViT, ViTConfig
from lynceus.core.errors import AdviceError
from lynceus.rewrite.split import Cut
from lynceus.rewrite.split.cut import anatomy, even, whole
from lynceus.rewrite.split.importance import Probe, choose, magnitude
from lynceus.rewrite.split.part import cut_head, opened, own_head
from lynceus.rewrite.swap import Swap
from lynceus.tasks.classify import Classify


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double, with weights large enough that every unit matters."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 + 0.3 * torch.randn(p.shape, generator=draw))
    return model.double().eval()


def vit(**options) -> nn.Module:
    base = {"image_size": (8, 8), "patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "num_classes": 5}
    return shaken(ViT(ViTConfig(**{**base, **options})))


def swin(**options) -> nn.Module:
    base = {
        "image_size": (16, 16), "patch_size": 2, "embed_dim": 8, "depths": (2, 1, 1), "num_heads": (2, 4, 4),
        "window_size": 2, "num_classes": 5,
    }  # fmt: skip
    return shaken(Swin(SwinConfig(**{**base, **options})))


NETS = {
    "vit": lambda: vit(),
    "averaged, with every norm": lambda: vit(
        pool="avg", class_token=False, qk_norm=True, attn_norm=True, mlp_norm=True, init_values=0.1, pre_norm=True
    ),
    "distilled, registers off, no last norm": lambda: vit(distilled=True, final_norm=False),
    "swin": lambda: swin(ape=True),
    "swin without patch norm": lambda: swin(patch_norm=False, depths=(1, 2), num_heads=(2, 4)),
}


@pytest.fixture(params=NETS, scope="module")
def net(request):
    return NETS[request.param]()


def pictures(model, count=6, seed=1):
    return torch.randn(
        count, 3, *model.config.image_size, dtype=torch.double, generator=torch.Generator().manual_seed(seed)
    )


def probe_of(model, x, batch=128):
    part, head = opened(model)
    return part, head, Probe(part, head, x, head(part(x)).log_softmax(-1).detach(), batch=batch)


# a plain ViT written out, with units closed ------------------------------------------------------
def by_hand(model, x, channels, heads, hidden):
    """Logits of `vit()` with 0/1 masks over channels (d), heads (L, h) and hidden units (L, m)."""
    p, c = dict(model.named_parameters()), model.config

    def norm(x, name):
        kept = x[..., channels.bool()]
        z = (kept - kept.mean(-1, keepdim=True)) / (kept.var(-1, unbiased=False, keepdim=True) + c.norm_eps).sqrt()
        out = torch.zeros_like(x)
        out[..., channels.bool()] = z * p[f"{name}.weight"][channels.bool()] + p[f"{name}.bias"][channels.bool()]
        return out

    t = nn.functional.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=c.patch_size)
    t = torch.cat([p["cls_token"].expand(len(x), -1, -1), t.flatten(2).mT], 1) + p["pos_embed"]
    b, n, d = t.shape
    for i in range(c.depth):
        name = f"blocks.{i}"
        qkv = norm(t, f"{name}.norm1") @ p[f"{name}.attn.qkv.weight"].T + p[f"{name}.attn.qkv.bias"]
        q, k, v = qkv.view(b, n, 3, c.heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT * (d // c.heads) ** -0.5).softmax(-1) @ v * heads[i].view(1, -1, 1, 1)
        t = t + a.transpose(1, 2).reshape(b, n, d) @ p[f"{name}.attn.proj.weight"].T + p[f"{name}.attn.proj.bias"]
        h = nn.functional.gelu(norm(t, f"{name}.norm2") @ p[f"{name}.mlp.fc1.weight"].T + p[f"{name}.mlp.fc1.bias"])
        t = t + h * hidden[i] @ p[f"{name}.mlp.fc2.weight"].T + p[f"{name}.mlp.fc2.bias"]
    return norm(t, "norm")[:, 0] @ p["head.weight"].T + p["head.bias"]


def test_importance_is_brute_force_zeroing():
    """Exact, fast and a network written out by hand, unit by unit: KL(dense || zeroed), mean over images."""
    model = vit()
    x = pictures(model)
    _, _, probe = probe_of(model, x)
    parts = probe.parts
    ones = [torch.ones(12), torch.ones(2, 3), torch.ones(2, 48)]
    log_p = by_hand(model, x, *ones).log_softmax(-1)
    assert torch.allclose(log_p, model(x).log_softmax(-1), atol=1e-10)
    for key in parts.keys("c") + parts.keys("h") + parts.keys("m"):
        fast, exact = probe.fast(key), probe.exact(key)
        assert (fast - exact).abs().max() < 1e-6
        for unit in range(parts.size(key)):
            masks = [m.clone() for m in ones]
            if key[0] == "c":
                masks[0][unit] = 0
            else:
                masks["chm".index(key[0])][key[1], unit] = 0
            log_q = by_hand(model, x, *masks).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            assert abs(fast[unit] - kl) < 1e-6 * max(1, kl)
            assert kl > 1e-9


def test_fast_equals_exact_on_top_of_what_is_closed(net):
    x = pictures(net)
    _, _, probe = probe_of(net, x, batch=24)
    parts = probe.parts
    for stage, width in enumerate(parts.widths):
        probe.keep(("c", stage), range(0, width, 2))
    for key in (("c", len(parts.widths) - 1), ("h", 0), ("h", len(parts.heads) - 1), ("m", len(parts.heads) - 1)):
        fast, exact = probe.fast(key), probe.exact(key)
        assert (fast - exact).abs().max() < 1e-6
        if key[0] == "c":  # closing what is closed changes nothing
            assert torch.allclose(fast[1::2], torch.full_like(fast[1::2], probe.kl()), atol=1e-12)


def test_the_estimate_ranks_as_the_kl_does(net):
    """Second order: the share of a unit's effect that a quadratic explains; exact in the limit, close in rank."""
    _, _, probe = probe_of(net, pictures(net, 16), batch=256)
    for key in [("c", 0), ("m", len(probe.parts.heads) - 1)]:
        fast, taylor = probe.fast(key), probe.taylor([key])[key]
        rank = torch.corrcoef(torch.stack([fast.argsort().argsort(), taylor.argsort().argsort()]).double())[0, 1]
        assert rank > 0.6


def test_the_estimate_is_the_second_derivative():
    """KL along one gate, by differences, is its square times the estimate; with two classes the sum is exact."""
    model = vit(num_classes=2)
    x = pictures(model)
    _, _, probe = probe_of(model, x)
    taylor, h = probe.taylor([("m", 1)])[("m", 1)], 1e-3
    for unit in range(4):
        mask = torch.ones(1, 48, dtype=torch.double)
        mask[0, unit] = 1 - h
        assert abs(float(probe._mean({("m", 1): mask})) / h**2 / float(taylor[unit]) - 1) < 0.02


def test_cut_equals_masked(net):
    """Really smaller dense modules, whose output is that of the masked dense network: the card's 1e-5."""
    x = pictures(net)
    part, head, probe = probe_of(net, x)
    cut = choose(probe, 1, "fast")
    masked = probe.net(x, probe.closed)
    small = cut(net)
    widths = even(probe.parts, 1, net.config.mlp_ratio)[0]
    assert type(small) is type(net)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())
    assert tuple(len(c) for c in cut.channels) == widths
    assert (small(x).log_softmax(-1) - masked).abs().max() < 1e-9
    feature = part.cut(cut)(x)
    assert feature.shape[1] == part.width * len(cut.channels[-1]) // probe.parts.widths[-1]
    assert (cut_head(head, cut, probe.parts.widths[-1])(feature).log_softmax(-1) - masked).abs().max() < 1e-9


def test_cutting_nothing_is_the_identity(net):
    x = pictures(net)
    assert torch.equal(whole(anatomy(net))(net)(x), net(x))
    part, head = opened(net)
    assert torch.allclose(head(part(x)), net(x), atol=1e-12)


def test_cuts_after_cuts_are_one_cut(net):
    x = pictures(net)
    parts = anatomy(net)
    if parts.unit < 3:
        pytest.skip("one share to lose")
    _, _, probe = probe_of(net, x)
    first = choose(probe, 1, "magnitude")
    once = first(net)
    _, _, probe = probe_of(once, x)
    second = choose(probe, 1, "magnitude")
    assert torch.equal(first.then(second)(net)(x), second(once)(x))


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4), each=st.integers(2, 5), depth=st.integers(1, 3), pruned=st.integers(0, 3),
    ratio=st.sampled_from([1.0, 2.5, 4.0]), seed=st.integers(0, 10), count=st.integers(1, 3),
)  # fmt: skip
def test_cut_equals_masked_for_any_shape(heads, each, depth, pruned, ratio, seed, count):
    model = vit(dim=heads * each, heads=heads, depth=depth, mlp_ratio=ratio)
    shaken(model, seed)
    x = pictures(model, count, seed)
    _, _, probe = probe_of(model, x)
    if pruned >= heads:
        with pytest.raises(AdviceError, match="cannot be pruned"):
            choose(probe, pruned, "random")
        return
    cut = choose(probe, pruned, "random", seed=seed)
    assert (cut(model)(x).log_softmax(-1) - probe.net(x, probe.closed)).abs().max() < 1e-9


def test_log_of_zero_and_the_direction():
    """A class that the dense model rules out costs nothing; one that only the pruned one rules out costs much."""
    model = vit(num_classes=2)
    x = pictures(model, 2)
    part, head = opened(model)
    sure = torch.tensor([[0.0, -2000.0]] * 2, dtype=torch.double)
    probe = Probe(part, head, x, sure)
    want = -head(part(x)).log_softmax(-1)[:, 0].mean().detach()
    assert abs(probe.kl() - float(want)) < 1e-12
    assert probe.fast(("h", 0)).isfinite().all()


def test_magnitude_is_the_norm_of_a_units_weights():
    model = vit()
    state = model.state_dict()
    rows = state["blocks.0.mlp.fc1.weight"][3].square().sum() + state["blocks.0.mlp.fc1.bias"][3] ** 2
    want = (rows + state["blocks.0.mlp.fc2.weight"][:, 3].square().sum()).sqrt()
    assert torch.isclose(magnitude(model, ("m", 0))[3], want)
    qkv = state["blocks.1.attn.qkv.weight"].view(3, 3, 4, 12)[:, 1].square().sum()
    qkv = qkv + state["blocks.1.attn.qkv.bias"].view(3, 3, 4)[:, 1].square().sum()
    want = (qkv + state["blocks.1.attn.proj.weight"][:, 4:8].square().sum()).sqrt()
    assert torch.isclose(magnitude(model, ("h", 1))[1], want)


def test_other_is_as_likely_as_all_foreign_classes_alike():
    head = nn.Linear(4, 6)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    made = own_head(head, (1, 4))
    assert torch.allclose(made(torch.randn(1, 4)).softmax(-1), torch.tensor([[1 / 6, 1 / 6, 4 / 6]]))


# what cannot be cut ------------------------------------------------------------------------------
def test_networks_that_cannot_be_cut_are_named():
    with pytest.raises(AdviceError, match="resnet_nano"):
        opened(lynceus.create_model("resnet_nano"))
    swapped = Swap(mixer="hyena", blocks=(1,))(lynceus.create_model("vit_nano"))
    with pytest.raises(AdviceError, match=r"blocks\.1\.attn is a OnTokens"):
        opened(swapped)
    with pytest.raises(AdviceError, match="Swin-MLP"):
        opened(lynceus.create_model("swin_nano", mixer="mlp"))
    with pytest.raises(AdviceError, match="no classifier"):
        opened(lynceus.create_model("vit_nano", num_classes=0))


def test_uneven_heads_and_wrong_cuts_are_told():
    odd = swin(depths=(1, 1), num_heads=(1, 4))
    _, _, probe = probe_of(odd, pictures(odd))
    with pytest.raises(AdviceError, match="no common divisor"):
        choose(probe, 1, "random")
    model = vit()
    cut = whole(anatomy(model))
    with pytest.raises(AdviceError, match="cut by one share: 8, 2 and 32"):
        dataclasses.replace(cut, channels=(tuple(range(8)),))(model)
    with pytest.raises(AdviceError, match="increasing numbers from 0 to 11"):
        dataclasses.replace(cut, channels=((0, 0, 40),))(model)
    with pytest.raises(AdviceError, match="for 1 blocks; the network has 2"):
        dataclasses.replace(cut, heads=cut.heads[:1])(model)
    with pytest.raises(AdviceError, match="measure of importance"):
        choose(probe_of(model, pictures(model))[2], 1, "gradient")


def test_a_cut_classifier_keeps_its_task_and_trains():
    model = Classify(classes=["a", "b", "c"], image_size=16).build(lynceus.create_model("vit_nano", num_classes=3))
    parts = anatomy(model.backbone)
    counts = even(parts, 1, 4.0)
    cut = Cut(**{n: tuple(tuple(range(k)) for k in c) for n, c in zip(("channels", "heads", "hidden"), counts)})
    small = cut(model, torch.rand(2, 3, 16, 16))
    assert small.classes == ["a", "b", "c"]
    assert small.backbone.config.dim == 64
    small(torch.rand(2, 3, 20, 20)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
