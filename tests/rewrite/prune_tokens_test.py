"""Token pruning of Vim and PlainMamba: the compact pass is the masked one, and the old model where nothing is cut."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lynceus
from lynceus.backbones.plain_mamba import PlainMamba, PlainMambaConfig
from lynceus.backbones.vim import Vim, VimConfig
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import chain
from lynceus.layers.mamba import Mamba
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.layers.scan_order import sweeps
from lynceus.rewrite.prune_tokens import PruneTokens
from lynceus.rewrite.prune_tokens.mixers import mix_mamba, mix_plain
from lynceus.rewrite.prune_tokens.places import Places, chosen, gaps_of, importance, keep_count
from lynceus.rewrite.swap import Swap
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

CARRIES = ("hold", "decay", "decay_prev")


def vim(**changes):
    torch.manual_seed(0)
    fields = {"image_size": (8, 8), "patch_size": 1, "stride": 1, "dim": 16, "depth": 4, "states": 4, "num_classes": 5}
    return randomised(Vim(VimConfig(**{**fields, **changes})))


def plain(**changes):
    torch.manual_seed(0)
    fields = {"image_size": (16, 16), "patch_size": 2, "dim": 16, "depth": 4, "states": 4, "num_classes": 5, "conv": 3}
    return randomised(PlainMamba(PlainMambaConfig(**{**fields, **changes})))


def randomised(net):
    """Weights large enough that every part shows."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return net.eval()


def pixels(size=8, batch=3, seed=0, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def random_places(batch, count, keep, seed=0):
    draw = torch.Generator().manual_seed(seed)
    at = torch.stack([torch.randperm(count, generator=draw)[:keep].sort().values for _ in range(batch)])
    return Places(at, count)


# the masked form: all places, one after the other ------------------------------------------------------
def recurrence(u, delta, a, b, c, kept, carry, idle):
    """y (n, d) of one sequence: removed places bring in nothing and carry the state on by their rule."""
    state, before, found = u.new_zeros(a.shape), torch.zeros_like(idle), []
    for t in range(len(u)):
        if kept[t]:
            state = torch.exp(delta[t][:, None] * a) * state + (delta[t] * u[t])[:, None] * b[t]
            before = delta[t]
        else:
            step = {"hold": torch.zeros_like(idle), "decay": idle, "decay_prev": before}[carry]
            state = torch.exp(step[:, None] * a) * state
        found.append(state @ c[t])
    return torch.stack(found)


def masked_mamba(mixer, tokens, places, carry):
    """The mixer over all places (b, n, c), of which only those in `places` count; compared at these."""
    kept = places.mask()
    x, z = mixer.in_proj(tokens).chunk(2, -1)
    x, z = x * kept[..., None], z * kept[..., None]
    total = 0
    directions = {"none": [("", "A_log", 0)], "v1": [("", "A_log", 0), ("", "A_b_log", 1)]}
    directions["v2"] = [("", "A_log", 0), ("_b", "A_b_log", 1)]
    for end, log, back in directions[mixer.direction]:
        conv = getattr(mixer, f"conv1d{end}")
        turn = (lambda v: v.flip(1)) if back else (lambda v: v)
        if mixer.direction == "v1" and back:  # values of the forward branch, scanned backwards
            u = turn(F.silu(conv(x)) * kept[..., None])
        else:
            u = F.silu(conv(turn(x))) * turn(kept)[..., None]
        small = getattr(mixer, f"x_proj{end}")(u)
        steps, b, c = small.split([mixer.rank, mixer.states, mixer.states], -1)
        proj = getattr(mixer, f"dt_proj{end}")
        delta, idle, a = F.softplus(proj(steps)), F.softplus(proj.bias), -getattr(mixer, log).exp()
        rows = zip(u, delta, b, c, turn(kept))
        y = torch.stack([recurrence(*r[:2], a, *r[2:4], r[4], carry, idle) for r in rows])
        total = total + turn(y + u * getattr(mixer, f"D{end}"))
    half = 0.5 if mixer.direction == "v2" and mixer.halve else 1.0
    return mixer.out_proj(total * F.silu(z) * half)


def masked_plain(mixer, tokens, size, places, carry):
    kept, n = places.mask(), places.count
    x, z = (mixer.in_proj(tokens) * kept[..., None]).chunk(2, -1)
    u = F.silu(mixer.conv2d(x.unflatten(1, size)).flatten(1, 2)) * kept[..., None]
    steps, b, c = mixer.x_proj(u).split([mixer.rank, mixer.states, mixer.states], -1)
    twice = mixer.dt_proj.bias if mixer.double_bias else 0
    delta, idle = F.softplus(mixer.dt_proj(steps) + twice), F.softplus(mixer.dt_proj.bias + twice)
    path, a, total = sweeps(*size, mixer.order), -mixer.A_log.exp(), 0
    for s in range(4):
        order, back = path.order[s], path.inverse[s]
        moved = b[:, order] + (0 if mixer.direction_Bs is None else mixer.direction_Bs[path.codes[s]])
        rows = zip(u[:, order], delta[:, order], moved, c[:, order], kept[:, order])
        y = torch.stack([recurrence(*r[:2], a, *r[2:4], r[4], carry, idle) for r in rows])
        total = total + y[:, back]
    assert n == size[0] * size[1]
    return mixer.out_proj((total + 4 * mixer.D * u) * F.silu(z))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(CARRIES), st.sampled_from(["none", "v1", "v2"]), st.integers(1, 19), st.data(), st.integers(0, 99)
)
def test_compact_is_masked_in_vim(carry, direction, count, data, seed):
    torch.manual_seed(seed)
    mixer = randomised(Mamba(6, states=3, conv=4, direction=direction)).double()
    keep = data.draw(st.sampled_from(sorted({1, count, max(1, count // 2)})))
    places, x = random_places(2, count, keep, seed), torch.randn(2, count, 6, dtype=torch.float64)
    with torch.no_grad():
        have = mix_mamba(mixer, places.gather(x), places, carry)[0]
        want = places.gather(masked_mamba(mixer, x, places, carry))
    assert torch.allclose(have, want, atol=1e-10, rtol=0)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(CARRIES),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["snake", "raster"]),
    st.booleans(),
    st.data(),
)
def test_compact_is_masked_in_plain_mamba(carry, h, w, order, double, data):
    torch.manual_seed(h * w)
    mixer = PlainMamba2d(6, states=3, conv=3, order=order, reorder_all=True, double_bias=double, directions=double)
    mixer = randomised(mixer).double()
    keep = data.draw(st.sampled_from(sorted({1, h * w, max(1, h * w // 2)})))
    places, x = random_places(2, h * w, keep, keep), torch.randn(2, h * w, 6, dtype=torch.float64)
    with torch.no_grad():
        have = mix_plain(mixer, places.gather(x), (h, w), places, carry)[0]
        want = places.gather(masked_plain(mixer, x, (h, w), places, carry))
    assert torch.allclose(have, want, atol=1e-10, rtol=0)


def test_all_tokens_kept_is_the_mixer_itself():
    mixer, x = randomised(Mamba(6, states=3)).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    flat, map_ = randomised(PlainMamba2d(6, states=3, conv=3)).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    for places in (None, random_places(2, 12, 12)):
        for carry in (*CARRIES, "none"):
            assert torch.allclose(mix_mamba(mixer, x, places, carry)[0], mixer(x), atol=1e-12)
            if carry != "none":
                out = mix_plain(flat, map_.flatten(1, 2), (3, 4), places, carry)[0]
                assert torch.allclose(out, flat(map_).flatten(1, 2), atol=1e-12)


def test_released_sweeps_take_coefficients_by_number():
    """Without `reorder_all` step j of a sweep takes delta, B and C of the j-th kept token in raster order."""
    torch.manual_seed(0)
    mixer = randomised(PlainMamba2d(4, states=2, conv=1, directions=False)).double()
    places, x = random_places(1, 12, 5), torch.randn(1, 5, 4, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(u * mixer.conv2d.weight.flatten() + mixer.conv2d.bias)
    steps, b, c = mixer.x_proj(u).split([mixer.rank, 2, 2], -1)
    delta, a, total = F.softplus(mixer.dt_proj(steps) + mixer.dt_proj.bias), -mixer.A_log.exp(), 0
    path, kept = sweeps(3, 4, "snake"), torch.ones(5, dtype=torch.bool)
    for s in range(4):
        order = path.inverse[s][places.at[0]].argsort()
        y = recurrence(u[0][order], delta[0], a, b[0], c[0], kept, "hold", delta[0, 0])
        total = total + y[order.argsort()]
    want = mixer.out_proj((total + 4 * mixer.D * u) * F.silu(z))
    assert torch.allclose(mix_plain(mixer, x, (3, 4), places, "hold")[0], want, atol=1e-12)


def test_places_matter():
    """Same tokens, other gaps: decay differs, hold's states do not, gathering differs from all."""
    torch.manual_seed(0)
    mixer, x = randomised(Mamba(6, states=3, conv=1)).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    near, far = Places(torch.tensor([[0, 1, 2, 3]]), 20), Places(torch.tensor([[0, 5, 6, 19]]), 20)
    out = {(c, i): mix_mamba(mixer, x, p, c)[0] for c in (*CARRIES, "none") for i, p in enumerate((near, far))}
    assert torch.allclose(out["hold", 0], out["hold", 1], atol=1e-12)  # conv=1: nothing but the states
    assert torch.equal(out["none", 0], out["none", 1])
    for carry in ("decay", "decay_prev"):
        assert not torch.allclose(out[carry, 0], out[carry, 1], atol=1e-4)
    wide = randomised(Mamba(6, states=3, conv=4)).double()
    gapped = Places(torch.tensor([[1, 2, 6, 11]]), 20)
    found = [mix_mamba(wide, x, gapped, c)[0] for c in (*CARRIES, "none")]
    assert all(not torch.allclose(found[i], found[j], atol=1e-6) for i in range(4) for j in range(i))


def test_gaps():
    at = torch.tensor([[2, 3, 7], [0, 1, 2]])
    assert gaps_of(at).tolist() == [[2, 0, 3], [0, 0, 0]]
    places = Places(at, 10)
    assert places.gaps(reverse=True).t().tolist() == [[2, 3, 0], [7, 0, 0]]
    assert places.mask().sum(1).tolist() == [3, 3]


# scores and counts --------------------------------------------------------------------------------------
def test_scores():
    y = torch.tensor([[[1.0, -2.0], [-1.0, -1.0], [3.0, 0.5]]])
    places = Places(torch.tensor([[0, 2, 5]]), 6)
    want = {"clip": [1, 0, 3.5], "sum": [-1, -2, 3.5], "l1": [3, 2, 3.5], "l2": [5, 2, 9.25]}
    for score, values in want.items():
        assert importance(y, score, places=places).tolist() == [values]
    noise = importance(y, "random", seed=3, places=places)
    assert torch.equal(noise, importance(y, "random", seed=3, places=places))
    assert len(set(noise[0].tolist())) == 3


def test_token_counts_are_the_released_ones():
    counts, n = [], 197
    for _ in range(3):
        n = keep_count(n - 1, 0.8, odd=True) + 1
        counts.append(n)
    assert counts == [157, 125, 101]
    assert keep_count(49, 1.0, odd=True) == 49
    assert keep_count(64, 0.5, odd=False) == 32
    assert keep_count(5, 0.01, odd=False) == 1


def test_ties_go_to_the_first():
    score, always = torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.bool)
    always[0, 4] = True
    assert chosen(score, always, 3).tolist() == [[0, 1, 4]]


# the networks -------------------------------------------------------------------------------------------
NETS = {
    "vim": (vim, 8),
    "vim first": (lambda: vim(class_token="first"), 8),
    "vim ends": (lambda: vim(class_token="ends"), 8),
    "vim none": (lambda: vim(class_token="none"), 8),
    "vim forward only": (lambda: vim(direction="none"), 8),
    "vim v1": (lambda: vim(direction="v1", rms_norm=False, mixer_bias=True, layer_scale=0.5), 8),
    "plain": (plain, 16),
    "plain reordered": (lambda: plain(reorder_all=True, order="raster", dwconv=(0, 3)), 16),
    "plain levels": (lambda: plain(out_indices=(1, 2, 3)), 16),
}


@pytest.fixture(params=NETS, ids=lambda n: n.replace(" ", "_"))
def net(request):
    build, size = NETS[request.param]
    return build(), pixels(size)


def test_keep_all_is_the_old_model(net):
    model, x = net
    same = PruneTokens(blocks=(1, 2), keep=1.0)(model, x)
    assert torch.equal(same(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(same.forward_stages(x), model.forward_stages(x), strict=True))


def test_a_cut_behind_the_last_block_leaves_its_maps(net):
    model, x = net
    late = PruneTokens(blocks=(4,), keep=0.5)(model, x)
    for a, b in zip(late.forward_stages(x), model.forward_stages(x), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("carry", [*CARRIES, "none"])
def test_contract(net, carry):
    model, x = net
    before = copy.deepcopy(model.state_dict())
    pruned = PruneTokens(blocks=(1, 3), keep=0.6, carry=carry)(model, x)
    assert list(pruned.state_dict()) == list(before)
    with torch.no_grad():
        assert pruned(x).shape == (3, 5)
        assert not torch.allclose(pruned(x), model(x), atol=1e-4)
        one = torch.cat([pruned(x[i : i + 1]) for i in range(3)])
        assert torch.allclose(pruned(x), one, atol=1e-5)
        assert torch.allclose(pruned(x.flip(0)), pruned(x).flip(0), atol=1e-5)
        features, maps = pruned.forward_intermediates(x)
        assert [m.shape for m in maps] == [m.shape for m in model.forward_stages(x)]
        assert torch.equal(features, pruned.forward_features(x))
        assert torch.allclose(pruned.forward_head(features), pruned(x), atol=1e-5)
    assert cost(pruned, x).macs < cost(model, x).macs


def test_masks_scores_and_class_tokens(net):
    model, x = net
    pruned = PruneTokens(blocks=(1, 2), keep=0.6)(model)
    cuts = pruned.inspect(x)
    assert [m.shape for m in cuts.masks] == [(3, 8, 8)] * 2
    assert all(bool((s >= 0).all()) for s in cuts.scores)
    assert bool((cuts.masks[0] | ~cuts.masks[1]).all())  # what is cut stays cut
    extra = getattr(model.config, "extra", 0)
    for mask, kept in zip(cuts.masks, cuts.kept):
        assert bool((mask.sum((1, 2)) + extra == kept.shape[1]).all())  # class tokens are among the kept
        assert bool((kept.diff(dim=1) > 0).all())


def test_pruned_maps_hold_the_last_value_or_zero():
    for build, size in ((vim, 8), (plain, 16)):
        model, x = build(), pixels(size)
        last, zero = (PruneTokens(blocks=(2,), keep=0.5, fill=f)(model) for f in ("last", "zero"))
        mask = last.inspect(x).masks[0][:, None]
        with torch.no_grad():
            a, b, whole = last.forward_stages(x)[-1], zero.forward_stages(x)[-1], model.forward_stages(x)[1]
        assert torch.allclose(a * mask, b * mask)
        assert not bool((b * ~mask).any())
        assert torch.allclose(a * ~mask, whole * ~mask, atol=1e-5)  # as they were when they were cut


def test_compact_is_masked_through_a_whole_network():
    """All blocks after a cut, on all places with the removed ones masked, give the same tokens."""
    model, x = vim(rms_norm=False, mixer_bias=True).double(), pixels().double()
    for carry in CARRIES:
        pruned = PruneTokens(blocks=(2,), keep=0.5, carry=carry)(model)
        with torch.no_grad():
            kept = pruned.inspect(x).kept[0]
            places = Places(kept, 65)
            hidden, residual, _, _ = model.run(x, [1], stop=True)
            for block in model.layers[2:]:
                residual = residual + hidden
                hidden = masked_mamba(block.mixer, block.norm(residual), places, carry)
            tokens = model.norm_f(residual + hidden)
            assert torch.allclose(pruned(x), model.head(tokens[:, 32]), atol=1e-9)


def test_released_route():
    model, x = vim(), pixels(batch=2)
    pruned = PruneTokens(blocks=(2, 3), keep=0.8, compat="released")(model, x)
    cuts = pruned.inspect(x)
    assert [k.shape[1] for k in cuts.kept] == [53, 43]
    for kept, n in zip(cuts.kept, (65, 53)):
        assert bool((kept[:, kept.shape[1] // 2] == n // 2).all())  # the class token, in the middle by count
    with torch.no_grad():
        assert torch.allclose(pruned(x), torch.cat([pruned(x[:1]), pruned(x[1:])]), atol=1e-5)


def test_it_trains_with_the_cuts_in_place():
    for build, size in ((vim, 8), (plain, 16)):
        model, x, y = build(), pixels(size, batch=8), torch.arange(8) % 5
        pruned = PruneTokens(blocks=(1, 2), keep=0.6, carry="decay")(model).train()
        optimizer, losses = torch.optim.AdamW(pruned.parameters(), 1e-3), []
        for _ in range(8):
            loss = F.cross_entropy(pruned(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert min(losses[4:]) < losses[0]
        assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("carry", CARRIES)
def test_gradients_are_those_of_the_masked_form(carry):
    torch.manual_seed(0)
    mixer = randomised(Mamba(4, states=2)).double()
    places, x = random_places(1, 9, 4), torch.randn(1, 9, 4, dtype=torch.float64)
    wanted = list(mixer.parameters())
    compact = torch.autograd.grad(mix_mamba(mixer, places.gather(x), places, carry)[0].square().sum(), wanted)
    masked = places.gather(masked_mamba(mixer, x, places, carry)).square().sum()
    for a, b in zip(compact, torch.autograd.grad(masked, wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_it_saves_loads_and_chains(tmp_path):
    torch.manual_seed(0)
    model = Classify(num_classes=3).build(lynceus.create_model("vim_nano", class_token="middle"))
    x = torch.rand(2, 3, 32, 32)
    made = chain(Swap(mixer="hyena", blocks=(0,)), PruneTokens(blocks=(2,), keep=0.7))(model, x)
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    assert again.rewrite == made.rewrite
    assert torch.equal(again(x), made(x))


@pytest.mark.slow
def test_it_exports():
    pruned = PruneTokens(blocks=(2,), keep=0.7, carry="decay")(vim(depth=3))
    program = torch.export.export(pruned, (pixels(),))
    assert torch.allclose(program.module()(pixels()), pruned(pixels()), atol=1e-4)


def test_small_maps_and_odd_sizes():
    for size in (5, 7, 12):
        x = pixels(size)
        assert PruneTokens(blocks=(1, 2), keep=0.3)(vim(), x)(x).shape == (3, 5)
        assert PruneTokens(blocks=(1, 2), keep=0.3)(plain(), x)(x).shape == (3, 5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "share above 0"),
        ({"keep": 1.5}, "share above 0"),
        ({"score": "clipped"}, "'clip'"),
        ({"carry": "holds"}, "'hold'"),
        ({"fill": "mean"}, "last, zero"),
        ({"compat": "relased"}, "'released'"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(AdviceError, match=match):
        PruneTokens(**options)


def test_what_cannot_be_pruned_is_named():
    with pytest.raises(AdviceError, match=r"vit_nano .*Expedite"):
        PruneTokens()(lynceus.create_model("vit_nano"))
    with pytest.raises(AdviceError, match="1 to 4"):
        PruneTokens(blocks=(5,))(vim())
    with pytest.raises(AdviceError, match="pruned already"):
        chain(PruneTokens(blocks=(1,)), PruneTokens(blocks=(2,)))(vim(), None)
    with pytest.raises(AdviceError, match=r"layers.2.mixer of vim_nano"):
        PruneTokens(blocks=(1,))(Swap(mixer="hyena", blocks=(2,))(lynceus.create_model("vim_nano")))
    with pytest.raises(AdviceError, match="rotary"):
        PruneTokens()(vim(rotary=True))
    with pytest.raises(AdviceError, match="class token in the middle"):
        PruneTokens(compat="released")(plain())


def test_default_cuts_are_the_released_ones():
    assert PruneTokens().plan(24).blocks == (5, 10, 15)
    assert PruneTokens().plan(4).blocks == (1, 2)
    assert PruneTokens().plan(1).blocks == ()
