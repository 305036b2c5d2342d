"""Swapped mixers: identity where nothing changes, hybrids as the card counts them, files that say what was done."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError, OptionError
from lynceus.core.nouns import Rewrite, chain
from lynceus.layers.attention import Attention, MapAttention
from lynceus.layers.hyena import Hyena
from lynceus.layers.mixers import OnTokens
from lynceus.layers.windowed import Windowed
from lynceus.rewrite.swap import Swap, backbone_of, innermost, rewrites_of
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import describe_model, load_model, save_model


def vit(**options):
    torch.manual_seed(0)
    small = {"image_size": (32, 32), "patch_size": 4, "dim": 48, "depth": 4, "heads": 3, "num_classes": 5}
    return lynceus.create_model("deit_tiny", **{**small, **options})


def swin():
    torch.manual_seed(0)
    return lynceus.create_model("swin_nano", num_classes=5)


def image(*size, seed=0):
    return torch.rand(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(seed))


def mixers(model):
    inner = backbone_of(model)
    return [innermost(inner.get_submodule(s.path)) for s in inner.mixer_sites()]


def test_is_a_rewrite():
    swap = Swap(mixer="hyena", blocks=[0, 1])
    assert isinstance(swap, Rewrite)
    assert dataclasses.replace(swap) == swap
    assert swap.blocks == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        swap.mixer = "attention"


@pytest.mark.parametrize("tokens", [{}, {"distilled": True}, {"registers": 3}, {"class_token": False, "pool": "avg"}])
def test_the_same_kind_with_the_old_weights_is_the_identity(tokens):
    """Attention for attention: also the tokens that are no part of the map get what they got."""
    model = vit(**tokens)
    made = Swap(mixer="attention", keep=True)(model)
    assert all(type(m) is MapAttention for m in mixers(made))
    for size in [(32, 32), (21, 40)]:
        assert torch.allclose(made(image(*size)), model(image(*size)), atol=1e-5)
    fresh = Swap(mixer="attention")(model)
    assert not torch.allclose(fresh(image()), model(image()), atol=1e-3)
    for new, site in zip(mixers(fresh), model.mixer_sites()):
        new.load_state_dict(model.get_submodule(site.path).state_dict())
    assert torch.allclose(fresh(image()), model(image()), atol=1e-5)


def test_windows_of_swin_are_kept_too():
    model = swin()
    made = Swap(mixer="window", options={"window": 4}, keep=True)(model)
    assert torch.allclose(made(image(40, 36)), model(image(40, 36)), atol=1e-5)


def test_all_else_keeps_its_weights_and_the_old_model_is_untouched():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    made = Swap(mixer="hyena", blocks="first half")(model, image())
    assert model.training
    assert not made.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in made.parameters()}
    for name, value in made.state_dict().items():
        if ".attn.mixer." not in name:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
@pytest.mark.parametrize("blocks", ["all", "first half"])
def test_families_load_each_others_shared_weights(family, blocks):
    """Attention, hyena and hybrid forms of one network agree in all names but the mixers'."""
    model = swin() if family == "swin" else vit(pool="avg", class_token=False) if family == "vit" else vit()
    made = Swap(mixer="hyena", blocks=blocks)(model)
    other = Swap(mixer="hyena", blocks=blocks, seed=1)(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    missing, extra = other.load_state_dict(model.state_dict(), strict=False)
    assert all(".attn." in n for n in [*missing, *extra])
    shared = [n for n in model.state_dict() if n not in extra]
    assert len(shared) > len(model.state_dict()) // 3
    assert all(torch.equal(other.state_dict()[n], model.state_dict()[n]) for n in shared)
    back = model.load_state_dict(made.state_dict(), strict=False)
    assert set(back.unexpected_keys) == set(missing)


def test_hybrids_are_counted_by_absolute_block():
    """hyena2dattn: blocks 0 to depth // 2; the direction alternates by the number in the whole network."""
    made = Swap(mixer="hyena", blocks="first half")(vit(depth=6))
    kinds = [isinstance(m, Hyena) for m in mixers(made)]
    assert kinds == [True, True, True, True, False, False]
    made = Swap(mixer="hyena", blocks="last half")(vit(depth=6))
    assert [getattr(m, "direction", None) for m in mixers(made)] == [None, None, None, None, "seq", "standard"]
    made = Swap(mixer="hyena", blocks="even")(vit(depth=4))
    assert [type(m) for m in mixers(made)] == [Hyena, Attention, Hyena, Attention]
    assert all(m.direction == "seq" for m in mixers(made)[::2])
    made = Swap(mixer="hyena", blocks=(-1, 1))(vit(depth=4))
    assert [type(m) for m in mixers(made)] == [Attention, Hyena, Attention, Hyena]
    reference = lynceus.create_model("hyena_vit_nano", method="hyena2dattn").config
    assert [reference.hyena(i) for i in range(6)] == kinds


def test_class_tokens_get_the_mean_of_the_mixed_map():
    mixer = nn.Conv2d(4, 4, 1)

    class Pointwise(nn.Module):
        def forward(self, x):
            return mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    x = torch.randn(2, 2 + 12, 4)
    y = OnTokens(Pointwise(), extra=2)(x, (3, 4))
    want = Pointwise()(x[:, 2:].view(2, 3, 4, 4)).view(2, 12, 4)
    assert torch.equal(y[:, 2:], want)
    assert torch.allclose(y[:, :2], want.mean(1, keepdim=True).expand(-1, 2, -1))
    x = torch.randn(2, 13, 4)
    y = OnTokens(Pointwise(), extra=1, where="middle")(x, (3, 4))
    want = Pointwise()(torch.cat([x[:, :6], x[:, 7:]], 1).view(2, 3, 4, 4)).view(2, 12, 4)
    assert torch.equal(torch.cat([y[:, :6], y[:, 7:]], 1), want)
    assert torch.allclose(y[:, 6], want.mean(1))


def test_windows_hold_their_mixer_in():
    """A mixer inside windows of 4: what it says in one window depends on that window alone."""
    made = Swap(mixer="attention", window=4)(vit(class_token=False, pool="avg"))
    first, second = (made.get_submodule(f"blocks.{i}.attn").mixer for i in (0, 1))
    assert (type(first), first.shift, second.shift) == (Windowed, 0, 2)
    x = torch.randn(1, 7, 9, 48, requires_grad=True)
    for windows, rows, columns in [(first, (4, 7), (0, 4)), (second, (2, 6), (2, 6))]:
        x.grad = None
        windows(x)[0, 5, 3].sum().backward()
        reached = x.grad[0].abs().sum(-1) > 0
        inside = torch.zeros(7, 9, dtype=torch.bool)
        inside[rows[0] : rows[1], columns[0] : columns[1]] = True
        assert torch.equal(reached, inside)


def test_hyena_inside_the_windows_of_swin():
    """The paper's Swin: the layer's grid is the window, whatever the stage, and every second block's are moved."""
    made = Swap(mixer="hyena", window=4)(swin())
    sites = made.mixer_sites()
    assert all(m.grid == (4, 4) for m in mixers(made))
    assert [made.get_submodule(s.path).shift for s in sites] == [2 * (s.place.index % 2) for s in sites]
    made.train()(image(29, 35)).square().sum().backward()
    assert all(p.grad is not None for m in mixers(made) for p in m.parameters())


def test_files_of_backbones_of_tasks_and_of_both(tmp_path):
    task = Classify(num_classes=7)
    first, second = Swap(mixer="hyena", blocks="first half"), Swap(mixer="depthwise", blocks=(0, 1), seed=3)
    made = {
        "backbone": first(vit()),
        "twice": chain(first, second)(vit(), None),
        "backbone in a task": task.build(first(vit())),
        "task": first(task.build(vit())),
        "task, twice": second(first(task.build(vit()))),
        "both": second(task.build(first(vit()))),
        "taken out again": task.build(second(first(task.build(vit()))).backbone),
    }
    for name, model in made.items():
        file = save_model(model, tmp_path / name.replace(" ", "-"))
        again = load_model(file)
        for other in (
            again,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            load_model(save_model(again, file)),
        ):
            assert torch.equal(other.eval()(image()), model.eval()(image())), name
        assert rewrites_of(backbone_of(again)) == rewrites_of(backbone_of(model)), name
    assert made["task"].rewrite == first
    assert made["task"].backbone.rewrite == first
    said = describe_model(made["both"])
    assert [s["options"]["mixer"] for s in said["rewrites"]] == ["depthwise"]
    assert [s["options"]["mixer"] for s in said["backbone"]["rewrites"]] == ["hyena"]


def test_seeds_decide_and_nothing_else():
    state = torch.get_rng_state()
    a, b, c = (Swap(mixer="hyena", seed=s)(vit()) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert any(not torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values()))
    torch.set_rng_state(state)
    Swap(mixer="hyena")(vit().double())
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    model = swin()
    torch.manual_seed(0)
    Swap(mixer="hyena")(model)
    assert torch.equal(torch.rand(1), want)
    assert next(Swap(mixer="hyena")(vit().double()).parameters()).dtype == torch.float64


def test_mistakes_are_told(tmp_path):
    with pytest.raises(OptionError, match="hyena"):
        Swap(mixer="hyenna")
    with pytest.raises(OptionError, match="direction"):
        Swap(mixer="hyena", options={"directon": "seq"})
    with pytest.raises(OptionError, match="first half"):
        Swap(mixer="hyena", blocks="first-half")
    with pytest.raises(AdviceError, match="0 to 3"):
        Swap(mixer="hyena", blocks=(4,))(vit())
    with pytest.raises(AdviceError, match="window"):
        Swap(mixer="hyena", window=0)
    with pytest.raises(AdviceError, match="mixer_sites"):
        Swap(mixer="hyena")(lynceus.create_model("resnet_nano"))
    with pytest.raises(AdviceError, match="save_model"):
        Swap(mixer="hyena")(vit()).save_pretrained(tmp_path)
    made = Swap(mixer="hyena")(vit(patch_drop=0.5)).train()
    with pytest.raises(AdviceError, match="patch_drop"):
        made(image())
