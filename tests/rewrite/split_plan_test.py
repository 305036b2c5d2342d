"""Plans: what they promise, that they keep limits, that a fresh process reads them, and what a split must answer."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lynceus
import lynceus.data
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.nouns import chain
from lynceus.data.digits import digits
from lynceus.rewrite.block_prune.rewrite import BlockPrune
from lynceus.rewrite.deploy import Deploy
from lynceus.rewrite.split import Budget, Cut, Device, InfeasibleError, Plan, Retrain, Split, SplitConfig, split
from lynceus.rewrite.split.fused import Fused, Fusion, fit_fusion, joined
from lynceus.rewrite.split.importance import Probe, choose
from lynceus.rewrite.split.part import cut_head, opened
from lynceus.rewrite.split.retrain import cycle, outputs
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model

QUICK = SplitConfig(rounds=1, retrain=Retrain(steps=60, lr=3e-3), fusion_steps=400, calibration=64)
NOTHING = SplitConfig(pruned=0, rounds=1, retrain=Retrain(steps=0), fusion_steps=0)


def batch(name):
    data = digits(split=name)
    every = data.batch(range(len(data)))
    return every.image, every.label


def dense(seed=0, steps=250, dim=24, depth=2):
    torch.manual_seed(seed)
    net = {"image_size": (8, 8), "patch_size": 2, "dim": dim, "heads": 6, "depth": depth}
    model = Classify(num_classes=10).build(lynceus.create_model("vit_nano", num_classes=10, **net))
    image, label = batch("train")
    draw = torch.Generator().manual_seed(seed)

    def loss():
        rows = torch.randint(len(label), (64,), generator=draw)
        return F.cross_entropy(model(image[rows]), label[rows])

    model.train()
    cycle([model], steps, loss, lr=3e-3, weight_decay=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return dense()


@pytest.fixture(scope="module")
def plan(model):
    return split(model, 3, digits(split="train"), config=QUICK)


def right(run, name="test"):
    image, label = batch(name)
    return float((outputs(run, image).argmax(1) == label).float().mean())


# what a plan promises ----------------------------------------------------------------------------
def test_a_plan_says_what_runs_where(plan, model):
    report = plan.report()
    wanted = {"classes", "pruned", "kB", "MFLOPs", "device", "ms", "J (model)", "of dense"}
    assert all(wanted <= set(row) for row in report.rows)
    assert [r["device"] for r in report.rows] == ["device0", "device1", "device2"]
    assert sorted(c for s in plan.shares for c in s.classes) == list(range(10))
    assert all(s.pruned == 3 and s.unit == 6 for s in plan.shares)
    for s, part in zip(plan.shares, plan.net.parts):
        assert s.bytes == 4 * sum(p.numel() for p in part.parameters())
        assert part.backbone.config.dim == 12
    assert any("model, not a measurement" in n for n in report.notes)
    assert plan.feature_bytes("device0") == 4 * 12


def test_the_fused_parts_answer_like_the_dense_model(plan, model):
    found = plan.evaluate(digits(split="test"), dense=model)
    said = {r["answers of"]: r["accuracy"] for r in found.rows}
    assert said["dense"] == pytest.approx(right(model))
    assert said["fused"] == pytest.approx(right(plan))
    assert said["no fusion"] == pytest.approx(right(plan.scores))
    assert said["fused"] > said["dense"] - 0.12  # a net of width 24, cut to 12, trained for seconds
    assert said["fused"] > said["no fusion"]
    assert {"without device0", "without device1", "without device2"} < set(said)
    assert plan.measured["accuracy, fused"] == said["fused"]


def test_fusion_that_met_missing_features_loses_less(plan):
    """Accuracy without a device, summed over devices: trained with feature dropout beside without."""
    image, label = batch("train")
    features = torch.cat([outputs(part, image) for part in plan.net.parts], 1)
    left = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        fusion = Fusion(plan.net.fusion.widths, 10)
        fit_fusion(fusion, features, label, steps=300, dropout=dropout)
        other = replace(plan, net=Fused(list(plan.net.parts), plan.net.groups, fusion), measured={})
        rows = other.evaluate(batch("test")).rows
        left.append(sum(r["accuracy"] for r in rows if r["answers of"].startswith("without")))
    assert left[1] > left[0] + 0.1


def test_latency_model(plan):
    slow = plan.with_devices(
        Device(name=d.name, speed=1e6 * (i + 1), rate=1e4, delay=0.01) for i, d in enumerate(plan.devices)
    )
    share = next(s for s in plan.shares if s.device == "device0")
    want = share.flops / 1e6 + (3 * 64 + 48) / 1e4 + 0.02
    assert slow.device_latency("device0") == pytest.approx(want)
    assert slow.latency() == pytest.approx(want + plan.fusion_flops / plan.fusion_speed)


# limits ------------------------------------------------------------------------------------------
def test_limits_prune_further_and_are_kept(model):
    part = opened(model)[0]
    weight = 4 * sum(p.numel() for p in part.parameters())
    devices = [Device(name="pi", memory=weight / 6), Device(name="phone")]
    config = SplitConfig(parts=4, rounds=1, retrain=Retrain(steps=0), fusion_steps=0, measure="magnitude")
    plan = split(model, devices, batch("train"), Budget(bytes=weight / 2), config=config)
    assert sum(s.bytes for s in plan.shares) <= weight / 2
    assert sum(s.bytes for s in plan.shares if s.device == "pi") <= weight / 6
    assert max(s.pruned for s in plan.shares) > 3
    assert len(plan.shares) == 4


def test_mistakes_are_told_before_any_work(model, monkeypatch):
    monkeypatch.setattr("lynceus.rewrite.split.make.sub_model", lambda *a, **k: pytest.fail("work began"))
    data = batch("train")
    with pytest.raises(AdviceError, match="11 devices for 10 classes"):
        split(model, 11, data)
    with pytest.raises(InfeasibleError, match="the largest device, pi, has 10"):
        split(model, [Device(name="pi", memory=10)], data)
    with pytest.raises(AdviceError, match="6 of 6 shares of heads cannot be pruned; take 0 to 5"):
        split(model, 2, data, config=SplitConfig(pruned=6))
    with pytest.raises(AdviceError, match="no image of class 9"):
        split(model, 2, (data[0][data[1] < 9], data[1][data[1] < 9]))
    with pytest.raises(AdviceError, match="labels run from 0 to 10"):
        split(model, 2, (data[0], data[1] + (data[1] == 9)))
    with pytest.raises(AdviceError, match="learn their classes from labels"):
        split(model, 2, [lynceus.data.digits.digits()[0].__class__(image=data[0][0])])
    with pytest.raises(AdviceError, match=r"\(n, c, h, w\) and labels"):
        split(model, 2, (data[0], data[1][:5]))


# invariants --------------------------------------------------------------------------------------
@settings(max_examples=6, deadline=None)
@given(
    heads=st.integers(1, 3), each=st.integers(4, 6), depth=st.integers(1, 2), classes=st.integers(2, 6),
    count=st.integers(1, 6), seed=st.integers(0, 99), distilled=st.booleans(),
)  # fmt: skip
def test_split_without_pruning_equals_the_parts(heads, each, depth, classes, count, seed, distilled):
    """Nothing cut, nothing retrained: every feature is the dense one; the parts' scores side by side are its logits."""
    torch.manual_seed(seed)
    net = {"image_size": (8, 8), "patch_size": 4, "dim": heads * each, "heads": heads, "depth": depth}
    more = {"distilled": True, "class_token": True, "pool": "token"} if distilled else {}
    whole = Classify(num_classes=classes).build(lynceus.create_model("vit_nano", num_classes=classes, **net, **more))
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(0.1 * torch.randn_like(p))
    whole.eval()
    image, label = torch.rand(2 * classes, 3, 8, 8), torch.arange(2 * classes) % classes
    if count > classes:
        with pytest.raises(AdviceError, match="at least one class"):
            split(whole, count, (image, label), config=NOTHING)
        return
    plan = split(whole, count, (image, label), config=replace(NOTHING, seed=seed))
    part, _ = opened(whole)
    with torch.no_grad():
        features = plan.net.features(image)
        assert all(torch.equal(f, part(image)) for f in features)
        scores = joined([h(f) for h, f in zip(plan.heads, features)], plan.net.groups, classes)
        assert torch.allclose(scores, whole(image), atol=1e-5)


def test_swin_and_deit_split_too():
    torch.manual_seed(0)
    image, label = torch.rand(12, 3, 32, 32), torch.arange(12) % 4
    config = SplitConfig(rounds=1, retrain=Retrain(steps=2, batch=4), fusion_steps=2)
    swin = Classify(num_classes=4).build(lynceus.create_model("swin_nano", num_classes=4))
    plan = split(swin, 2, (image, label), config=config)
    assert plan.net.parts[0].backbone.config.num_heads == (1, 2, 4)
    assert plan.net.parts[0].backbone.config.embed_dim == 16
    deit = lynceus.create_model("deit_tiny_distilled", image_size=(32, 32), depth=2, num_classes=4)
    plan = split(deit, 2, (image, label), config=config)
    assert plan.shares[0].pruned == 1
    assert plan.net.fusion.widths == (256, 256)  # class and distillation token of 128 channels
    assert plan(image).shape == (12, 4)


# files -------------------------------------------------------------------------------------------
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from lynceus.rewrite.split import Plan
plan = Plan.load(sys.argv[1])
save_file({"logits": plan(load_file(sys.argv[2])["image"])}, sys.argv[3])
print(plan.report().answer)
"""


def test_a_saved_plan_loads_in_a_fresh_process(plan, tmp_path):
    image = batch("test")[0][:9]
    plan.save(tmp_path / "plan")
    save_file({"image": image}, tmp_path / "image.safetensors")
    files = [str(tmp_path / n) for n in ("plan", "image.safetensors", "out.safetensors")]
    done = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 sub-models on 3 devices" in done.stdout
    assert torch.allclose(load_file(files[2])["logits"], plan(image), atol=1e-6)
    assert {p.suffix for p in (tmp_path / "plan").iterdir()} == {".json", ".safetensors"}
    again = Plan.load(tmp_path / "plan")
    assert again.shares == plan.shares
    assert again.devices == plan.devices
    assert again.measured == plan.measured
    assert torch.equal(again.scores(image), plan.scores(image))


def test_broken_folders_are_told(plan, tmp_path):
    with pytest.raises(MissingError, match=r"no plan\.json"):
        Plan.load(tmp_path)
    folder = plan.save(tmp_path / "plan")
    (folder / "part1.safetensors").write_bytes((folder / "part1.safetensors").read_bytes()[:200])
    with pytest.raises(AdviceError, match="not a whole"):
        Plan.load(folder)
    (folder / "part1.safetensors").unlink()
    with pytest.raises(MissingError, match=r"no part1\.safetensors"):
        Plan.load(folder)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(AdviceError, match="no plan of lynceus"):
        Plan.load(folder)


def test_the_rewrite_learns_from_the_models_own_answers_and_saves(model, tmp_path):
    image = batch("train")[0][:300].float() / 255
    made = Split(parts=2, steps=60, fusion_steps=300)(model, image)
    assert right(made) > 0.6  # 300 pictures, no labels, seconds
    save_model(made, tmp_path / "made")
    again = load_model(tmp_path / "made")
    assert torch.equal(again(image[:5]), made(image[:5]))
    with pytest.raises(AdviceError, match="Split measures on images"):
        Split()(model, None)


def test_it_chains_with_a_cut_before_and_deploy_behind(model, tmp_path):
    image = batch("train")[0][:64].float() / 255
    cut = Cut(channels=(tuple(range(16)),), heads=((0, 1, 2, 3),) * 2, hidden=(tuple(range(64)),) * 2)
    both = chain(cut, Split(parts=2, pruned=1, steps=2, fusion_steps=2))(model, image)
    assert both.parts[0].backbone.config.dim == 12
    save_model(both, tmp_path / "both")
    assert torch.equal(load_model(tmp_path / "both")(image), both(image))
    sparse = BlockPrune(block=(4, 4), flops=0.8)(both, image)  # signs what carries a description of its own
    save_model(sparse, tmp_path / "sparse")
    assert torch.equal(load_model(tmp_path / "sparse")(image[:8]), sparse(image[:8]))
    fast = Deploy(ways=("eager",), seconds=0.05, threads=(1,))(both, image[:8])
    save_model(fast, tmp_path / "fast")
    assert torch.allclose(load_model(tmp_path / "fast")(image[:8]), both(image[:8]), atol=1e-4)


def test_the_command_line_makes_a_plan(model, tmp_path, capsys):
    save_model(model, tmp_path / "model")
    (tmp_path / "devices.yaml").write_text("devices:\n- {name: pi, memory: 30000}\n- {name: phone, rate: 250000.0}\n")
    out = tmp_path / "out"
    argv = [
        "rewrite",
        "split",
        str(tmp_path / "model"),
        "--data",
        "digits",
        "--cluster",
        str(tmp_path / "devices.yaml"),
    ]
    assert main([*argv, "--steps", "2", "--fusion-steps", "2", "--rounds", "1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "phone" in told
    assert "from lynceus.rewrite.split import" in told
    loaded = Plan.load(out)
    assert [d.name for d in loaded.devices] == ["pi", "phone"]
    assert loaded.devices[1].memory == math.inf
    image = batch("test")[0][:3]
    assert torch.allclose(load_model(out)(image), loaded(image), atol=1e-6)
    assert main(["rewrite", "split", str(tmp_path / "model"), "--data", "digits", "--devices", "12"]) == 2
    assert "12 devices for 10 classes" in capsys.readouterr().err


@pytest.mark.slow
def test_kl_beats_magnitude_and_random_on_own_classes():
    """Right after pruning, on the test digits of a sub-model's own classes; three seeds. Also in bench/split.py."""
    image, label = batch("train")
    test, known = batch("test")
    found = dict.fromkeys(("taylor", "magnitude", "random"), 0.0)
    for seed in range(3):
        whole = dense(seed)
        part, head = opened(whole)
        log_p = outputs(lambda x: head(part(x)).double().log_softmax(-1), image)  # noqa: B023
        for group in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)):
            mine = torch.isin(label, torch.tensor(group)).nonzero()[:, 0][:64]
            theirs = torch.isin(known, torch.tensor(group))
            for how in found:
                probe = Probe(part, head, image[mine].float() / 255, log_p[mine])
                cut = choose(probe, 1, how, seed=seed)
                small, last = part.cut(cut), cut_head(head, cut, 24)
                said = outputs(lambda x: last(small(x)), test[theirs]).argmax(1)  # noqa: B023
                found[how] += float((said == known[theirs]).float().mean()) / 15
    assert found["taylor"] > max(found["magnitude"], found["random"]) + 0.05, found
