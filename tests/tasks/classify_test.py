"""Classification: losses against closed forms, decoding, metrics, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import create_model
from lynceus.core.errors import AdviceError
from lynceus.core.types import Batch
from lynceus.tasks.classify import Classify, resized, summarise


def batch(label, size=8):
    n = len(label)
    return Batch(image=torch.zeros(n, 3, size, size), sizes=[(size, size)] * n, label=label)


TASK = Classify(num_classes=4)


@given(seed=st.integers(0, 1000), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=25, deadline=None)
def test_soft_labels_that_are_hard_give_the_same_loss(seed, smoothing):
    g = torch.Generator().manual_seed(seed)
    raw, label = torch.randn(6, 4, generator=g), torch.randint(0, 4, (6,), generator=g)
    task = Classify(num_classes=4, label_smoothing=smoothing)
    hard, soft = task.loss(raw, batch(label)), task.loss(raw, batch(F.one_hot(label, 4).float()))
    torch.testing.assert_close(hard["loss"], soft["loss"])
    torch.testing.assert_close(hard["accuracy"], soft["accuracy"])


def test_the_loss_is_that_of_the_formula():
    raw, label = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    task = Classify(num_classes=4, label_smoothing=0.2)
    logs = raw.log_softmax(-1)
    target = F.one_hot(label, 4) * 0.8 + 0.05
    assert float(task.loss(raw, batch(label))["loss"]) == pytest.approx(
        float(-(target * logs).sum(-1).mean()), rel=1e-5
    )


def test_images_without_a_label_are_left_out_of_the_loss():
    raw = torch.randn(4, 4)
    some = TASK.loss(raw, batch(torch.tensor([0, -1, 2, -1])))
    known = TASK.loss(raw[[0, 2]], batch(torch.tensor([0, 2])))
    torch.testing.assert_close(some["loss"], known["loss"])
    torch.testing.assert_close(some["accuracy"], known["accuracy"])


def test_several_labels():
    task = Classify(num_classes=3, multi_label=True)
    raw, label = torch.tensor([[3.0, -3.0, 3.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    out = task.loss(raw, batch(label))
    assert float(out["loss"]) == pytest.approx(float(torch.log1p(torch.exp(torch.tensor(-3.0)))), rel=1e-5)
    assert float(out["accuracy"]) == 1
    assert task.decode(raw)[0].scores.tolist() == pytest.approx(torch.sigmoid(raw)[0].tolist())
    with pytest.raises(AdviceError, match="multi-hot"):
        task.loss(raw, batch(torch.tensor([1])))


def test_decode_gives_names_and_probabilities():
    task = Classify(classes=["ant", "bee", "cow"])
    first, second = task.decode(torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]), [(8, 8)] * 2)
    assert (first.name, first.label, second.name) == ("bee", 1, "ant")
    assert float(first.scores.sum()) == pytest.approx(1)


def test_metric_equals_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.normal(size=(300, 8))).float()
    labels = torch.from_numpy(rng.integers(0, 8, 300))
    task = Classify(num_classes=8)
    metric = task.metric()
    for at in range(0, 300, 70):
        part = batch(labels[at : at + 70])
        metric.update(task.decode(raw[at : at + 70], part.sizes), part)
    numbers = metric.compute()
    scores = raw.softmax(-1).numpy()
    assert numbers["accuracy"] == pytest.approx((scores.argmax(1) == labels.numpy()).mean())
    assert numbers["macro_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert numbers["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert numbers["nll"] == pytest.approx(log_loss(labels, scores), rel=1e-4)
    assert (metric.confusion == confusion_matrix(labels, scores.argmax(1))).all()
    assert metric.rows[0]["images"] == int((labels == 0).sum())
    sure = scores.max(1)
    bins = np.clip((sure * 15).astype(int), 0, 14)
    right = scores.argmax(1) == labels.numpy()
    ece = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - sure[bins == b].mean())
        for b in range(15)
        if (bins == b).any()
    )
    assert numbers["ece"] == pytest.approx(ece, abs=1e-5)


def test_perfect_predictions_score_one():
    labels = torch.arange(4).repeat(3)
    numbers, rows, matrix = summarise(F.one_hot(labels, 4).float(), labels, list("abcd"))
    assert numbers["accuracy"] == numbers["macro_accuracy"] == 1
    assert numbers["ece"] == pytest.approx(0, abs=1e-6)
    assert (matrix == np.eye(4) * 3).all()
    assert all(r["accuracy"] == 1 and r["precision"] == 1 for r in rows)


def test_multi_hot_metric():
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0]])
    numbers, rows, _ = summarise(labels * 0.8 + 0.1, labels, list("abc"))
    assert numbers == {"mAP": 1.0, "F1": 1.0, "exact": 1.0}
    assert [r["images"] for r in rows] == [2, 2, 1]


def test_build_owns_pixels_and_changes_the_head():
    backbone = create_model("resnet_nano", num_classes=1000)
    model = TASK.build(backbone).eval()
    assert model.owns_pixels
    assert model.classes == ["0", "1", "2", "3"]
    bytes_ = torch.randint(0, 256, (2, 3, 33, 20), dtype=torch.uint8)
    with torch.no_grad():
        out = model(bytes_)
        assert out.shape == (2, 4)
        torch.testing.assert_close(out, model(bytes_.float() / 255))
        torch.testing.assert_close(out, backbone(model.normalise(bytes_.float() / 255)))
        grey = torch.rand(1, 1, 16, 16)
        torch.testing.assert_close(model(grey), model(grey.expand(-1, 3, -1, -1)))


def test_a_head_that_fits_is_kept():
    backbone = create_model("resnet_nano", num_classes=4)
    head = backbone.get_classifier()
    assert TASK.build(backbone).backbone.get_classifier() is head


def test_size_policies():
    image = torch.zeros(3, 20, 40)
    image[:, :, 8:32] = 1
    cut = resized(image, (10, 10), "crop")
    assert cut.shape == (3, 10, 10)
    assert float(cut.mean()) == pytest.approx(1, abs=1e-3)
    assert float(resized(image, (10, 10), "squash").mean()) == pytest.approx(0.6, abs=1e-3)
    same = torch.randint(0, 256, (3, 10, 10), dtype=torch.uint8)
    assert torch.equal(resized(same, (10, 10)), same / 255)


@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.tuples(st.integers(1, 30), st.integers(1, 30)))
@settings(max_examples=60, deadline=None)
def test_any_size_becomes_the_size(h, w, size):
    for policy in ("crop", "squash"):
        out = resized(torch.rand(2, 3, h, w), size, policy)
        assert out.shape == (2, 3, *size)
        assert float(out.min()) >= -1e-6
        assert float(out.max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "classes"),
        ({"classes": ["a"]}, "at least two"),
        ({"classes": "ab"}, "list of names"),
        ({"classes": ["a", "a"]}, "both called 'a'"),
        ({"classes": ["a", "b"], "num_classes": 3}, "give one"),
        ({"num_classes": 3, "label_smoothing": 1.0}, "share"),
    ],
)
def test_what_is_no_task(options, text):
    with pytest.raises(AdviceError, match=text):
        Classify(**options)


def test_outputs_of_another_number_are_refused():
    with pytest.raises(AdviceError, match="5 outputs for 4 classes"):
        TASK.loss(torch.zeros(2, 5), batch(torch.tensor([0, 1])))
    with pytest.raises(AdviceError, match="no labels"):
        TASK.loss(torch.zeros(2, 4), Batch(image=torch.zeros(2, 3, 8, 8), sizes=[(8, 8)] * 2))
