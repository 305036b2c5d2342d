"""Pruning through the dependency graph: fused then pruned equals pruned then fused; pruned equals masked; what goes
together goes together; what cannot go is said."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import chain
from lynceus.rewrite.adapters import Adapt, Fuse, KeepChannels, PruneChannels, adapt, fuse, prune
from lynceus.rewrite.adapters.prune import merged, packed_bits, unpacked_bits
from lynceus.rewrite.dependency import dependencies
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, group norm, a concatenation, a residual sum, flatten to linear."""

    def __init__(self, groups=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(3, 12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.side = nn.Conv2d(12, 8, 1)
        self.after = nn.Conv2d(20, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = x + self.norm(self.grouped(x)).relu()
        y = self.depthwise(y)
        z = torch.cat([y, self.side(x).relu()], 1)
        return self.fc(self.after(z).relu().flatten(1))


def stirred(model, by=0.05):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model


def example(side=8, count=2):
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


NETS = {
    "resnet18, 16 wide": lambda: lynceus.create_model("resnet18", num_classes=5, width=16),
    "vit_tiny": lambda: lynceus.create_model("vit_tiny", num_classes=5),
    "grouped 2": lambda: Grouped(2),
    "grouped 6": lambda: Grouped(6),
    "encoder": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 16), nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    ),
}


@pytest.mark.parametrize("name", [*NETS, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_pruned_then_fused_is_fused_then_pruned(name):
    torch.manual_seed(0)
    x = example(8 if name.startswith("grouped") or name == "encoder" else 32)
    net = lynceus.create_model(name, num_classes=5) if name == "resnet18" else NETS[name]()
    model = stirred(adapt(net, "splora", 3, quiet=True).double()).eval()
    with torch.no_grad():
        first = prune(model, 0.4, example=x)
        second = prune(fuse(model), 0.4, example=x)
        assert sum(p.numel() for p in second.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
        fused = fuse(first, pack=False)
        got, want = fused(x), second(x)
        spread = want.std()
        assert float((got - want).abs().max() / spread) < 1e-12
        state, other = fused.state_dict(), second.state_dict()
        assert {n for n in state if n in other and state[n].shape != other[n].shape} == set()


SLOWER = ("volo_nano", "vim_nano", "timm:mobilenetv3_small_050")  # seconds each


@settings(max_examples=12, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3, 4, 6, 12]),
    ratio=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
)
def test_pruned_is_masked(groups, ratio, seed, batch):
    """Removing channels is what zeroing their outgoing weights does, whatever goes."""
    torch.manual_seed(seed)
    net = Grouped(groups).double().eval()
    net.norm = nn.BatchNorm2d(12).double().eval()
    x = example(count=batch)
    small = prune(net, ratio, example=x)
    masked = copy.deepcopy(net)
    for (name, dim), mask in small.rewrite.selection().masks.items():
        weight = masked.get_parameter(name) if "running" not in name and "num" not in name else None
        if weight is not None and dim == 1:
            weight.data[:, ~torch.from_numpy(mask)] = 0
    layer, gone = masked.grouped, small.rewrite.selection().masks.get(("grouped.weight", 0))
    if gone is not None and groups > 1:  # inputs of a grouped convolution have no column of their own
        layer.weight.data[~torch.from_numpy(gone)] = 0
    with torch.no_grad():
        assert torch.allclose(small(x), masked(x), atol=1e-10)


def test_heads_and_the_width_of_tokens_are_pruned_apart():
    torch.manual_seed(0)
    net = lynceus.create_model("vit_nano", num_classes=5).double().eval()
    x = example(32)
    heads = np.ones(3 * 96, dtype=bool).reshape(3, 3, 32)
    heads[:, 1] = False
    small = prune(net, masks={"blocks.2.attn.qkv": torch.from_numpy(heads.ravel())}, example=x)
    attn = small.blocks[2].attn
    assert (attn.heads, attn.head_dim, attn.qkv.out_features, attn.proj.in_features) == (2, 32, 192, 64)
    assert attn.proj.out_features == 96
    masked = copy.deepcopy(net)
    masked.blocks[2].attn.proj.weight.data[:, 32:64] = 0
    with torch.no_grad():
        assert torch.allclose(small(x), masked(x), atol=1e-12)
    narrow = prune(net, masks={"patch_embed.proj": range(50)}, example=x)
    assert {b.attn.heads for b in narrow.blocks} == {3}
    assert narrow.blocks[0].attn.qkv.weight.shape == (288, 50)
    assert narrow.pos_embed.shape[-1] == narrow.num_features == narrow.stages[0].channels == 50


@pytest.mark.parametrize(
    "name", ["swin_nano", "convnext_nano", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)]
)
def test_backbones_prune_run_and_train(name):
    torch.manual_seed(0)
    net = lynceus.create_model(name, num_classes=5).eval()
    x = torch.rand(2, 3, 32, 32)
    small = prune(net, 0.3, example=x, scope="layer")
    assert cost(small, x).macs < cost(net, x).macs
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.ndim > 1 and p.requires_grad) or name == "vim_nano"


def test_a_width_in_the_code_is_found_on_trial():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.third(self.second(self.first(x).view(-1, 6)).relu())

    net, x = Written(), torch.rand(3, 4)
    graph = dependencies(net, x)
    assert [b.layers for b in graph.bundles] == [("second",)]
    with pytest.raises(AdviceError, match=r"'first' cannot be pruned.*written down as a number"):
        prune(net, masks={"first": [0, 1]}, example=x)


# counts -------------------------------------------------------------------------------------------
def test_multiply_adds_are_those_counted_from_the_masks():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(48, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5),
    ).eval()  # fmt: skip
    x = torch.rand(1, 3, 8, 8)
    small = prune(net, 0.6, example=x)
    masks = small.rewrite.selection().masks
    kept = {n: int(masks[f"{n}.weight", 0].sum()) for n in ("0", "3", "5")}
    counted = 3 * kept["0"] * 9 * 64 + kept["0"] * kept["3"] * 9 * 16 + kept["3"] * kept["5"] * 16 + kept["5"] * 5
    assert cost(small, x).macs == counted
    channels = 32 + 48 + 40
    assert sum(kept.values()) == channels - round(0.6 * channels)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_masks_as_bits(bits):
    mask = np.array(bits)
    assert np.array_equal(unpacked_bits(packed_bits(mask)), mask)


@settings(max_examples=15, deadline=None)
@given(
    first=st.integers(2, 20), second=st.integers(2, 20), ratio=st.floats(0, 0.95), multiple=st.integers(1, 8),
    scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_widths_left_are_multiples_or_whole(first, second, ratio, multiple, scope, seed):
    """Rounded up, by importance: what stays without rounding stays with it."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(3, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)
    ).eval()
    x, kept = torch.rand(2, 3), {}
    for number in (1, multiple):
        small = prune(net, ratio, example=x, scope=scope, multiple=number)
        masks = small.rewrite.selection().masks
        kept[number] = [masks.get((f"{n}.weight", 0), np.ones(w, bool)) for n, w in (("0", first), ("2", second))]
        assert small(x).shape == (2, 2)
    for free, rounded in zip(kept[1], kept[multiple]):
        left = int(rounded.sum())
        assert left == min(-(-int(free.sum()) // multiple) * multiple, len(rounded))
        assert (rounded | ~free).all()
    if kept[multiple][0].all() and kept[multiple][1].all():
        assert torch.equal(small(x), net(x))


def test_multiples_count_outputs_of_coupled_layers_and_heads():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    small = prune(lynceus.create_model("resnet_nano", num_classes=5), 0.4, example=x, multiple=8)
    assert {m.out_channels % 8 for m in small.modules() if isinstance(m, nn.Conv2d)} == {0}
    vit = prune(lynceus.create_model("vit_nano", num_classes=5), 0.4, example=x, scope="layer", multiple=8)
    assert {b.attn.heads for b in vit.blocks} == {2}  # a head of 32 is a multiple already
    assert {b.mlp.fc1.out_features for b in vit.blocks} == {232}  # 230.4 are asked for
    assert vit.num_features == 64  # 58


def test_a_layer_as_wide_as_the_rank_is_pruned_further():
    """The rank's axis is no channel, even where the sizes are the same."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2)
    )
    x = torch.rand(2, 3, 8, 8)
    small = prune(adapt(net, rank=8, full="5"), 0.5, example=x, scope="layer")
    assert [small[0].out_channels, small[3].out_channels] == [4, 4]
    assert [tuple(small[3].adapter.rows.shape), tuple(small[3].adapter.cols.shape)] == [(1, 8, 4), (1, 4, 8)]


def test_two_prunings_are_one_plan():
    torch.manual_seed(0)
    net, x = Grouped().eval(), torch.rand(2, 3, 8, 8)
    once = prune(net, 0.3, example=x)
    twice = prune(once, 0.3, example=x)
    assert isinstance(twice.rewrite, KeepChannels)
    assert not hasattr(twice.original, "rewrite")
    assert torch.equal(twice.rewrite(net)(x), twice(x))
    empty = KeepChannels()
    assert merged(once.rewrite, empty) == once.rewrite
    assert torch.equal(prune(net, 0.0, example=x)(x), net(x))


@pytest.mark.parametrize("importance", ["l1", "l2", "gradient", "taylor", "lrp"])
def test_a_useless_channel_goes_first(importance):
    """Channel 3 of the first layer reaches nothing; for magnitude it is tiny."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()
    with torch.no_grad():
        net[3].weight.view(4, 6, 36)[:, 3] = 0
        net[0].weight[3] *= 1e-3
    small = prune(net, 1 / 6, importance=importance, example=torch.rand(8, 3, 8, 8))
    assert small.rewrite.selection().masks["0.weight", 0].tolist() == [True, True, True, False, True, True]


def test_importance_is_of_the_adapted_weight():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4))
    made = adapt(net, "splora", 1)
    with torch.no_grad():
        made[0].adapter.rows.fill_(1)
        made[0].adapter.cols.copy_(torch.tensor([[[9.0], [9.0], [-3.0]]]))
    small = prune(made, 1 / 3, example=torch.rand(2, 4))
    assert small.rewrite.selection().masks["0.weight", 0].tolist() == [True, True, False]


def test_a_loss_of_ones_own():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False)).eval(), torch.rand(5, 4)
    with pytest.raises(AdviceError, match="needs a loss"):
        prune(nn.Sequential(net, nn.Unflatten(1, (1, 2))), 0.3, importance="taylor", example=x)
    small = prune(net, 0.34, importance="gradient", example=x, loss=lambda m: m(x)[:, 0].sum())
    assert small[0].out_features == 4


# saved, exported, chained -------------------------------------------------------------------------
def test_a_chain_saves_loads_trains_and_exports(tmp_path):
    torch.manual_seed(0)
    model = Classify(num_classes=5).build(lynceus.create_model("resnet_nano")).eval()
    x = torch.rand(2, 3, 16, 16)
    steps = [Adapt(rank=4), PruneChannels(ratio=0.4), PruneChannels(ratio=0.3, importance="taylor"), Fuse()]
    for k in range(1, len(steps) + 1):
        made = chain(*steps[:k])(model, x)
        save_model(made, tmp_path / str(k))
        again = load_model(tmp_path / str(k))
        assert torch.equal(again(x), made(x))
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in made.named_parameters() if p.requires_grad
        }
    save_model(made.backbone, tmp_path / "backbone")
    assert torch.equal(load_model(tmp_path / "backbone")(x), made.backbone(x))
    program = torch.export.export(made, (x,))
    assert torch.allclose(program.module()(x), made(x), atol=1e-5)
    adapted = chain(*steps[:3])(model, x)
    dense = torch.export.export(adapted, (x,)).module()
    assert torch.allclose(dense(x), adapted(x), atol=1e-5)


# what is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"in \[0, 1\), not 1.0; 0.7 leaves 30%"),
        ({"importance": "size"}, "There is no importance"),
        ({"scope": "all"}, "There is no scope"),
        ({"least": 0}, "least is at least 1"),
        ({"multiple": 0}, "multiple is at least 1"),
        ({"names": "["}, "no regular expression"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(AdviceError, match=message):
        PruneChannels(**options)


def test_masks_that_cannot_be():
    net, x = lynceus.create_model("vit_nano", num_classes=5), torch.rand(1, 3, 32, 32)
    with pytest.raises(AdviceError, match="go together"):
        prune(net, masks={"blocks.0.attn.qkv": range(100)}, example=x)
    with pytest.raises(AdviceError, match="'head' cannot be pruned: what they are is given out by the model"):
        prune(net, masks={"head": [0, 1]}, example=x)
    with pytest.raises(AdviceError, match=r"no layer 'blocks\.9\.mlp\.fc1'"):
        prune(net, masks={"blocks.9.mlp.fc1": [0]}, example=x)
    with pytest.raises(AdviceError, match="has outputs 0 to 383"):
        prune(net, masks={"blocks.0.mlp.fc1": [0, 384]}, example=x)
    with pytest.raises(AdviceError, match="Nothing would be left"):
        prune(net, masks={"blocks.0.mlp.fc1": []}, example=x)
    with pytest.raises(AdviceError, match="Give one of both"):
        prune(net, example=x)
    with pytest.raises(AdviceError, match="follows the channels of an example"):
        PruneChannels()(net, None)
    with pytest.raises(AdviceError, match="No prunable layer fits"):
        prune(net, 0.5, names="nowhere", example=x)
    with pytest.raises(AdviceError, match="No channel of Linear can be pruned"):
        prune(nn.Linear(3, 2), 0.5, example=torch.rand(1, 3))


def test_a_plan_of_another_model_is_refused():
    x = torch.rand(1, 3, 32, 32)
    small = prune(lynceus.create_model("vit_nano"), 0.2, example=x)
    with pytest.raises(AdviceError, match="The masks are of another model"):
        small.rewrite(lynceus.create_model("resnet_nano"))
