"""Robustify tunes a small part and nothing else, its heads begin as the classifier, and its rule is the stated one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import FitConfig, create_model, fit
from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.data import open_dataset
from lynceus.recipes.robustify import Robustify, RobustifyConfig, certainty, robustify, towards
from lynceus.rewrite.three_heads import AddHeads
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model
from lynceus.train.partial import depth_groups, last_blocks, norm_parameters, train_only

SHORT = FitConfig(steps=3, batch_size=16, quiet=True, device="cpu")
NAMES = ["resnet_nano", "vit_nano", "convnext_nano", "lsnet_nano", "spartan_nano", "volo_nano", "timm:resnet18",
         "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_050"]  # fmt: skip


def predictor(name="resnet_nano", seed=0, classes=10):
    torch.manual_seed(seed)
    return Classify(num_classes=classes).build(create_model(name, num_classes=classes)).eval()


def digits(count=64):
    return open_dataset("digits", size=16).subset(range(count))


# what is tuned ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_at_most_a_quarter_of_the_weights_is_tuned_and_heads_are_copies(name):
    big, teacher = predictor(name), predictor("convnext_nano")
    x = torch.rand(2, 3, *big.backbone.input_size)
    before = big(x).detach()
    recipe = Robustify(big, teacher)
    assert 0 < recipe.share <= 0.25
    names = {n for n, p in recipe.model.backbone.named_parameters() if p.requires_grad}
    head = recipe.model.backbone.head_name
    norms = set(norm_parameters(recipe.model.backbone))
    assert {n for n in names if not n.startswith(head)} == set(recipe.blocks) | norms
    assert any(recipe.model.backbone.get_parameter(n).ndim > 1 for n in recipe.blocks)
    logits = recipe.export().heads(recipe.model.vector(x))
    for made in (*logits.values(), recipe.export()(x)):
        assert torch.allclose(made, before, atol=1e-4)


def test_two_of_twelve_equal_blocks_are_the_default():
    net = create_model("vit_nano", depth=12, num_classes=10)
    blocks = {".".join(n.split(".")[:2]) for n in last_blocks(net, 2 / 12) if n.startswith("blocks")}
    assert blocks == {"blocks.10", "blocks.11"}
    assert any("norm" in n for n in last_blocks(net, 2 / 12))  # the norm behind them


def test_groups_of_a_timm_model_begin_with_its_stem():
    groups = depth_groups(create_model("timm:vit_tiny_patch16_224"))
    assert len(groups) == 13
    assert all("blocks" not in n for n in groups[0])
    assert all("blocks" in n for group in groups[1:-1] for n in group)


@pytest.mark.parametrize("norms", [False, True])
def test_only_the_chosen_part_moves(norms):
    big, teacher = predictor(), predictor("convnext_nano", 1)
    kept, taught = copy.deepcopy(big.state_dict()), copy.deepcopy(teacher.state_dict())
    recipe = Robustify(big, teacher, RobustifyConfig(norms=norms))
    before = copy.deepcopy(recipe.model.state_dict())
    fit(recipe, digits(), config=SHORT)
    after = recipe.model.state_dict()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    own = {f"backbone.{n}" for n in recipe.blocks}
    affine = {f"backbone.{n}" for n in norm_parameters(recipe.model.backbone)} if norms else set()
    heads = {n for n in after if "_head." in n or n.startswith("backbone.fc.")}
    trained = {n for n in moved if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert trained == own | affine | heads
    statistics = moved - trained
    assert statistics
    assert all(n.rpartition(".")[0] in {m.rpartition(".")[0] for m in own} for n in statistics)
    assert all(torch.equal(v, kept[n]) for n, v in big.state_dict().items())
    assert all(torch.equal(v, taught[n]) for n, v in teacher.state_dict().items())
    assert not any("teacher" in n for n in recipe.state_dict())


def test_frozen_blocks_stay_in_eval_mode():
    net = create_model("resnet_nano", num_classes=10)
    blocks = last_blocks(net, 2 / 8)
    train_only(net, blocks)
    training = {n for n, m in net.named_modules() if m.training}
    assert {"layer4.1.bn1", "layer4.1.bn2"} & training
    assert not any(n.startswith(("layer1", "layer2", "layer3", "bn1")) for n in training)


# the loss -----------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 4), b=st.integers(1, 6), k=st.integers(2, 8), seed=st.integers(0, 999))
def test_certainty_has_mean_one_and_falls_with_entropy(m, b, k, seed):
    logits = 3 * torch.randn(m, b, k, generator=torch.Generator().manual_seed(seed))
    weight = certainty(logits)
    assert float(weight.mean()) == pytest.approx(1, rel=1e-4)
    entropy = torch.distributions.Categorical(probs=logits.softmax(-1).mean(0)).entropy()
    assert torch.allclose(weight, (-entropy).exp() / (-entropy).exp().mean(), rtol=1e-3)


def test_the_distillation_is_a_weighted_divergence_times_the_square_of_the_temperature():
    student, teacher, weight = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.5, 1.0, 1.5])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    want = 4 * (weight * (p * (p / q).log()).sum(-1)).mean()
    assert torch.allclose(towards(student, teacher, weight, 2.0), want, atol=1e-5)
    assert float(towards(teacher, teacher, weight, 2.0)) == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_sum_of_its_parts():
    recipe = Robustify(predictor(), predictor("convnext_nano", 1), RobustifyConfig(uncertain=False, distil=1.0)).eval()
    data = digits(6)
    batch = recipe.augment(data.batch(range(6)), rng.generator(0))
    out = recipe(batch)
    clean, mixed = batch.pixels(), batch.extra[0]["augmix"]
    assert mixed.shape == (1, 3, 16, 16)
    mixed = torch.stack([e["augmix"][0] for e in batch.extra])
    one, two = (recipe.model.heads(recipe.model.vector(x)) for x in (clean, mixed))
    a, b = recipe.teacher(clean), recipe.teacher(mixed)
    label, even = batch.label, torch.ones(6)
    want = F.cross_entropy(one["clean"], label) + F.cross_entropy(two["robust"], label)
    want = want + (F.cross_entropy(one["combined"], label) + F.cross_entropy(two["combined"], label)) / 2
    want = want + towards(two["robust"], b, even, 2.0)
    want = want + (towards(one["combined"], a, even, 2.0) + towards(two["combined"], b, even, 2.0)) / 2
    assert torch.allclose(out["loss"], want, atol=1e-4)


# the choice between the heads ---------------------------------------------------------------------
def parted(seed=3):
    """Three heads that differ."""
    made = AddHeads(passes=6, dropout=0.3, seed=seed)(predictor(), torch.rand(1, 3, 32, 32))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in ("clean", "robust", "combined"):
            made.head(name).weight.normal_(std=0.5 / float(made.masks.shape[1]) ** 0.5)
    return made


def test_the_head_of_the_smaller_product_answers():
    made = parted()
    vector = torch.randn(40, made.masks.shape[1], generator=torch.Generator().manual_seed(0))
    logits = made.heads(vector)
    both = logits["combined"].softmax(-1)
    products = []
    for name in ("clean", "robust"):
        apart = (both * (both.log() - logits[name].log_softmax(-1))).sum(-1)
        mean = torch.stack([made.head(name)(vector * mask).softmax(-1) for mask in made.masks]).mean(0)
        products.append(apart * torch.distributions.Categorical(probs=mean).entropy())
    used = made.choice(vector, logits)
    assert torch.equal(used, (products[1] < products[0]).long())
    assert 0 < used.sum() < 40
    x = torch.rand(5, 3, 32, 32)
    logits, used = made.heads(made.vector(x)), made.head_used(x)
    want = torch.where(used.bool()[:, None], logits["robust"], logits["clean"])
    assert torch.allclose(made(x), want)


def test_a_picture_has_one_answer_in_any_batch():
    made, x = parted(), torch.rand(8, 3, 32, 32)
    order = torch.tensor([5, 2, 7])
    assert torch.allclose(made(x)[order], made(x[order]), atol=1e-5)
    assert torch.equal(made(x), made(x))
    again = parted()
    assert torch.equal(again.masks, made.masks)
    zeros = float((AddHeads(passes=200, dropout=0.3)(predictor()).masks == 0).float().mean())
    assert zeros == pytest.approx(0.3, abs=0.02)


def test_it_is_a_classifier_for_checks_files_and_export(tmp_path):
    from lynceus.train.checkpoint import save_model

    made, x = parted(), torch.rand(3, 3, 32, 32)
    subject = Subject(made)
    assert torch.allclose(subject(x), made(x))
    assert subject.embed(x).shape == (3, made.backbone.num_features)
    back = load_model(save_model(made, tmp_path / "robust"))
    assert torch.equal(back(x), made(x))
    assert torch.equal(back.head_used(x), made.head_used(x))
    program = torch.export.export(made, (x,))
    assert torch.allclose(program.module()(x), made(x), atol=1e-5)


# the whole ----------------------------------------------------------------------------------------
def test_robustify_from_a_trained_predictor_and_a_teacher(tmp_path):
    big, teacher = predictor(), predictor("convnext_nano", 1)
    names = {"classes": open_dataset("digits").classes}
    big, teacher = (Classify(**names).build(m.backbone) for m in (big, teacher))
    made, report = robustify(big, teacher, digits(80), fitting=SHORT, out=tmp_path / "run")
    assert report.summary["share tuned"] <= 0.25
    assert 0 <= report.summary["accuracy"] <= 1
    x = torch.rand(2, 3, 16, 16)
    assert set(made.head_used(x).tolist()) <= {0, 1}
    assert torch.allclose(load_model(tmp_path / "run")(x), made(x), atol=1e-5)


def test_a_teacher_by_name_is_trained_first(tmp_path):
    big = Classify(classes=open_dataset("digits").classes).build(predictor("vit_nano").backbone)
    made, report = robustify(
        big, "convnext_nano", digits(80), fitting=SHORT, teaching=SHORT, config=RobustifyConfig(norms=False),
        out=tmp_path / "run",
    )  # fmt: skip
    assert "teacher accuracy" in report.summary
    assert made(torch.rand(1, 3, 16, 16)).shape == (1, 10)


def test_mistakes_are_told_before_any_training():
    big = predictor()
    with pytest.raises(AdviceError, match="different classes"):
        Robustify(big, predictor("convnext_nano", classes=3))
    with pytest.raises(AdviceError, match="predictor on pixels"):
        Robustify(big, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)))
    broken = predictor("convnext_nano")
    with torch.no_grad():
        broken.backbone.get_classifier().bias.fill_(float("nan"))
    with pytest.raises(AdviceError, match="not finite"):
        Robustify(big, broken)
    with pytest.raises(AdviceError, match="no single classifier"):
        AddHeads()(predictor("timm:deit_tiny_distilled_patch16_224"), torch.rand(1, 3, 224, 224))
    with pytest.raises(AdviceError, match="forward_features"):
        AddHeads()(torch.nn.Linear(3, 2))
    twice = create_model("resnet_nano", num_classes=10)
    twice.forward = lambda image: 2 * type(twice).forward(twice, image)
    with pytest.raises(AdviceError, match="not one head's"):
        AddHeads()(twice, torch.rand(1, 3, 32, 32))
    with pytest.raises(AdviceError, match="no single classifier"):
        AddHeads()(create_model("resnet_nano", num_classes=0))
    for options in ({"tune": 0}, {"most": 1.5}, {"temperature": 0}, {"passes": 0}, {"dropout": 1.0}):
        with pytest.raises(AdviceError):
            RobustifyConfig(**options)
    with pytest.raises(AdviceError, match="small enough"):
        last_blocks(create_model("resnet_nano"), 0.2, most=0.001)
