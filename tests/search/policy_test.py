"""N2N learning: rewards, rules, 200 random draws on three networks, what the policies learn, and the whole search."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench._trust import digits8, trained
from bench.policy import layered, learn_to_remove, needy, transfer
from lynceus import create_model
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.core.ledger import Ledger
from lynceus.core.report import Report
from lynceus.core.rng import borrowed, generator
from lynceus.core.types import Sample
from lynceus.rewrite.restructure import Restructure
from lynceus.rewrite.structure import KINDS, layers_of
from lynceus.search.policy import (
    DistilConfig,
    PolicyConfig,
    ReinforceConfig,
    RemovalPolicy,
    Reward,
    ShrinkPolicy,
    compress,
    compression_reward,
    features,
    load_policy,
    save_policy,
    softness,
)
from lynceus.search.policy.compress import Search
from lynceus.search.policy.moves import after_removal, after_shrinking, removable, shrinkable
from lynceus.search.policy.sequences import FACTORS, raw
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import save_model

NETS = {
    # with the classifier that networks for CIFAR have: torchvision's own has 120 million numbers
    "vgg11": lambda: nn.Sequential(*torchvision.models.vgg11().features, nn.Flatten(), nn.Linear(512, 10)),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet34": lambda: torchvision.models.resnet34(num_classes=10),
}
QUICK = DistilConfig(epochs=1, final_epochs=2)
QUIET = PolicyConfig(iterations=1, rollouts=1)


def coloured():
    """The digits to learn from, as RGB."""
    x, y, _, _ = digits8()
    return x.expand(-1, 3, -1, -1), y


def small_teacher(epochs=6):
    """Five convolutions on 8x8 digits, 28 thousand parameters."""
    parts, inside = [], 3
    for i, width in enumerate((16, 24, 32, 32, 32)):
        parts += [nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if i in (0, 2):
            parts.append(nn.MaxPool2d(2))
        inside = width
    x, y = coloured()
    with borrowed(0, "teacher"):
        net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
        trained(net, x, y, seed=0, epochs=epochs)
    net.owns_pixels = True
    return net


@pytest.fixture(scope="module")
def teacher():
    return small_teacher()


@pytest.fixture(scope="module")
def data():
    x, y = coloured()
    return [Sample(image=a, label=int(b)) for a, b in zip(x[:300], y[:300])]


# reward ---------------------------------------------------------------------------------------------
def test_the_numbers_of_the_paper():
    assert compression_reward(0.5) == pytest.approx(0.75, abs=1e-12)
    assert compression_reward(0.9) == pytest.approx(0.99, abs=1e-12)
    assert [round(softness(i), 4) for i in (0, 5, 10, 15, 40)] == [1.0, 0.1975, 0.0123, 0.0, 0.0]


@given(st.integers(1, 1000), st.floats(0, 1), st.integers(0, 30), st.integers(1, 1000), st.floats(0.01, 1))
def test_reward_is_the_formula(size, accuracy, iteration, limit, least):
    reward = Reward(teacher_size=1000, teacher_accuracy=0.8)
    c = 1 - size / 1000
    want = c * (2 - c) * accuracy / 0.8
    assert reward(size, accuracy, iteration) == pytest.approx(want, abs=1e-12)
    limited = replace(reward, size_limit=limit, accuracy_limit=least)
    if size <= limit and accuracy >= least:
        assert limited(size, accuracy, iteration) == pytest.approx(want, abs=1e-12)
    else:
        eps = max(0.0, 1 - iteration / 15) ** 4
        assert limited(size, accuracy, iteration) == pytest.approx((eps - 1) + eps * want, abs=1e-12)


def test_an_untrained_teacher_is_refused():
    with pytest.raises(AdviceError, match="trained network"):
        Reward(teacher_size=1000, teacher_accuracy=0.0)


# rules ----------------------------------------------------------------------------------------------
def test_what_must_stay_stays():
    layers = layers_of(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    free = dict(zip([l.name for l in layers], removable(layers).tolist()))
    stay = ["conv1", "fc", "avgpool", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.downsample.1"]
    assert not any(free[n] for n in stay)
    assert all(free[n] for n in ("bn1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer1.0.bn1"))
    assert not free["maxpool"] or not layers[3].start  # outside of branches a pool may go


def test_what_shrinks():
    layers = layers_of(torchvision.models.resnet18(num_classes=10), (3, 64, 64))
    able = {l.name: row for l, row in zip(layers, shrinkable(layers).tolist())}
    assert not any(able["conv1"])  # strided
    assert not any(able["fc"])
    assert not any(able["avgpool"])
    assert able["layer1.0.conv1"] == [False, False, False, True, False]  # in a branch only the width
    assert not any(able["layer1.0.conv2"])  # added to the strided stem's output
    decides = [n for n in ("layer2.0.conv2", "layer2.1.conv2", "layer2.0.downsample.0") if able[n][3]]
    assert len(decides) == 1  # one action for both ends of a shortcut
    plain = layers_of(NETS["vgg11"](), (3, 32, 32))
    assert shrinkable(plain)[0].tolist() == [False, True, False, True, True]
    assert not shrinkable(plain)[:, 0].any()


def test_sizes_are_cut_as_the_paper_says():
    layers = layers_of(NETS["vgg11"](), (3, 32, 32))
    actions = torch.full((len(layers), 5), len(FACTORS) - 1)
    assert after_shrinking(layers, actions) == ()
    actions[0] = 0
    assert after_shrinking(layers, actions) == (("0", 1, 1, 16, 0),)
    few = [replace(layers[0], width=24)]
    assert after_shrinking(few, actions[:1])[0][3] == 10


@pytest.mark.parametrize("name", NETS)
def test_random_students_run_or_are_called_invalid(name):
    """200 draws: every plan gives a network whose pieces fit, or is reported; nothing raises."""
    teacher = NETS[name]()
    search = Search(
        teacher,
        (3, 64, 64) if name != "vgg11" else (3, 32, 32),
        Reward(teacher_size=sum(p.numel() for p in teacher.parameters()), teacher_accuracy=0.9),
        lambda plans: [0.5] * len(plans),
        config=PolicyConfig(iterations=10, rollouts=10, strategy="random"),
        learning=ReinforceConfig(),
    )
    search.run({}, 0.0)
    assert len(search.log) == 200
    bad = [e for e in search.log if e["invalid"]]
    assert all(e["R"] == -1 for e in bad)
    good = [e for e in search.log if not e["invalid"]]
    assert len(good) > 60
    assert all(0 < e["C"] < 1 for e in good)
    for entry in good[:: len(good) // 4]:
        student = entry["plan"](teacher)
        assert student(torch.rand(2, *search.image)).shape == (2, 10)
        assert sum(p.numel() for p in student.parameters()) == entry["parameters"]


# policies -------------------------------------------------------------------------------------------
def test_layers_as_vectors():
    rows = torch.tensor([[KINDS.index("Conv2d"), 3.0, 1.0, 512.0, 1.0, 4.0, 9.0]])
    assert torch.equal(features(rows, scaled=False), rows)
    scaled = features(rows)
    assert scaled.shape == (1, len(KINDS) + 6)
    assert scaled.abs().max() < 1.5
    assert raw([layered(0)[0]], skips=False).shape == (1, 5)


@pytest.mark.parametrize("kind", [RemovalPolicy, ShrinkPolicy])
@pytest.mark.parametrize("critic", [False, True])
def test_every_weight_learns_and_draws_are_scored_alike(kind, critic):
    """The paper's code kept its shrinkage cells in a list, where they never learned."""
    torch.manual_seed(0)
    policy = kind(critic=critic)
    layers = layered(0, 5)
    rows, draw = raw(layers), generator(0, "draw")
    free = torch.ones(5, dtype=torch.bool) if kind is RemovalPolicy else torch.ones(5, 5, dtype=torch.bool)
    actions = policy.sample(rows, free, 4, draw)
    score, value = policy.log_prob(rows, free, actions)
    assert (value is not None) == critic
    loss = score.sum() if value is None else score.sum() + value.sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_probabilities_of_all_removals_sum_to_one():
    policy, rows = RemovalPolicy(), raw(layered(1, 4))
    free = torch.tensor([True, True, False, True])
    all_actions = torch.cartesian_prod(*[torch.tensor([0, 1])] * 3)
    actions = torch.stack([all_actions[:, 0], all_actions[:, 1], torch.ones(8, dtype=torch.long), all_actions[:, 2]], 1)
    assert policy.log_prob(rows, free, actions)[0].exp().sum().item() == pytest.approx(1, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(0, 100))
def test_fields_that_are_not_free_stay(count, seed):
    policy, rows = ShrinkPolicy(), raw(layered(seed, 4))
    free = torch.rand(4, 5, generator=generator(seed, "free")) < 0.5
    actions = policy.sample(rows, free, count, generator(seed, "draw"))
    assert (actions[:, ~free] == len(FACTORS) - 1).all()


def test_a_policy_survives_its_file(tmp_path):
    policy = ShrinkPolicy(critic=True)
    again = load_policy(save_policy(policy, tmp_path / "shrink.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))
    (tmp_path / "bad.safetensors").write_bytes(b"no policy at all")
    with pytest.raises(AdviceError, match="no policy"):
        load_policy(tmp_path / "bad.safetensors")


def test_the_policy_learns_what_to_keep():
    """One of the bench's five seeds at its full length: far above random architectures, and above the paper's shared
    advantage, which throws away which rollout was better."""
    own, random_mean, _ = learn_to_remove(0, needy(0), iterations=400)
    shared, _, _ = learn_to_remove(0, needy(0), iterations=400, learning=ReinforceConfig(advantage="shared"))
    assert own > random_mean + 0.1
    assert own > 0.68
    assert shared < own


@pytest.mark.slow
def test_a_policy_of_a_small_teacher_starts_ahead_on_a_deeper_one():
    """100 iterations on six layers, as many as the paper's searches have, then the first ten on twelve."""
    rows = transfer()
    assert sum(r["transferred"] > r["fresh"] for r in rows) >= 4


# the search -----------------------------------------------------------------------------------------
def test_a_search_gives_a_smaller_student(teacher, data, tmp_path):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    config = PolicyConfig(iterations=2, rollouts=3, size_limit=14_000)
    out = compress(teacher, data, config=config, distil=QUICK, keep=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    size = sum(p.numel() for p in out.student.parameters())
    assert size <= 14_000
    assert out.report.summary["parameters"] == size
    assert out.student(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert set(out.policies) == {"remove", "shrink"}
    assert all(name.endswith(".plotly") for name in out.report.figures)  # the page draws figures by this ending
    assert {e["stage"] for e in out.log} >= {"remove", "shrink"}
    assert sum(p.numel() for p in out.plan(teacher).parameters()) == size
    again = compress(teacher, data, config=config, distil=QUICK, keep=tmp_path)
    assert again.report.summary["students taught"] == 0
    assert [e["R"] for e in again.log] == [e["R"] for e in out.log]
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), out.student.parameters()))


def test_a_limit_that_no_rollout_keeps_is_kept_by_narrowing(teacher, data):
    config = PolicyConfig(stages=("remove",), iterations=1, rollouts=2, size_limit=5_600)
    out = compress(teacher, data, config=config, distil=QUICK)
    assert sum(p.numel() for p in out.student.parameters()) <= 5_600


def test_a_residual_network_is_narrowed_whatever_runs_first_on_its_shortcuts():
    """Ours runs the shortcut before the branch that decides its width."""
    net = create_model("resnet_nano", num_classes=10)
    size = sum(p.numel() for p in net.parameters())
    reward = Reward(teacher_size=size, teacher_accuracy=0.5, size_limit=size * 9 // 10)
    search = Search(
        net, (3, 16, 16), reward, lambda plans: [0.5] * len(plans), config=QUIET, learning=ReinforceConfig()
    )
    found = search.narrowest(Restructure(image=(3, 16, 16)))
    student = found["plan"](net)
    assert sum(p.numel() for p in student.parameters()) == found["parameters"] <= size * 9 // 10
    assert student(torch.rand(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("kind", [DistilConfig, ReinforceConfig, PolicyConfig])
def test_numbers_that_are_none_are_refused(kind):
    name = {DistilConfig: "lr", ReinforceConfig: "policy_lr", PolicyConfig: "seconds"}[kind]
    for value in (float("nan"), 0.0, -1.0):
        with pytest.raises(AdviceError, match="above 0"):
            kind(**{name: value})


def test_a_transformer_is_refused_before_any_search(data):
    with pytest.raises(AdviceError, match="block_prune"):
        compress(create_model("vit_nano", num_classes=10), data, config=QUIET, distil=QUICK)


def test_a_limit_that_nothing_keeps_is_an_error(teacher, data):
    with pytest.raises(AdviceError, match="the smallest has"):
        compress(teacher, data, config=PolicyConfig(stages=("remove",), iterations=1, size_limit=50), distil=QUICK)


def test_processes_of_their_own_score_alike(teacher, data):
    config = PolicyConfig(stages=("remove",), iterations=1, rollouts=3)
    alone = compress(teacher, data, config=config, distil=QUICK)
    pooled = compress(teacher, data, config=replace(config, workers=2), distil=QUICK)
    assert [e["A"] for e in alone.log] == [e["A"] for e in pooled.log]


def test_equal_structures_are_taught_once(teacher):
    asked = []

    def score(plans):
        asked.extend(plans)
        return [0.5] * len(plans)

    reward = Reward(teacher_size=sum(p.numel() for p in teacher.parameters()), teacher_accuracy=1.0)
    search = Search(teacher, (3, 8, 8), reward, score, config=PolicyConfig(), learning=ReinforceConfig())
    plan = Restructure(removed=("4",), image=(3, 8, 8))
    search.judge("remove", 0, [plan, plan])
    search.judge("remove", 1, [plan])
    assert len(asked) == 1
    assert len(search.log) == 3


def test_a_policy_goes_on_with_a_deeper_network(teacher, data, tmp_path):
    """State vectors have a fixed width, so any depth fits."""
    policy = RemovalPolicy()
    file = save_policy(policy, tmp_path / "remove.safetensors")
    config = PolicyConfig(stages=("remove",), iterations=2, rollouts=2)
    out = compress(teacher, data, config=config, distil=QUICK, policies={"remove": file})
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), out.policies["remove"].parameters())]
    assert all(moved)
    deeper = layers_of(NETS["resnet34"](), (3, 64, 64))
    assert len(after_removal(deeper, policy.sample(raw(deeper), removable(deeper), 1, generator(0))[0])) > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": ("grow",)}, "remove"),
        ({"iterations": 0}, "at least 1"),
        ({"held_out": 1.0}, "share"),
        ({"size_limit": 0}, "number of parameters"),
        ({"accuracy_limit": 97.0}, "share"),
        ({"strategy": "greedy"}, "random"),
    ],
)
def test_options_that_mean_nothing_are_refused(change, says):
    with pytest.raises(AdviceError, match=says):
        PolicyConfig(**change)


def test_bad_input_is_said_before_any_search(teacher, data):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    mlp.owns_pixels = True
    with pytest.raises(AdviceError, match="no convolution"):
        compress(mlp, data)
    with pytest.raises(AdviceError, match="RemovalPolicy"):
        compress(teacher, data, policies={"remove": ShrinkPolicy()})
    with pytest.raises(AdviceError, match="label"):
        compress(teacher, [Sample(image=s.image) for s in data])


def test_the_command_line(tmp_path, capsys):
    run, out = tmp_path / "teacher", tmp_path / "small"
    quick = ["--epochs", "2", "--quiet", "--limit", "300"]
    assert main(["train", "classify", "digits", "--model", "resnet_nano", "--out", str(run), *quick]) == 0
    small = ["--iterations", "1", "--rollouts", "2", "--epochs", "1", "--final-epochs", "1"]
    args = ["search", "policy", str(run), "digits", "--limit", "200", "--out", str(out), *small]
    assert main(args) == 0
    assert "the student:" in capsys.readouterr().out
    first = json.loads((out / "report.json").read_text())["summary"]
    assert first["times smaller"] > 1
    assert main([*args, "--remove-policy", str(out / "remove.safetensors")]) == 0
    assert main(["check", "accuracy", str(out), "digits", "--limit", "50", "--out", str(tmp_path / "a")]) == 0


def test_the_command_line_leaves_nothing_after_a_mistake_and_goes_on_after_ctrl_c(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(Classify(num_classes=10).build(create_model("vit_nano")), "vit")
    save_model(Classify(num_classes=10).build(create_model("resnet_nano")), "net")
    for model, more in (("vit", []), ("net", ["--workers", "0"]), ("net", ["--lr", "nan"])):
        assert main(["search", "policy", model, "digits", "--limit", "30", "--out", "out", *more]) == 2
        assert not (tmp_path / "out").exists()
    args = ["search", "policy", "net", "digits", "--limit", "200", "--iterations", "2", "--rollouts", "1"]
    short = ["--stages", "remove", "--epochs", "1", "--final-epochs", "1", "--out"]
    put, calls = Ledger.put, []

    def stopped(ledger, key, value):
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(ledger, key, value)

    monkeypatch.setattr(Ledger, "put", stopped)
    assert main([*args, *short, "out"]) == 130
    assert "the same command with --out out goes on" in capsys.readouterr().err
    monkeypatch.setattr(Ledger, "put", put)
    assert main([*args, *short, "out"]) == 0
    assert main([*args, *short, "whole"]) == 0
    reports = [Report.load(n) for n in ("out", "whole")]
    assert [r.summary["students taught"] for r in reports] == [1, 2]
    assert reports[0].rows == reports[1].rows
