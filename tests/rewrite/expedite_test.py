"""Expedite: clustering and reconstruction around a span of blocks, in ViT, Swin, SAM's encoder and timm's ViT."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus.backbones.sam_vit import SamViT, SamViTConfig
from lynceus.backbones.vit import ViT, ViTConfig
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import chain
from lynceus.layers.gated_position import GatedPositionAttention
from lynceus.rewrite.expedite import Expedite, cluster, naive_unpool, reconstruction_weights
from lynceus.rewrite.expedite.operators import Near, allowed, cells, means, squared_distances
from lynceus.rewrite.swap import Swap
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

IDENTITY = {"iterations": 0, "neighbours": 1}  # with as many clusters as tokens


def vit(**changes):
    torch.manual_seed(0)
    fields = {"image_size": (24, 32), "patch_size": 4, "dim": 32, "depth": 5, "heads": 2, "num_classes": 5, **changes}
    return ViT(ViTConfig(**fields)).eval()


def sam(**changes):
    torch.manual_seed(0)
    fields = {"image_size": (32, 32), "patch_size": 2, "dim": 32, "depth": 5, "heads": 2, "out": 16, "window": 8}
    made = SamViT(SamViTConfig(**{**fields, "global_blocks": (2, 4), "levels": (0, 1, 2, 3), **changes})).eval()
    for name, p in made.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(p, std=0.1)
    return made


def zoo(name):
    torch.manual_seed(0)
    return lynceus.create_model(name, num_classes=5).eval()


def lively(name, **changes):
    """Branches that start at nothing would hide a fault."""
    torch.manual_seed(0)
    made = lynceus.create_model(name, num_classes=5, **changes)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return made


# network, clusters that are all tokens, fewer clusters, size of the picture
HOSTS = {
    "vit": (vit, (6, 8), (3, 5), (24, 32)),
    "vit without class token": (lambda: vit(class_token=False, pool="avg"), (6, 8), (4, 4), (24, 32)),
    "sam": (sam, (8, 8), (5, 4), (32, 48)),
    "swin": (lambda: zoo("swin_nano"), (4, 4), (3, 3), (32, 64)),
    "swin v2": (lambda: zoo("swin_v2_nano"), (4, 4), (2, 2), (32, 64)),
    "convit": (lambda: lively("convit_nano", local_layers=3), (8, 16), (5, 9), (32, 64)),
    "convit, class token before": (lambda: lively("convit_nano", local_layers=1), (8, 16), (5, 9), (32, 64)),
    "hyena": (lambda: lively("hyena_vit_nano", depth=3), (8, 16), (5, 9), (32, 64)),
    "volo": (lambda: lively("volo_nano"), (4, 8), (3, 5), (32, 64)),
    "cvt": (lambda: lively("cvt_nano"), (4, 8), (3, 5), (32, 64)),
    "cvt with class token": (lambda: lively("cvt_nano", class_token=(False, False, True)), (4, 8), (3, 5), (32, 64)),
    "soft": (lambda: lively("soft_nano", depths=(1, 2, 1, 1)), (8, 16), (4, 8), (32, 64)),
    "soft, last stage": (lambda: lively("soft_nano", depths=(1, 1, 1, 2)), (2, 4), (1, 3), (32, 64)),
    "resnas": (lambda: lively("resnas_nano"), (8, 16), (5, 9), (32, 64)),
    "timm": (lambda: lynceus.create_model("timm:test_vit", image_size=(32, 64)).eval(), (2, 4), (2, 2), (32, 64)),
}


@pytest.fixture(params=HOSTS, ids=lambda n: n.replace(" ", "_"))
def host(request):
    build, whole, fewer, size = HOSTS[request.param]
    return build(), whole, fewer, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# the operators ----------------------------------------------------------------------------------------
def features(b, n, c, seed=0):
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 3, 5]), st.integers(0, 99))
def test_as_many_clusters_as_tokens_is_the_identity(h, w, c, window, seed):
    x = features(2, h * w, c, seed)
    for options in ({"iterations": 0}, {"iterations": 2, "temperature": 1e9}):
        found = cluster(x, (h, w), (h, w), window=window, **options)
        assert torch.allclose(found.rebuild(found.centres, 1), x, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 11), st.integers(2, 11), st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]))
def test_gathering_is_the_dense_table(h, w, rows, columns, window):
    x, grid = features(2, h * w, 6, h * w), (min(rows, h), min(columns, w))
    dense, gathered = (
        cluster(x, (h, w), grid, iterations=3, temperature=0.3, window=window, route=r) for r in ("dense", "gather")
    )
    assert torch.allclose(dense.centres, gathered.centres, atol=1e-10)


def test_the_definition_written_out():
    h, w, rows, columns, tau, far = 6, 7, 3, 2, 0.4, 0
    x = features(1, h * w, 5)[0]
    found = cluster(x[None], (h, w), (rows, columns), iterations=2, temperature=tau, window=1)
    at = [(i * rows // h, j * columns // w) for i in range(h) for j in range(w)]
    s = F.adaptive_avg_pool2d(x.T.reshape(1, 5, h, w), (rows, columns)).flatten(2)[0].T
    for _ in range(2):
        table = torch.full((rows * columns, h * w), float("inf"), dtype=torch.float64)
        for p, (a, b) in enumerate(at):
            for i in range(rows * columns):
                if abs(i // columns - a) <= far and abs(i % columns - b) <= far:
                    table[i, p] = (x[p] - s[i]).square().sum()
        q = (-tau * table).softmax(0)
        s = (q @ x) / q.sum(1, keepdim=True).clamp(min=1e-16)
    assert torch.allclose(found.centres[0], s)
    assert torch.equal(found.labels()[0], torch.cdist(x, s).argmin(1))


def test_who_sees_whom():
    rows, columns = cells(10, 4, torch.zeros(1)), cells(6, 5, torch.zeros(1))
    mask = allowed(rows, columns, (4, 5), 3)
    again = torch.zeros_like(mask)
    for at, valid in Near(rows, columns, (4, 5), 3):
        again[valid.nonzero()[:, 0], at[valid]] = True
    for p in range(60):
        for i in range(20):
            want = abs(rows[p // 6] - i // 5) <= 1 and abs(columns[p % 6] - i % 5) <= 1
            assert bool(mask[p, i]) == bool(want)
    assert torch.equal(mask, again)


@pytest.mark.parametrize("k", [1, 4, 20, -1, 99])
def test_weights_sum_to_one_or_have_length_one(k):
    found = cluster(features(2, 64, 8), (8, 8), (6, 6), temperature=0.001)
    plain, released = found.weights(k), found.weights(k, "l2")
    count = min(k, 36) if k > 0 else 36
    assert torch.allclose(plain.sum(-1), torch.ones(2, 64, dtype=torch.float64))
    assert torch.allclose(released.square().sum(-1), torch.ones(2, 64, dtype=torch.float64))
    assert int((plain > 0).sum(-1).min()) == count
    assert torch.allclose(released.sum(-1), torch.tensor(count**0.5, dtype=torch.float64), rtol=0.02)


def test_ties_with_the_last_neighbour_are_kept():
    x = torch.zeros(1, 3, 2)
    centres = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [5, 5]]])
    assert (reconstruction_weights(x, centres, neighbours=1) > 0).sum(-1).tolist() == [[3, 3, 3]]


def test_far_tokens_still_get_rebuilt():
    """In float32 exp(-tau D) of all centres may be nothing at all: the nearest one then counts alone."""
    x, centres = torch.full((1, 2, 4), 1e3), torch.zeros(1, 3, 4)
    assert torch.equal(reconstruction_weights(x, centres + torch.arange(3.0)[:, None])[0, 0], torch.tensor([0, 0, 1.0]))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_gives_numbers(kind):
    x = 8 * features(2, 64, 16)
    found = cluster(x.to(kind), (8, 8), (4, 4), window=3)
    assert found.centres.dtype == kind
    back = found.rebuild(found.centres)
    assert back.dtype == kind
    assert bool(back.isfinite().all())
    want = cluster(x, (8, 8), (4, 4), window=3)
    assert float((back.double() - want.rebuild(want.centres)).abs().max()) < 0.2


def test_distances_are_never_negative():
    x = 1e3 + torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    assert float(squared_distances(x, x).min()) >= 0


def test_auto_temperature_follows_the_scale_of_each_image():
    x = features(2, 64, 8)
    x[1] *= 50
    found = cluster(x, (8, 8), (4, 4), temperature="auto")
    alone = [cluster(x[i : i + 1], (8, 8), (4, 4), temperature="auto") for i in range(2)]
    assert torch.allclose(found.centres, torch.cat([a.centres for a in alone]))
    scaled = cluster(7 * x, (8, 8), (4, 4), temperature="auto")
    assert torch.allclose(scaled.centres, 7 * found.centres)
    assert torch.allclose(scaled.rebuild(scaled.centres), 7 * found.rebuild(found.centres))


def test_gradients_flow_through_tokens_and_not_through_assignments():
    x = features(1, 16, 3).requires_grad_()
    centres = cluster(x, (4, 4), (2, 2), iterations=3, temperature=0.5).centres
    (jacobian,) = torch.autograd.grad(centres[0, 0, 0], x)
    assert torch.count_nonzero(jacobian[0, :, 1:]) == 0  # a mean with fixed weights stays inside its channel
    assert torch.allclose(jacobian[0, :, 0].sum(), torch.ones((), dtype=torch.float64))
    z = features(1, 4, 3, 1).requires_grad_()
    s = features(1, 4, 3, 2).requires_grad_()
    weights = lambda s: reconstruction_weights(x.detach(), s, neighbours=-1)  # noqa: E731
    assert torch.autograd.gradcheck(lambda s, z: weights(s) @ z, (s, z))


def test_memory_of_the_operator():
    """Two tables tokens x centres at most; gathered, one of tokens x window squared; beside copies of the tokens."""
    from lynceus.core.counter import Counting

    n, c, grid, window = 48 * 48, 4, (32, 32), 5
    for route, entries in (("dense", 2 * n * 1024), ("gather", n * window**2)):
        x = torch.empty(1, n, c, device="meta")
        with torch.no_grad(), (counting := Counting()):
            found = cluster(x, (48, 48), grid, window=window, route=route)
            if route == "dense":
                found.rebuild(found.centres)
        assert counting.peak <= 4 * (entries + 8 * n * c), (route, counting.peak / 4 / n)


# the rewrite ------------------------------------------------------------------------------------------
def test_identity_limits(host):
    model, whole, _, x = host
    for options in (IDENTITY, {"iterations": 2, "temperature": 1e7, "neighbours": 1}):
        fast = Expedite(alpha=1, clusters=whole, **options)(model, None)
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
            for a, b in zip(fast.forward_stages(x), model.forward_stages(x), strict=True):
                assert torch.allclose(a, b, atol=1e-5)


@settings(max_examples=2, deadline=None)
@given(st.integers(9, 48), st.integers(9, 48), st.integers(0, 2))
@pytest.mark.parametrize("name", HOSTS)
def test_identity_on_any_rectangle(name, high, wide, alpha):
    model, fast = plain_and_whole(name, alpha)
    x = torch.randn(1, 3, high, wide, generator=torch.Generator().manual_seed(high * wide))
    with torch.no_grad():
        for a, b in zip([fast(x), *fast.forward_stages(x)], [model(x), *model.forward_stages(x)], strict=True):
            assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.std(correction=0))))


@functools.cache
def plain_and_whole(name, alpha):
    """A network, and the same with as many clusters as tokens in every image."""
    model = HOSTS[name][0]()
    windows = name.startswith(("swin", "sam"))
    return model, Expedite(alpha=alpha, clusters=HOSTS[name][1] if windows else (99, 99), **IDENTITY)(model)


def test_positions_of_clusters_are_averages_over_their_cells():
    """What gated positional attention gives a cluster: the mean of its queries' attention, summed over the keys'."""
    torch.manual_seed(0)
    layer = GatedPositionAttention(24, 4).double()
    nn.init.normal_(layer.pos_proj.weight, std=0.2)
    fine = torch.einsum("gyv,gxu->gyxvu", *layer.position(6, 8))
    coarse = torch.einsum("gyv,gxu->gyxvu", *layer.position(3, 4, (6, 8)))
    cells = fine.reshape(4, 3, 2, 4, 2, 3, 2, 4, 2).mean((2, 4)).sum((4, 6))
    assert torch.allclose(coarse, cells)
    for size in ((6, 8), (5, 3), (4, 7)):
        rows, columns = layer.position(*size, (6, 8))
        assert torch.allclose(rows.sum(-1), torch.ones(4, size[0], dtype=torch.float64))
        assert torch.allclose(columns.sum(-1), torch.ones(4, size[1], dtype=torch.float64))


def test_clusters_of_a_gated_attention_mix_as_their_cells_do():
    """With content switched off and tokens that are the same all over a cluster, clusters get the averages."""
    torch.manual_seed(0)
    layer = GatedPositionAttention(24, 4).double().eval()
    with torch.no_grad():
        layer.gating_param.fill_(50.0)
        coarse = torch.randn(1, 3, 4, 24, dtype=torch.float64)
        fine = layer(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2))
        assert torch.allclose(layer(coarse, (6, 8)), fine.unflatten(2, (4, 2)).unflatten(1, (3, 2)).mean((2, 4)))


def test_a_span_over_two_groups_of_volo():
    """The groups of the coarse map count as one; what leaves the first of them is rebuilt for whoever reads it."""
    net = lively("volo_nano")
    fast, x = Expedite(alpha=1, beta=2, clusters=(3, 4), temperature=0.1)(net), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        maps = fast.forward_stages(x)
        assert torch.equal(maps[0], net.forward_stages(x)[0])
        first, second, last = net.network[2], net.network[3], net.forward_stages(x)[3]
        y = first[0](net.entered(net.run(net.embed(x))[0], 1))
        found = cluster(y.flatten(1, 2), (4, 6), (3, 4), temperature=0.1)
        z = first[1](found.centres.unflatten(1, (3, 4)))
        assert torch.allclose(maps[1].flatten(2).mT, found.rebuild(z.flatten(1, 2)), atol=1e-5)
        z = found.rebuild(second[0](z).flatten(1, 2)).unflatten(1, (4, 6))
        assert torch.allclose(maps[2].permute(0, 2, 3, 1), second[1](z), atol=1e-5)
        assert maps[3].shape == last.shape
        assert torch.equal(fast.stages_up_to(x, 1)[1], maps[1])


def test_alpha_behind_the_last_block_changes_nothing(host):
    model, _, fewer, x = host
    fast = Expedite(alpha=50, clusters=fewer)(model, x)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        assert all(torch.equal(a, b) for a, b in zip(fast.forward_stages(x), model.forward_stages(x), strict=True))


def test_shapes_state_batches_and_the_old_model(host):
    model, _, fewer, x = host
    before = copy.deepcopy(model.state_dict())
    fast = Expedite(alpha=1, clusters=fewer, temperature="auto")(model, x)
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())
    with torch.no_grad():
        features, maps = fast.forward_intermediates(x)
        assert features.shape == model.forward_features(x).shape
        assert [m.shape for m in maps] == [m.shape for m in model.forward_stages(x)]
        assert all(torch.equal(a, b) for a, b in zip(maps, fast.forward_stages(x), strict=True))
        assert not torch.allclose(fast(x), model(x), atol=1e-5)
        one = torch.cat([fast(x[i : i + 1]) for i in range(2)])
        assert torch.allclose(fast(x), one, atol=1e-5)
    assert cost(fast, x).macs < cost(model, x).macs


@pytest.mark.parametrize("size", [(24, 32), (28, 20), (36, 61)])
def test_any_size_of_picture(size):
    x = torch.randn(1, 3, *size)
    for options in ({"clusters": (3, 5)}, {}):
        fast = Expedite(alpha=1, **options)(vit())
        assert [m.shape for m in fast.forward_stages(x)] == [m.shape for m in vit().forward_stages(x)]
    net = sam()
    assert Expedite(alpha=1, clusters=(3, 4))(net, x).forward_stages(x)[-1].shape == net.forward_stages(x)[-1].shape
    swin = zoo("swin_nano")
    assert [m.shape for m in Expedite(alpha=1)(swin).forward_stages(x)] == [m.shape for m in swin.forward_stages(x)]


def test_levels_between_get_rebuilt_maps():
    """The map of a level inside the span is its cluster tokens, rebuilt with the weights of the clustering."""
    net, x = vit(levels=(0, 1, 2, 3, 4), num_classes=0), torch.randn(2, 3, 24, 32)
    fast = Expedite(alpha=2, beta=2, clusters=(3, 4), temperature=0.1)(net)
    with torch.no_grad():
        maps = fast.forward_stages(x)
        tokens = net.run(x, [1])[1][0]
        found = cluster(tokens[:, 1:], (6, 8), (3, 4), temperature=0.1)
        y = torch.cat([tokens[:, :1], found.centres], 1)
        for i in (2, 3):
            y = net.blocks[i](y, (3, 4))
            want = found.rebuild(y[:, 1:]).transpose(1, 2).reshape(2, 32, 6, 8)
            assert torch.allclose(maps[i], want, atol=1e-5)
        after = net.blocks[4](torch.cat([y[:, :1], found.rebuild(y[:, 1:])], 1), (6, 8))
        assert torch.allclose(maps[4], after[:, 1:].transpose(1, 2).reshape(2, 32, 6, 8), atol=1e-5)


def test_the_final_norm_runs_on_cluster_tokens():
    """As in the authors' Segmenter: norm, then reconstruction; the class token is never clustered."""
    net, x = vit(num_classes=0), torch.randn(1, 3, 24, 32)
    fast = Expedite(alpha=3, clusters=(3, 4), normalise="l2", neighbours=5)(net)
    with torch.no_grad():
        tokens = net.run(x, [2])[1][0]
        found = cluster(tokens[:, 1:], (6, 8), (3, 4))
        y = net.norm(net.blocks[4](net.blocks[3](torch.cat([tokens[:, :1], found.centres], 1))))
        want = torch.cat([y[:, :1], found.rebuild(y[:, 1:], 5, "l2")], 1)
        assert torch.allclose(fast.forward_features(x), want, atol=1e-5)


def test_settings_of_both_code_bases():
    stage = {"n_iters": 5, "num_spixels": 784, "window_size": 5, "temperture": 0.02}
    theirs = {"cluster_cfg": {"location": 9, "stage": stage}, "reconstruction_cfg": {"k": 20, "temperture": 0.02}}
    made = Expedite.from_settings(theirs)
    assert (made.alpha, made.clusters, made.normalise, made.neighbours) == (10, (28, 28), "l2", 20)
    sam_ = Expedite.from_settings({"hourglass_clustering_location": 6, "hourglass_num_cluster": 81})
    assert (sam_.alpha, sam_.clusters, sam_.temperature, sam_.normalise) == (6, (9, 9), 0.01, "l2")
    assert Expedite().normalise == "sum"
    with pytest.raises(AdviceError, match="no square"):
        Expedite.from_settings({"hourglass_num_cluster": 80})
    with pytest.raises(AdviceError, match="hourglass_num_cluster"):
        Expedite.from_settings({"hourglass_num_clusters": 81})


def test_a_large_vit_has_at_most_seven_tenths_of_the_macs():
    with torch.device("meta"):
        plain = ViT(ViTConfig(image_size=(640, 640), dim=1024, depth=24, heads=16, num_classes=0))
        fast = Expedite(alpha=10, clusters=(28, 28))(plain)
        x = torch.empty(1, 3, 640, 640)
    whole, fewer = cost(plain, x).macs, cost(fast, x).macs
    assert 0.6 * whole < fewer <= 0.70 * whole


def test_macs_fall_with_the_span_and_the_clusters():
    net, x = vit(depth=8, image_size=(64, 64)), torch.empty(1, 3, 64, 64, device="meta")
    table = [[cost(Expedite(alpha=a, clusters=(n, n))(net), x).macs for n in (4, 8, 12)] for a in (1, 3, 5)]
    assert all(row == sorted(row) for row in table)
    assert all(list(column) == sorted(column) for column in zip(*table))


class Dense(nn.Module):
    """A segmentation head on all levels of a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Conv2d(s.channels, 3, 1) for s in backbone.stages)

    def forward(self, x):
        maps = self.backbone.forward_stages(x)
        return sum(F.interpolate(h(m), x.shape[-2:], mode="bilinear") for h, m in zip(self.heads, maps))


def test_dense_heads_on_all_levels_and_training():
    torch.manual_seed(0)
    for net in (vit(num_classes=0, levels=(0, 2, 4)), sam(), zoo("swin_nano")):
        model, x = Dense(net), torch.randn(2, 3, 32, 32)
        fast = Expedite(alpha=1, clusters=(3, 3))(model, x).train()
        want, steps = torch.randint(0, 3, (2, 32, 32)), []
        optimizer = torch.optim.SGD(fast.parameters(), 0.01)
        for _ in range(6):
            loss = F.cross_entropy(fast(x), want)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(float(loss.detach()))
        assert min(steps[1:]) < steps[0]
        used = [n for n, p in fast.named_parameters() if p.grad is None]
        assert all(n.startswith(("backbone.head", "backbone.norm")) for n in used), used


def test_it_saves_loads_and_chains(tmp_path):
    torch.manual_seed(0)
    model = Classify(num_classes=3).build(lynceus.create_model("swin_nano", image_size=(32, 32)))
    x = torch.rand(2, 3, 32, 32)
    both = chain(Swap(mixer="window", blocks=(0,), options={"window": 4}), Expedite(alpha=1, clusters=(3, 3), stage=1))
    made = both(model, x)
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    assert again.rewrite == made.rewrite
    assert torch.equal(again(x), made(x))
    inner = lynceus.create_model("vit_nano")
    fast = Expedite(alpha=2)(inner)
    save_model(fast, tmp_path / "bare.safetensors")
    assert torch.equal(load_model(tmp_path / "bare.safetensors")(x), fast(x))


def test_swapped_mixers_get_the_grid_of_clusters():
    net, x = vit(class_token=False, pool="avg"), torch.rand(2, 3, 24, 32)
    mixed = Swap(mixer="halo", blocks=(3,))(net)
    assert Expedite(alpha=2, clusters=(3, 4))(mixed, x)(x).shape == (2, 5)


@pytest.mark.slow
def test_compiled_it_is_the_same(host):
    model, _, fewer, x = host
    fast = Expedite(alpha=1, clusters=fewer)(model)
    with torch.no_grad():
        assert torch.allclose(torch.compile(fast)(x), fast(x), atol=1e-5)


@pytest.mark.slow
def test_it_exports():
    for net, clusters in ((vit(), (3, 5)), (sam(), (3, 3))):
        fast, x = Expedite(alpha=2, clusters=clusters)(net), torch.randn(2, 3, 24, 32)
        program = torch.export.export(fast, (x,))
        assert torch.allclose(program.module()(x), fast(x), atol=1e-5)


def test_pooling_under_export_is_adaptive_pooling():
    x = torch.randn(2, 7 * 10, 3)

    class Means(nn.Module):
        def forward(self, x):
            return means(x, (7, 10), (3, 4))

    assert torch.allclose(torch.export.export(Means(), (x,)).module()(x), Means()(x), atol=1e-6)


def test_naive_unpooling_takes_the_nearest():
    found = cluster(features(2, 36, 4), (6, 6), (3, 3))
    back = naive_unpool(found.centres, found.labels())
    assert torch.equal(back[0, 7], found.centres[0, found.labels()[0, 7]])
    assert (found.rebuild(found.centres, 1) - back).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clusters": (0, 3)}, "at least 1"),
        ({"window": 4}, "odd"),
        ({"iterations": -1}, "iterations"),
        ({"neighbours": 0}, "neighbours"),
        ({"temperature": -1.0}, "positive"),
        ({"normalise": "max"}, "'sum' or 'l2'"),
        ({"scale": 0.0}, "positive"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(AdviceError, match=match):
        Expedite(**options)


def test_what_cannot_be_expedited_is_named():
    with pytest.raises(AdviceError, match=r"resnet_nano .* convolution sees .*ViT, Swin"):
        Expedite()(lynceus.create_model("resnet_nano"))
    with pytest.raises(AdviceError, match=r"layers.0.mixer \(\w+\), a scan's state .* PruneTokens"):
        Expedite()(lynceus.create_model("vim_nano"))
    with pytest.raises(AdviceError, match=r"layers.0.1.self_attn \(HaloAttention\), its windows"):
        Expedite()(lynceus.create_model("halonet_nano"))
    with pytest.raises(AdviceError, match="no span"):
        Expedite()(nn.Linear(3, 3))
    with pytest.raises(AdviceError, match="expedited already"):
        chain(Expedite(alpha=1), Expedite(alpha=2))(vit(), None)
    with pytest.raises(AdviceError, match="one stage"):
        Expedite(stage=1)(vit())
    with pytest.raises(AdviceError, match="stages 0 to 2"):
        Expedite(stage=3)(zoo("swin_nano"))
    with pytest.raises(AdviceError, match=r"has 5. beta=3"):
        Expedite(alpha=2, beta=4)(vit())
    with pytest.raises(AdviceError, match="square"):
        Expedite(clusters=(2, 3), alpha=1)(zoo("swin_nano"))
    with pytest.raises(AdviceError, match="beta"):
        Expedite(alpha=1, beta=0)(vit())
    with pytest.raises(AdviceError, match="alpha"):
        Expedite(alpha=-1)(vit())
    net = Expedite(alpha=1)(vit(patch_drop=0.5))
    with pytest.raises(AdviceError, match="patch_drop"):
        net.train()(torch.randn(1, 3, 24, 32))


def test_sam_follows_any_grid_and_its_configuration_is_checked():
    assert sam().forward_stages(torch.randn(1, 3, 20, 50))[-1].shape == (1, 16, 10, 25)
    net = sam(window=0, relative=False, absolute=False)
    assert net(torch.randn(1, 3, 16, 16)).shape == (1, 16)
    with pytest.raises(AdviceError, match="blocks from 0 to 4"):
        replace(net.config, global_blocks=(5,))
