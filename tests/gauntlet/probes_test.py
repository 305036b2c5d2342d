"""Probes on vectors with known answers, and on digits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.gauntlet.baselines import baseline
from lynceus.gauntlet.features import Features
from lynceus.gauntlet.probes import KNN, FewShot, LinearProbe, LinearSVM, Logistic, jittered_features, unit
from lynceus.gauntlet.scores import average_precision_of_scores, wilson
from lynceus.gauntlet.views import jittered, patch_boxes

PROBES = (KNN(), LinearSVM(), Logistic(), LinearProbe(), LinearProbe(optimizer="lars", lr=(1.0, 10.0)), FewShot())


def blobs(n=300, classes=3, dims=8, spread=0.3, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, dims))
    labels = np.arange(n) % classes
    vectors = scale * (centres[labels] + spread * rng.normal(size=(n, dims)))
    return Features(vectors=vectors.astype(np.float32), labels=labels)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_separable_classes_are_told_apart(probe):
    report = probe.on(blobs(seed=0), blobs(seed=1))
    assert report.summary["accuracy"] > 0.97
    assert report.rows


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_labels_without_meaning_give_chance(probe):
    train, test = blobs(seed=0), blobs(seed=1)
    mixed = np.random.default_rng(3).permutation(train.labels)
    report = probe.on(Features(vectors=train.vectors, labels=mixed), test)
    assert report.summary["accuracy"] < 0.7


@pytest.mark.parametrize("probe", [Logistic(), LinearProbe(), LinearSVM(), KNN()], ids=lambda p: p.name)
def test_tiny_features_are_read_too(probe):
    assert probe.on(blobs(seed=0, scale=1e-3), blobs(seed=1, scale=1e-3)).summary["accuracy"] > 0.97


def test_knn_votes_are_those_of_the_definition():
    train, test = blobs(60, spread=2.0), blobs(40, spread=2.0, seed=1)
    for weighted in (True, False):
        found, _ = KNN(k=7, weighted=weighted).scores(train.vectors, train.labels, test.vectors, classes=3, seed=0)
        cosine = unit(test.vectors) @ unit(train.vectors).T
        for i, row in enumerate(cosine):
            near = np.argsort(-row)[:7]
            votes = np.zeros(3)
            for j in near:
                votes[train.labels[j]] += np.exp(row[j] / 0.07) if weighted else 1
            assert np.allclose(found[i], votes, rtol=1e-3)


def test_knn_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    train, test = blobs(200, spread=1.5), blobs(100, spread=1.5, seed=1)
    found, _ = KNN(k=5, weighted=False).scores(train.vectors, train.labels, test.vectors, classes=3, seed=0)
    peer = KNeighborsClassifier(5, metric="cosine").fit(train.vectors, train.labels).predict_proba(test.vectors)
    assert np.allclose(found / 5, peer)


def test_linear_probe_reaches_the_optimum_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    train, test = blobs(200, spread=1.5), blobs(100, spread=1.5, seed=1)
    l2 = 1e-2
    found, _ = LinearProbe(l2=(l2,)).scores(train.vectors, train.labels, test.vectors, classes=3, seed=0)
    mean, sd = train.vectors.mean(0), np.sqrt(train.vectors.var(0) + 1e-6)
    peer = LogisticRegression(C=1 / (l2 * 200), max_iter=2000, tol=1e-8).fit((train.vectors - mean) / sd, train.labels)
    a = torch.softmax(torch.from_numpy(found), 1).numpy()
    assert np.allclose(a, peer.predict_proba((test.vectors - mean) / sd), atol=2e-3)


def test_power_transform_keeps_signs_and_unit_length():
    x = np.random.default_rng(0).normal(size=(5, 9))
    y = unit(x, 0.5)
    assert np.allclose(np.linalg.norm(y, axis=1), 1)
    assert np.array_equal(np.sign(x), np.sign(y))
    z = unit(x)
    assert np.allclose(y / y[:, :1], np.sign(z) * np.sqrt(np.abs(z)) / (np.sign(z) * np.sqrt(np.abs(z)))[:, :1])


def test_summed_responses_of_equal_views_change_nothing():
    train, test = blobs(90, spread=1.0), blobs(60, spread=1.0, seed=1)
    probe = LinearSVM(cs=(1.0,), loss="squared_hinge")
    alone, _ = probe.scores(train.vectors, train.labels, test.vectors, classes=3, seed=0)
    views, _ = probe.scores(
        train.vectors, train.labels, np.repeat(test.vectors[:, None], 4, 1)[:, :, :], classes=3, seed=0
    )
    assert np.allclose(views, 4 * alone, atol=1e-6)


def test_multi_label_scores_are_average_precisions():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 10)).astype(np.float32)
    labels = (vectors @ rng.normal(size=(10, 4)) > 0.5).astype(np.float32)
    report = LinearSVM().on(
        Features(vectors=vectors[:250], labels=labels[:250]), Features(vectors=vectors[250:], labels=labels[250:])
    )
    assert report.summary["mAP"] > 0.9
    scores = rng.normal(size=(150, 4))
    mine = average_precision_of_scores(scores, labels[250:])
    assert np.allclose(mine, [average_precision_score(labels[250:, k], scores[:, k]) for k in range(4)])
    eleven = average_precision_of_scores(np.array([[3.0], [2.0], [1.0]]), np.array([[1], [0], [1]]), "eleven")
    assert np.isclose(eleven[0], (6 * 1 + 5 * 2 / 3) / 11)


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 40), st.integers(6, 40))
def test_the_sixteen_views(h, w):
    x = torch.rand(2, 3, h, w)
    v = jittered(x)
    assert v.shape == (2, 16, 3, h, w)
    assert torch.equal(v[:, 0], x)
    assert torch.equal(v[:, 8:], v[:, :8].flip(-1))
    assert v.min() >= -1e-6
    assert v.max() <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 5))
def test_sub_patches_cover_the_picture_and_stay_inside(h, w, levels):
    boxes = patch_boxes(h, w, levels)
    assert len(boxes) == sum(i * i for i in range(1, levels + 1))
    start = 0
    for level in range(1, levels + 1):
        covered = np.zeros((h, w), bool)
        for t, l, b, r in boxes[start : start + level * level]:
            assert 0 <= t < b <= h
            assert 0 <= l < r <= w
            covered[t:b, l:r] = True
        start += level * level
        if min(h, w) >= level:
            assert covered.all()


def test_rotated_views_turn_the_picture():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 26] = 1.0  # right of the centre
    turned = jittered(x)[0, 6]
    row, column = divmod(int(turned[0].argmax()), 33)
    assert abs(abs(row - 16) - 10 * np.sin(np.radians(15))) < 1
    assert abs(column - 16 - 10 * np.cos(np.radians(15))) < 1


def test_jittered_features_start_with_the_picture_itself():
    digits, subject = data.open("digits").take(20), baseline("raw pixels")
    from lynceus.gauntlet.features import Extractor

    extractor = Extractor(subject, quiet=True)
    views = jittered_features(extractor, digits)
    assert views.vectors.shape[:2] == (20, 16)
    assert np.allclose(views.vectors[:, 0], extractor.of(digits).vectors, atol=1e-6)


@pytest.mark.parametrize(
    "probe", [KNN(k=3), LinearSVM(cs=(1.0,)), FewShot(episodes=3, shots=(1,))], ids=lambda p: p.name
)
def test_on_digits_pixels_are_read_as_expected(probe):
    report = probe(baseline("raw pixels"), data.open("digits").take(500))
    assert report.summary["accuracy"] > (0.4 if probe.name == "few-shot" else 0.85)
    assert Report.from_json(report.json()).summary == report.summary


def test_augmented_svm_and_views_of_the_linear_probe_run_on_pictures():
    digits = data.open("digits").take(120)
    report = LinearSVM(augment=True, cs=(1.0,))(baseline("HOG"), digits)
    assert {"accuracy", "accuracy without views"} <= report.summary.keys()
    report = LinearProbe(views=2, l2=(1e-3,))(baseline("HOG"), digits)
    assert report.summary["accuracy"] > 0.3


def test_more_shots_help():
    report = FewShot(shots=(1, 10), episodes=10).on(blobs(spread=1.5), blobs(spread=1.5, seed=1))
    assert report.rows[1]["accuracy"] > report.rows[0]["accuracy"]
    assert report.rows[0]["low"] < report.rows[0]["accuracy"] < report.rows[0]["high"]
    assert FewShot(shots=(1, 10_000), episodes=1).on(blobs(), blobs()).notes


def test_unlabelled_and_single_class_data_advise():
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    images = data.open((np.random.default_rng(0).random((9, 8, 8, 3)) * 255).astype(np.uint8))
    with pytest.raises(AdviceError, match="no labels"):
        KNN()(baseline("HOG"), images)
    same = data.open((np.random.default_rng(0).random((9, 8, 8, 3)) * 255).astype(np.uint8), labels=np.zeros(9, int))
    with pytest.raises(AdviceError, match="single class"):
        KNN()(baseline("HOG"), same)
    multi = Features(vectors=vectors, labels=np.ones((9, 2), np.float32))
    with pytest.raises(AdviceError, match="multi-hot"):
        Logistic().on(multi, multi)
    with pytest.raises(AdviceError, match="plain function"):
        KNN()(Subject(lambda x: x.mean((2, 3))), same)


def test_wilson_interval():
    low, high = wilson(50, 100)
    assert np.allclose([low, high], [0.4038, 0.5962], atol=1e-3)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
