"""Block pruning of whole models: budget, plan, files, heads, reports, export, finetune, and mistakes told."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import lynceus
from lynceus.core.config import from_dict, to_dict
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import chain
from lynceus.core.rng import generator
from lynceus.core.types import Batch
from lynceus.layers.attention import Attention
from lynceus.recipes.distil import Distil, DistilConfig, soft
from lynceus.rewrite.block_prune import (
    BlockPrune,
    BlockSparseConv,
    BlockSparseLinear,
    BlockSparseMlp,
    KeptBlocks,
    joules_per_image,
    prune,
    sparsity_report,
)
from lynceus.rewrite.block_prune.heads import attentions, dead, drop
from lynceus.rewrite.block_prune.rewrite import read, written
from lynceus.rewrite.swap import Swap
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model


def predictor(name, **changes):
    torch.manual_seed(0)
    return Classify(num_classes=5).build(lynceus.create_model(name, **changes))


def pictures(count=6, side=32):
    return torch.rand(count, 3, side, side, generator=generator(0, "pictures"))


def masked_copy(model, plan):
    """The model with zeros in the pruned blocks of its dense layers, made without the code under test."""
    made = copy.deepcopy(model).eval()
    for name, text in plan.kept.items():
        layer, kept = made.get_submodule(name), torch.from_numpy(read(text, name))
        wide = kept.repeat_interleave(plan.block[0], 0).repeat_interleave(plan.block[1], 1)
        weight = layer.weight.detach().flatten(1)
        layer.weight.data = (weight * wide[: weight.shape[0], : weight.shape[1]]).view_as(layer.weight)
    return made


@pytest.mark.parametrize(
    ("name", "flops"),
    [("vit_nano", 0.5), ("vit_nano", 0.3), ("swin_nano", 0.5), ("volo_nano", 0.4), ("convnext_nano", 0.7)],
)
def test_packed_equals_masked_and_the_budget_is_met(name, flops):
    model, x = predictor(name), pictures()
    made = BlockPrune(block=(8, 16), flops=flops, drop_heads=False)(model, x)
    want = masked_copy(model, made.rewrite)
    with torch.no_grad():
        assert (made(x) - want(x)).abs().max() < 1e-4
    made.train()
    made.eval()
    assert (made(x) - want(x)).abs().max() < 1e-4  # the path that takes gradients
    for n in made.rewrite.kept:
        assert made.get_submodule(n).weights == int((want.get_submodule(n).weight != 0).sum())
    assert abs(made.report.summary["flops"] - flops) <= 0.02
    assert abs(made.report.summary["macs of all layers left"] - flops) <= 0.03  # biases are not in this one


def test_the_function_of_the_card():
    model, x = predictor("vit_nano"), pictures()
    made = prune(model, x, block=(16, 16), flops=0.5, power=True)
    assert made.rewrite == BlockPrune(block=16)(model, x).rewrite
    with torch.no_grad():
        assert (made(x) - masked_copy(model, made.rewrite)(x)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_models_are_pruned_too(name):
    torch.manual_seed(0)
    more = {"window_size": 2, "depths": (1, 1, 1, 1)} if "swin" in name else {"depth": 3}
    model, x = timm.create_model(name, num_classes=5, img_size=64, **more).eval(), pictures(2, 64)
    made = BlockPrune(block=32, flops=0.5)(model, x)
    want = masked_copy(model, made.rewrite)
    with torch.no_grad():
        assert (made(x) - want(x)).abs().max() < 1e-4
    assert any(isinstance(m, BlockSparseMlp) for m in made.modules())
    assert abs(made.report.summary["flops"] - 0.5) <= 0.02


def test_ours_by_name_of_timm_and_plain_modules():
    for name in ("timm:vit_tiny_patch16_224", "deit_tiny"):
        made = BlockPrune(block=64, flops=0.6)(lynceus.create_model(name, num_classes=5, depth=2), pictures(2, 224))
        assert len(made.rewrite.kept) == 8
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = pictures(4, 8)
    made = BlockPrune(block=8, flops=0.5)(plain, x)
    with torch.no_grad():
        assert torch.allclose(made(x), masked_copy(plain, made.rewrite)(x), atol=1e-5)


def test_the_ends_stay_whole_unless_asked_for():
    model, x = predictor("vit_nano"), pictures()
    assert not any("head" in n or "patch_embed" in n for n in BlockPrune(block=8)(model, x).rewrite.kept)
    made = BlockPrune(block=(4, 8), exclude="")(model, x)
    assert isinstance(made.get_submodule("backbone.patch_embed.proj"), BlockSparseConv)
    with torch.no_grad():
        assert (made(x) - masked_copy(model, made.rewrite)(x)).abs().max() < 1e-4
    only = BlockPrune(block=8, flops=0.8, layers=r"mlp\.fc1")(model, x).rewrite.kept
    assert only
    assert all(n.endswith("mlp.fc1") for n in only)


def test_a_file_is_rebuilt_without_images(tmp_path):
    x = pictures()
    for model in (predictor("vit_nano"), predictor("swin_nano")):
        made = BlockPrune(block=16, flops=0.4)(model, x)
        assert from_dict(KeptBlocks, json.loads(json.dumps(to_dict(made.rewrite)))) == made.rewrite
        save_model(made, tmp_path / "m")
        again = load_model(tmp_path / "m")
        with torch.no_grad():
            assert torch.equal(again(x), made(x))
        report = sparsity_report(again, x)
        assert [r["blocks"] for r in report.rows] == [r["blocks"] for r in made.report.rows]


def test_it_chains_after_another_rewrite_and_its_file_opens(tmp_path):
    x = pictures()
    both = chain(Swap(mixer="attention", keep=True), BlockPrune(block=16, flops=0.6))
    made = both(predictor("vit_nano"), x)
    save_model(made, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(x), made(x))


def test_the_counter_sees_fewer_macs():
    model, x = predictor("vit_nano", dim=128, heads=4), pictures(8, 64)
    made = BlockPrune(block=32, flops=0.4, power=False, drop_heads=False)(model, x)
    before, after = cost(model, x), cost(made, x)
    layers = sum(r["dense macs"] - r["macs"] for r in made.report.rows) * len(x)
    assert 0.95 * layers <= before.macs - after.macs <= layers  # a layer that is quicker dense is run and counted dense
    assert after.params < 0.6 * before.params


def test_costs_are_charged_and_told():
    model, x = predictor("vit_nano"), pictures()
    for name in ("weights", "tokens", "measured"):
        report = BlockPrune(block=16, cost=name)(model, x).report
        assert any(f"{name} cost" in n for n in report.notes)
        assert ("ms at 50%" in report.rows[0]) == (name == "measured")
    assert not any("Charged" in n for n in BlockPrune(block=16, power=False)(model, x).report.notes)


def test_uniform_and_magnitude_need_less():
    model, x = predictor("vit_nano"), pictures()
    made = BlockPrune(block=8, ranking="magnitude", spread="uniform")(model, x)
    shares = [r["sparsity"] for r in made.report.rows]
    assert max(shares) - min(shares) < 0.02
    layer, text = next(iter(made.rewrite.kept.items()))
    kept = read(text, layer)
    weight = model.get_submodule(layer).weight.detach()
    means = weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).abs().mean((1, 3)).numpy()
    assert means[kept].min() >= means[~kept].max()


# heads ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_empty_heads_are_dropped_and_the_answer_stays(bias):
    torch.manual_seed(0)
    attention = Attention(64, 4, qkv_bias=bias).eval()  # heads of 16
    qkv, proj = np.ones((12, 4), bool), np.ones((4, 4), bool)
    qkv[8 + 1] = False  # the values of head 1
    proj[:, 3] = False  # head 3 is not read
    gone = dead(qkv, proj, heads=4, head_dim=16, rows=16, columns=16)
    assert gone == [1, 3]
    with torch.no_grad():
        for layer, kept in ((attention.qkv, qkv), (attention.proj, proj)):
            layer.weight.mul_(torch.from_numpy(kept).repeat_interleave(16, 0).repeat_interleave(16, 1))
    x = torch.randn(2, 9, 64)
    want = attention(x)
    made = copy.deepcopy(attention)
    first, second = drop(made, gone, qkv, proj, (16, 16))
    assert (made.heads, made.qkv.out_features, made.proj.in_features) == (2, 96, 32)
    assert first.shape == (6, 4)
    assert second.shape == (4, 2)
    assert torch.allclose(made(x), want, atol=1e-5)


def test_heads_that_share_a_block_go_together_and_one_stays():
    qkv, proj = np.zeros((6, 2), bool), np.ones((2, 2), bool)
    assert dead(qkv, proj, heads=4, head_dim=16, rows=32, columns=32) == [2, 3]
    qkv[4] = True
    assert dead(qkv, proj, heads=4, head_dim=16, rows=32, columns=32) == [2, 3]
    assert dead(qkv[:, :1], proj, heads=3, head_dim=16, rows=32, columns=32) == []


def test_a_plan_that_empties_heads_gives_a_smaller_model_that_loads(tmp_path):
    model, x = predictor("vit_nano", dim=64, heads=4), pictures()
    name = next(n for n, _ in attentions(model))
    qkv, proj = np.ones((12, 4), bool), np.ones((4, 4), bool)
    qkv[8] = False
    plan = KeptBlocks(block=(16, 16), kept={f"{name}.qkv": written(qkv), f"{name}.proj": written(proj)})
    made = plan(model, x)
    assert made.get_submodule(name).heads == 3
    assert plan(untouched := copy.deepcopy(model), None).get_submodule(name).qkv.out_features == 144
    assert untouched.get_submodule(name).heads == 4
    with torch.no_grad():
        assert torch.allclose(made(x), masked_copy(model, plan)(x), atol=1e-5)
    save_model(made, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(x), made(x))


def test_timm_heads_are_dropped_too():
    torch.manual_seed(0)
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval(), pictures(2)
    qkv, proj = np.ones((9, 3), bool), np.ones((3, 3), bool)
    proj[:, 1] = False
    plan = KeptBlocks(block=(64, 64), kept={"blocks.0.attn.qkv": written(qkv), "blocks.0.attn.proj": written(proj)})
    made = plan(model)
    assert made.blocks[0].attn.num_heads == 2
    with torch.no_grad():
        assert torch.allclose(made(x), masked_copy(model, plan)(x), atol=1e-5)


# learning --------------------------------------------------------------------------------------------
def test_finetuning_learns_and_revives_nothing():
    torch.manual_seed(0)
    teacher, x = predictor("vit_nano"), pictures(16)
    student = BlockPrune(block=8, flops=0.4)(teacher, x)
    zero = {n: m.weight == 0 for n, m in student.named_modules() if isinstance(m, BlockSparseLinear)}
    recipe = Distil(student, teacher, DistilConfig(weight=0.8)).train()
    optimizer = torch.optim.AdamW(recipe.param_groups(), 3e-3, weight_decay=0.1)
    batch = Batch(image=x, sizes=[(32, 32)] * 16, label=torch.arange(16) % 5)
    losses = []
    for step in range(12):
        losses.append(recipe(batch)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        recipe.after_step(step, 12)
    assert losses[-1] < losses[0]
    for name, gone in zero.items():
        assert (student.get_submodule(name).weight[gone] == 0).all()
    assert all(p.grad is None for p in recipe.teacher.parameters())


def test_masked_weights_of_dense_layers_stay_zero():
    teacher, x = predictor("vit_nano"), pictures(8)
    plan = BlockPrune(block=8, flops=0.4)(teacher, x).rewrite
    student = masked_copy(teacher, plan)
    recipe = Distil(student, teacher, DistilConfig(masked=True)).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.1)
    batch = Batch(image=x, sizes=[(32, 32)] * 8, label=torch.arange(8) % 5)
    for step in range(3):
        recipe(batch)["loss"].backward()
        optimizer.step()
        recipe.after_step(step, 3)
    assert all(
        torch.equal(masked_copy(student, plan).get_submodule(n).weight, student.get_submodule(n).weight)
        for n in plan.kept
    )


def test_the_soft_loss_is_the_divergence():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (b / 2).softmax(-1), (a / 2).softmax(-1)
    assert torch.allclose(soft(a, b, 2.0), 4 * (p * (p / q).log()).sum(-1).mean(), atol=1e-6)
    assert soft(a, a, 3.0).abs() < 1e-6


# reports ----------------------------------------------------------------------------------------------
def test_energy_is_absent_or_read(tmp_path):
    made, x = BlockPrune(block=8)(predictor("vit_nano"), pictures()), pictures()
    nothing, why = joules_per_image(made, x, root=tmp_path / "none")
    assert nothing is None
    assert "No energy counter" in why
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "energy_uj").write_text("900")
    (folder / "max_energy_range_uj").write_text("1000")
    counter = folder / "energy_uj"

    class Ticking(nn.Module):
        def forward(self, image):
            counter.write_text(str((int(counter.read_text()) + 60) % 1000))  # as the hardware's, it wraps
            return image

    joules, source = joules_per_image(Ticking(), x, repeats=3, root=tmp_path)
    assert joules == pytest.approx(180e-6 / (3 * len(x)))
    assert "RAPL" in source
    report = sparsity_report(made, x, energy=True)
    assert ("joules per image" in report.summary) == (joules_per_image(made, x)[0] is not None)
    assert any(n.startswith("Energy:") for n in report.notes)


def test_the_report_counts_what_is_there():
    made, x = BlockPrune(block=16, flops=0.5)(predictor("vit_nano"), pictures()), pictures()
    row = sparsity_report(made, x).rows[0]
    layer = made.get_submodule(row["layer"])
    assert row["macs"] == int((layer.kept * 256).sum()) * (
        row["dense macs"] // (layer.in_features * layer.out_features)
    )
    assert row["sparsity"] == 1 - layer.density
    assert "block sparsity" in made.report.table()


@pytest.mark.slow
def test_it_exports(tmp_path):
    from lynceus.rewrite.export import export

    made = BlockPrune(block=16, flops=0.5)(predictor("vit_nano", depth=1), pictures())
    report = export(made, pictures(2), tmp_path, formats=("onnx",))  # compares the file with the model itself
    assert report.rows[0]["difference"] < 1e-5


# mistakes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"flops": 50}, r"flops=0\.5"),
        ({"flops": 0}, "above 0 and at most 1"),
        ({"block": 0}, "sides of at least 1"),
        ({"cost": "joules"}, "no cost 'joules'"),
        ({"ranking": "l1"}, "no ranking 'l1'"),
        ({"spread": "even"}, "no spread 'even'"),
        ({"smooth": 1.0}, "below 1"),
        ({"layers": "("}, "no regular expression"),
        ({"min_keep": 1.5}, "below 1"),
        ({"gradient_batch": 0}, "at least 1 image"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(AdviceError, match=text):
        BlockPrune(**options)


def test_what_cannot_be_pruned_is_named():
    model, x = predictor("vit_nano"), pictures()
    with pytest.raises(AdviceError, match=r"'backbone\.head' is 5 x 96: no block of 16 x 16 fits.*block=\(4, 16\)"):
        BlockPrune(block=16, layers="head", exclude="")(model, x)
    with pytest.raises(AdviceError, match="nothing to prune in Classifier by blocks of 500 x 500"):
        BlockPrune(block=500)(model, x)
    with pytest.raises(AdviceError, match="looks at images"):
        BlockPrune()(model, None)
    with pytest.raises(AdviceError, match="out of reach"):
        BlockPrune(block=8, flops=0.1, layers=r"attn\.proj")(model, x)
    other = BlockPrune(block=16)(model, x).rewrite
    with pytest.raises(AdviceError, match="made for another model"):
        other(predictor("vit_nano", dim=128, heads=4))
    with pytest.raises(AdviceError, match="does not have; its nearest name is"):
        other(lynceus.create_model("vit_nano"))
    with pytest.raises(AdviceError, match="no block-sparse layer"):
        sparsity_report(model, x)
    with pytest.raises(AdviceError, match="different questions"):
        Distil(model, Classify(num_classes=3).build(lynceus.create_model("vit_nano")))


def test_distillation_needs_a_predictor():
    with pytest.raises(AdviceError, match="predictor on pixels"):
        Distil(nn.Linear(2, 2), predictor("vit_nano"))
