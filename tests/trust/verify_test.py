"""Verdicts: equal to brute force, sound under fuzzing, replayed in float32 on the grid, in time, clear on mistakes."""

import importlib.util
import itertools
import math
import time
from collections import Counter

import pytest
import torch
from torch import nn

from bench._trust import curve_net, curve_points, digits8, digits_cnn, digits_mlp
from lynceus import Subject
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.types import Sample
from lynceus.trust.attacks import pgd
from lynceus.trust.bounds import Box, bounds
from lynceus.trust.bounds_graph import trace
from lynceus.trust.smt import solve_box
from lynceus.trust.verified import Verify
from lynceus.trust.verify import Budget, Verdict, largest, radius, verify
from lynceus.trust.verify_layers import cuts, verify_layers
from lynceus.trust.verify_query import ask

CIRCLE = (0.0, 2 * math.pi)


def grid_of(x, dims, step, count, clip):
    """Every grid point, written apart from the library: (n, *shape) float32."""
    flat = x.flatten()
    ranges = []
    for d in dims:
        raw = flat[d].double() + step * torch.arange(-count, count + 1).double()
        ranges.append((raw if clip is None else raw.clamp(*clip)).float().unique())
    points = torch.cartesian_prod(*ranges).reshape(-1, len(dims))
    out = flat.repeat(len(points), 1)
    out[:, list(dims)] = points
    return out.reshape(-1, *x.shape)


@torch.no_grad()
def brute(net, x, dims, step, count, clip):
    """True when every grid point keeps the class, ties lost."""
    label = int(net(x[None]).argmax())
    for part in grid_of(x, dims, step, count, clip).split(40_000):
        logits = net(part)
        others = logits.clone()
        others[:, label] = -math.inf
        if bool((others.amax(1) >= logits[:, label]).any()):
            return False
    return True


@torch.no_grad()
def replays(net, x, verdict, dims, step, count, clip):
    """The witness is float32, changes only `dims`, lies in the region and gets another class, in float32 and 64."""
    w = verdict.witness
    assert w.dtype == torch.float32
    assert w.shape == x.shape
    change = (w.double() - x.double()).flatten()
    rest = torch.ones(len(change), dtype=torch.bool)
    rest[list(dims)] = False
    assert not bool(change[rest].any())
    assert float(change.abs().max()) <= step * count
    if clip is not None:
        assert float(w.min()) >= clip[0]
        assert float(w.max()) <= clip[1]
    for logits in (net(w[None])[0], trace(net, x.shape)(w[None].double())[0]):
        other = logits.clone()
        other[verdict.label] = -math.inf
        assert float(other.max()) >= float(logits[verdict.label])
    return True


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("half", [0.1, 0.3, 0.5])
def test_the_curve_agrees_with_brute_force_on_every_point(half, every):
    net, (points, truth) = curve_net(0), curve_points(200, 7)
    with torch.no_grad():
        assert float((net(points).argmax(1) == truth).float().mean()) > 0.98
    network = trace(net, (2,))
    one = 0
    for x in points[::every]:
        verdict = verify(net, x, step=half / 5, count=5, clip=CIRCLE, network=network)
        assert (verdict.kind == "safe") == brute(net, x, (0, 1), half / 5, 5, CIRCLE)
        assert verdict.kind != "unknown"
        one += verdict.kind == "safe" and verdict.boxes == 1
        if verdict.kind == "unsafe":
            replays(net, x, verdict, (0, 1), half / 5, 5, CIRCLE)
    assert one > 10


def test_z3_says_the_same_of_pruned_and_whole_boxes():
    pytest.importorskip("z3")
    net, (points, _) = curve_net(0), curve_points(200, 7)
    network = trace(net, (2,))
    for x in points[:3]:
        query = ask(net, x, dims=None, step=0.1, count=1, clip=None, label=None, network=network)
        box = query.box(query.lower[None], query.upper[None])
        pruned, _ = solve_box(network, box, query.rows, tolerance=query.tolerance)
        whole, _ = solve_box(network, box, query.rows, tolerance=query.tolerance, prune=False, seconds=60)
        assert pruned == whole
        assert (pruned == "safe") == (
            verify(net, x, step=0.1, clip=None, goal="region", network=network).kind == "safe"
        )


def test_z3_finds_what_separates_two_pieces_and_gives_the_exact_point():
    pytest.importorskip("z3")
    net = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.25), nn.Linear(2, 2))
    with torch.no_grad():
        for layer, weight, bias in (
            (net[0], [[1.0, 1.0], [1.0, -1.0]], [0.0, 0.0]),
            (net[2], [[0.0, 0.0], [1.0, 1.0]], [1.9, 0.0]),
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    network = trace(net, (2,))
    rows = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    for prune in (True, False):
        inside = Box(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.9, 1.0]]))
        assert solve_box(network, inside, rows, prune=prune)[0] == "safe"  # the most is 2 * .9 at (.9, 0)
        wider = Box(torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 1.0]]))
        answer, point = solve_box(network, wider, rows, prune=prune)
        assert answer == "unsafe"
        assert float(network(point)[0] @ rows[0]) <= 0


def test_the_digits_mlp_agrees_with_brute_force_on_390625_points():
    net, (_, _, x, _) = digits_mlp(0), digits8()
    network = trace(net, (1, 8, 8))
    kinds = Counter()
    for image in x[[0, 2]]:
        dims = largest(image, 8).tolist()
        verdict = verify(net, image, dims=dims, step=0.25, count=2, network=network)
        assert (verdict.kind == "safe") == brute(net, image, dims, 0.25, 2, (0.0, 1.0))
        kinds[verdict.kind] += 1
    assert kinds["safe"]
    assert kinds["unsafe"]


@pytest.mark.slow
def test_the_digits_mlp_agrees_with_brute_force_on_sixty_images():
    net, (_, _, x, _) = digits_mlp(0), digits8()
    network = trace(net, (1, 8, 8))
    for image in x[:60]:
        dims = largest(image, 8).tolist()
        verdict = verify(net, image, dims=dims, step=0.25, count=2, network=network)
        assert (verdict.kind == "safe") == brute(net, image, dims, 0.25, 2, (0.0, 1.0))


def test_twelve_pixels_leave_nothing_unknown_and_every_witness_replays():
    net, (_, _, x, _) = digits_mlp(0), digits8()
    network = trace(net, (1, 8, 8))
    kinds = Counter()
    for image in x[:40]:
        dims = largest(image, 12).tolist()
        verdict = verify(net, image, dims=dims, step=0.25, count=2, network=network)
        kinds[verdict.kind] += 1
        if verdict.kind == "unsafe":
            replays(net, image, verdict, dims, 0.25, 2, (0.0, 1.0))
            steps = (verdict.witness - image).flatten()[dims] / 0.25
            on_grid = (steps == steps.round()) | (verdict.witness.flatten()[dims] % 1 == 0)
            assert bool(on_grid.all())
    assert kinds["unknown"] == 0
    assert kinds["safe"] > 10
    assert kinds["unsafe"] > 10


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_the_digits_cnn_agrees_with_brute_force(count):
    net, (_, _, x, _) = digits_cnn(0), digits8()
    network = trace(net, (1, 8, 8))
    for image in torch.cat([x[14:15], x[: count - 1]]):
        dims = largest(image, 6).tolist()
        verdict = verify(net, image, dims=dims, step=0.25, count=2, network=network, raise_to_region=False)
        assert (verdict.kind == "safe") == brute(net, image, dims, 0.25, 2, (0.0, 1.0))


class Wedge(nn.Module):
    """Class 1 only in a diamond of width .02 around (.05, .13)."""

    def forward(self, x):
        tent = torch.relu(0.01 - (x[:, :1] - 0.05).abs()) + torch.relu(0.01 - (x[:, 1:] - 0.13).abs())
        return torch.cat([x[:, :1] * 0 + 0.5, torch.relu(1000 * tent - 18)], 1)


def test_a_wedge_between_the_grid_points():
    net, x = Wedge().eval(), torch.zeros(2)
    grid = verify(net, x, step=0.1, count=3, clip=None, goal="grid")
    assert (grid.kind, grid.strength) == ("safe", "grid")
    assert "Between the grid points" in grid.note
    region = verify(net, x, step=0.1, count=3, clip=None, goal="region")
    assert region.kind == "unsafe"
    assert bool(((region.witness - torch.tensor([0.05, 0.13])).abs() < 0.01).all())
    replays(net, x, region, (0, 1), 0.1, 3, None)


def test_the_wedge_is_found_without_z3_too():
    net, x = Wedge().eval(), torch.zeros(2)
    assert verify(net, x, step=0.1, count=3, clip=None, goal="region", solver=False).kind == "unsafe"


def test_a_safe_grid_becomes_a_safe_region_only_when_the_cells_are_proven():
    net, (points, _) = curve_net(0), curve_points(30, 7)
    for x in points:
        grid = verify(net, x, step=0.1, count=3, clip=CIRCLE)
        if grid.strength == "region":
            assert verify(net, x, step=0.3, clip=CIRCLE, goal="region").kind == "safe"


def random_net(seed):
    torch.manual_seed(seed)
    act = nn.ReLU() if seed % 3 else nn.LeakyReLU(0.1)
    if seed % 2:
        return nn.Sequential(nn.Linear(4, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 3)).eval(), (4,)
    conv = nn.Sequential(nn.Conv2d(1, 3, 2), act, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return conv.eval(), (1, 5, 5)


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_fuzzing_never_contradicts_a_verdict(count):
    kinds = Counter()
    for seed in range(count):
        net, shape = random_net(seed)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        dims = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))[:3].sort().values.tolist()
        step, goal = (0.05, 0.15, 0.3)[seed % 3], ("grid", "region")[seed // 2 % 2]
        verdict = verify(net, x, dims=dims, step=step, count=2, goal=goal, seed=seed)
        kinds[verdict.kind, verdict.strength] += 1
        if verdict.kind == "unsafe":
            replays(net, x, verdict, dims, step, 2, (0.0, 1.0))
        elif verdict.kind == "safe":
            assert brute(net, x, dims, step, 2, (0.0, 1.0))
            if verdict.strength == "region":
                draw = torch.rand(100_000 if count > 100 else 20_000, 3, dtype=torch.float64)
                flat = x.flatten().double().repeat(len(draw), 1)
                low, high = ((flat[:, dims] + s * 2 * step).clamp(0, 1) for s in (-1, 1))
                flat[:, dims] = low + (high - low) * draw
                with torch.no_grad():
                    assert bool((net(flat.float().reshape(-1, *shape)).argmax(1) == verdict.label).all())
    assert kinds["unknown", "none"] == 0
    assert len(kinds) >= 2


def test_verified_images_survive_attacks():
    net, (_, _, x, _) = digits_mlp(0), digits8()
    network = trace(net, (1, 8, 8))
    subject = Subject(net, mean=(0.0,), std=(1.0,))
    safe = []
    for image in x[:12]:
        verdict = verify(net, image, step=0.04, goal="region", network=network, budget=Budget(seconds=2, boxes=50))
        safe += [image] if verdict.kind == "safe" else []
    assert safe
    images = torch.stack(safe)
    labels = net(images).argmax(1)
    assert not bool(pgd(subject, images, labels, epsilon=0.04, steps=100, restarts=5).success.any())


def test_eight_bit_images_get_eight_bit_witnesses_and_ends():
    net, (_, _, x, _) = digits_mlp(0), digits8()
    found = 0
    for image in x[:20]:
        image = (image * 255).round() / 255
        verdict = verify(net, image, dims=largest(image, 6), step=32 / 255, count=3)
        if verdict.witness is not None:
            found += 1
            levels = verdict.witness.double() * 255
            assert torch.equal((levels.round() / 255).float(), verdict.witness)
            assert float((levels.round() - (image.double() * 255).round()).abs().max()) <= 96
    assert found


def test_ties_count_as_another_class():
    net = nn.Linear(1, 2).eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.bias.copy_(torch.tensor([0.0, 0.5]))
    kept = verify(net, torch.tensor([1.0]), step=0.25, count=1, clip=None)
    tied = verify(net, torch.tensor([1.0]), step=0.25, count=2, clip=None)
    assert (kept.kind, tied.kind) == ("safe", "unsafe")
    assert float(tied.witness) == 0.5


def test_the_margin_that_rounding_could_eat_is_not_called_safe():
    net = nn.Linear(1, 2).eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.bias.copy_(torch.tensor([1e-7, 0.5]))
    assert verify(net, torch.tensor([1.0]), step=0.5, clip=None, goal="region").kind == "unknown"


@pytest.mark.parametrize("goal", ["grid", "region"])
def test_unknown_comes_in_time_and_is_never_safe(goal):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)).eval()
    with torch.no_grad():
        net[4].bias.copy_(torch.tensor([0.25, 0.0]))
    x = torch.full((60,), 0.5)
    label = int(net(x[None]).argmax())
    few = verify(net, x, step=0.1, count=1, goal=goal, label=label, budget=Budget(seconds=None, boxes=40))
    if few.kind != "unsafe":
        assert few.kind == "unknown"
        assert few.boxes >= 40
        start = time.perf_counter()
        timed = verify(net, x, step=0.1, count=1, goal=goal, label=label, budget=Budget(seconds=0.6))
        assert timed.kind != "safe"
        assert timed.note
        assert time.perf_counter() - start >= 0.45  # it used the time it was given; bench/trust_verify measures the end


def test_radius_is_bracketed_and_its_witness_replays():
    net, (points, _) = curve_net(0), curve_points(12, 7)
    network = trace(net, (2,))
    for x in points:
        found = radius(net, x, largest=1.0, clip=CIRCLE, network=network, budget=Budget(seconds=20))
        assert 0 <= found.proven <= found.refuted
        if found.witness is not None:
            assert int(net(found.witness[None]).argmax()) != int(net(x[None]).argmax())
            assert float((found.witness.double() - x.double()).abs().max()) == found.refuted
            assert found.refuted - found.proven < 0.01
        else:
            assert found.proven == 1.0


def test_layers_close_at_the_input_or_deeper_and_never_against_brute_force():
    net, (points, _) = curve_net(0), curve_points(12, 7)
    network = trace(net, (2,))
    assert len(cuts(network)) == 2
    closed = Counter()
    for first, x in itertools.product((0, 1, 2), points):
        verdict, rows = verify_layers(
            net, x, step=0.06, count=5, clip=CIRCLE, network=network, first=first, budget=Budget(seconds=20, boxes=400)
        )
        closed[first, verdict.kind] += 1
        assert rows
        if verdict.kind == "safe":
            assert verdict.layer == rows[-1]["layer"]
            assert brute(net, x, (0, 1), 0.06, 5, CIRCLE)
        elif verdict.kind == "unsafe":
            replays(net, x, verdict, (0, 1), 0.06, 5, CIRCLE)
            if first == 0:
                assert not brute(net, x, (0, 1), 0.06, 5, CIRCLE)
        if first:
            assert rows[0]["step"] >= 0
            assert rows[0]["dims"] <= 8
    assert closed[0, "unknown"] == 0
    assert closed[1, "safe"] > 2
    assert closed[2, "safe"] > 2


def test_mistakes_are_errors_before_any_search():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(3)
    for options, word in (
        ({"label": 5}, "outside the 2 classes"),
        ({"dims": [0, 0]}, "different indices"),
        ({"dims": [9]}, "different indices"),
        ({"step": 0.0}, "step > 0"),
        ({"goal": "grids"}, "no goal"),
        ({"method": "crow"}, "no method"),
        ({"engine": "cplex"}, "no engine"),
        ({"clip": (0.0, 1e-6)}, "outside clip"),
    ):
        with pytest.raises(AdviceError, match=word):
            verify(net, x, **{"step": 0.1, **options})
    with pytest.raises(AdviceError, match="one sample"):
        verify(net, torch.rand(2, 3), step=0.1, network=trace(net, (3,)))
    with pytest.raises(AdviceError, match="training mode"):
        verify(nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)), x, step=0.1)
    with pytest.raises(AdviceError, match=r"1 \(Tanh\)"):
        verify(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), x, step=0.1)


def grey(net):
    """A subject that reads the mean of the three channels."""
    first = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(first.weight, 1 / 3)
    return Subject(nn.Sequential(first, net).eval(), mean=(0.0,) * 3, std=(1.0,) * 3, name="digits mlp")


def digits_subject():
    return grey(digits_mlp(0))


def digits_samples(count):
    _, _, x, y = digits8()
    return [Sample(image=x[i].expand(3, 8, 8), label=int(y[i]), id=f"digit {i}") for i in range(count)]


def numbers(report):
    return {k: v for k, v in report.summary.items() if k != "seconds"}, report.rows


def test_the_check_brackets_radii_shows_counterexamples_and_resumes(tmp_path):
    check = Verify(pixels=24, step=0.25, radius=0.1, steps=30, keep=tmp_path)
    report = check(digits_subject(), digits_samples(16), seed=1)
    assert bool((report.arrays["proven"] <= report.arrays["attacked"]).all())
    assert {"certified radius.plotly", "counterexamples.png"} <= set(report.figures)
    shares = [report.summary[k] for k in ("safe", "unsafe", "unknown", "wrong")]
    assert sum(shares) == pytest.approx(1)
    assert report.summary["unsafe"] > 0
    (kept,) = tmp_path.glob("verify-*.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:5]) + lines[5][:20])  # killed inside the sixth image
    again = check(digits_subject(), digits_samples(16), seed=1)
    assert numbers(again) == numbers(report)
    assert Report.from_json(again.json()).rows == again.rows


def test_the_check_says_that_its_time_ended():
    with pytest.raises(AdviceError, match="No image was finished"):
        Verify(seconds=1e-6)(digits_subject(), digits_samples(3))


def test_the_check_refuses_what_it_cannot_prove_before_any_work():
    with pytest.raises(AdviceError, match="gradients"):
        Verify()(Subject(lambda x: x.mean((2, 3))), digits_samples(2))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10)).eval()
    with pytest.raises(AdviceError, match=r"1.2 \(GELU\)"):
        Verify()(grey(net), digits_samples(2))
    for check, words in (
        (Verify(step=26.0), "divide by 255"),
        (Verify(radius=2.0), "radius"),
        (Verify(pixels=999), "0 takes"),
    ):
        with pytest.raises(AdviceError, match=words):
            check(digits_subject(), digits_samples(2))


def test_a_verdict_is_true_only_when_safe():
    assert bool(Verdict(kind="safe", strength="grid", label=0))
    assert not Verdict(kind="unknown", strength="none", label=0)
    assert float(bounds(digits_mlp(0), Box(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))).upper.max()) > 0


@pytest.mark.slow
def test_a_query_travels_as_onnx_and_vnnlib(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from lynceus.trust.vnnlib import export_query, to_vnnlib

    net, (_, _, x, _) = digits_mlp(0), digits8()
    subject = Subject(net, mean=(0.1,), std=(0.5,))
    options = {"step": 0.25, "dims": [3, 9]}
    model, text = export_query(subject, x[0], tmp_path, **options)
    session = runtime.InferenceSession(str(model))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), subject(x[:1]), atol=1e-4, rtol=1e-4)
    assert text.read_text() == to_vnnlib(ask(subject, x[0], count=1, clip=(0.0, 1.0), label=None, **options))


def test_vnnlib_names_every_input_and_every_other_class():
    from lynceus.trust.vnnlib import to_vnnlib

    net, (_, _, x, _) = digits_mlp(0), digits8()
    subject = Subject(net, mean=(0.1,), std=(0.5,))
    text = to_vnnlib(ask(subject, x[0], step=0.25, count=1, dims=[3, 9], clip=(0.0, 1.0), label=None))
    lines = text.splitlines()
    low = [float(line.split()[-1].rstrip(")")) for line in lines if line.startswith("(assert (>= X_")]
    high = [float(line.split()[-1].rstrip(")")) for line in lines if line.startswith("(assert (<= X_")]
    flat = x[0].flatten().double()
    for i, (a, b) in enumerate(zip(low, high)):
        reach = 0.25 if i in (3, 9) else 0.0
        assert a == max(0.0, float(flat[i]) - reach)
        assert b == min(1.0, float(flat[i]) + reach)
    label = int(subject(x[:1]).argmax())
    assert sum(f"Y_{label}))" in line for line in lines) == 9
    assert text.count("(") == text.count(")")


def test_another_engine_is_asked_for_by_name():
    if importlib.util.find_spec("auto_LiRPA") is None:
        with pytest.raises(AdviceError, match="auto_LiRPA, which is not installed"):
            verify(nn.Linear(2, 2).eval(), torch.zeros(2), step=0.1, engine="auto_lirpa", label=0, clip=None)
        return
    net, (_, _, x, _) = digits_mlp(0), digits8()
    options = {"dims": largest(x[0], 6), "step": 0.2, "count": 2}
    ours, theirs = (verify(net, x[0], engine=e, **options) for e in ("own", "auto_lirpa"))
    assert ours.kind == theirs.kind
