"""Ranking metrics against a direct reference; whitening; spatial search against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.gauntlet.features import Extractor
from lynceus.gauntlet.ranking import four_of_four, ranked, ranking_metrics
from lynceus.gauntlet.retrieval import Retrieval, Retriever, RetrieverConfig, fit_whitening, spatial_distances


def direct(relevance, ks, kind, released):
    """The definitions, one query and one rank at a time."""
    rows = []
    for line in relevance:
        clean = [v for v in line if v != -1]
        total = sum(v == 1 for v in clean)
        if total == 0:
            continue
        hits, terms, points = 0, [], []
        for rank, v in enumerate(clean, 1):
            if v == 1:
                before = hits / (rank - 1) if rank > 1 else 1.0
                hits += 1
                terms.append((hits / rank + before) / 2 if kind == "trapezoid" else hits / rank)
                points.append((hits / total, hits / rank))
        ap = sum(terms) / total
        if kind == "eleven":
            ap = sum(max([p for r, p in points if r >= t / 10 - 1e-12], default=0.0) for t in range(11)) / 11
        first = next(i for i, v in enumerate(line if released else clean, 1) if v == 1)
        row = {"mAP": ap, "MRR": 1 / first}
        for k in ks:
            row[f"P@{k}"] = sum(v == 1 for v in clean[:k]) / k
            row[f"R@{k}"] = sum(v == 1 for v in clean[:k]) / total
        rows.append(row)
    return {key: float(np.mean([r[key] for r in rows])) for key in rows[0]} if rows else {}, len(rows)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 25)), elements=st.sampled_from([-1, 0, 0, 1])),
    st.sampled_from(["area", "trapezoid", "eleven"]),
    st.booleans(),
)
def test_metrics_equal_the_direct_reference(relevance, kind, released):
    found, each = ranking_metrics(relevance, ks=(1, 5, 10), kind=kind, released_mrr=released)
    wanted, count = direct(relevance.tolist(), (1, 5, 10), kind, released)
    assert found["queries"] == count
    assert found["queries without positives"] == len(relevance) - count
    for key, value in wanted.items():
        assert abs(found[key] - value) < 1e-12, key
    if not count:
        assert np.isnan(found["mAP"])
        assert np.isnan(each["mAP"]).all()


def test_released_mrr_counts_junk():
    line = np.array([[-1, -1, 1, 0]])
    assert ranking_metrics(line)[0]["MRR"] == 1
    assert ranking_metrics(line, released_mrr=True)[0]["MRR"] == pytest.approx(1 / 3)
    assert ranking_metrics(line)[0]["mAP"] == 1


def test_area_equals_scikit_learn_without_junk():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    distance, positive = rng.random((20, 50)), rng.random((20, 50)) < 0.2
    each = ranking_metrics(ranked(distance, positive))[1]["mAP"]
    assert np.allclose(each, [average_precision_score(p, -d) for d, p in zip(distance, positive)])


def test_bad_relevance_advises():
    with pytest.raises(AdviceError, match="at least one"):
        ranking_metrics(np.zeros((0, 4), int))
    with pytest.raises(AdviceError, match="junk"):
        ranking_metrics(np.full((2, 4), 3))


def test_ukbench_score():
    assert four_of_four(np.array([[1, 1, 1, 1, 0], [1, 0, 0, 1, 1]])) == 3.0


@pytest.mark.parametrize(("n", "c", "dims"), [(200, 64, 500), (30, 64, 500), (300, 20, 10)])
def test_whitened_references_have_identity_covariance(n, c, dims):
    x = np.random.default_rng(0).normal(size=(n, c)) @ np.random.default_rng(1).normal(size=(c, c))
    white = fit_whitening(x, dims)
    y = white(x)
    assert y.shape[1] == min(dims, c, n - 1)
    assert np.abs(np.cov(y.T) - np.eye(y.shape[1])).max() < 1e-6


def test_directions_without_variance_are_cut():
    x = np.random.default_rng(0).normal(size=(100, 3)) @ np.random.default_rng(1).normal(size=(3, 30))
    assert fit_whitening(x).basis.shape[1] == 3
    with pytest.raises(AdviceError, match="equal"):
        fit_whitening(np.ones((5, 4)))


def test_whitening_agrees_with_scikit_learn():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(80, 12)) * np.arange(1, 13)
    mine, peer = fit_whitening(x, 5)(x), PCA(5, whiten=True, svd_solver="full").fit_transform(x)
    assert np.allclose(np.abs(mine), np.abs(peer), atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 200), st.integers(0, 99)
)
def test_spatial_distances_equal_a_plain_loop(q, p, n, r, block, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(q, p, 7)), rng.normal(size=(n, r, 7))
    wanted = [[np.mean([min(np.linalg.norm(x - y) for y in ref) for x in query]) for ref in b] for query in a]
    assert np.allclose(spatial_distances(a, b, block=block), wanted, atol=1e-7)


def small():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 5, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten()
    )
    return Extractor(Subject(net, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), features=lambda x: [net(x)]), quiet=True)


@pytest.mark.parametrize("power", [None, 2.0])
@pytest.mark.parametrize("dims", [0, 8, "auto"])
def test_a_query_never_changes_the_fit(power, dims):
    rng = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 30, 40, generator=rng) for _ in range(12)]
    config = RetrieverConfig(reference_levels=2, query_levels=2, dims=dims, power=power, size=24)
    retriever = Retriever(small(), config, quiet=True).fit(images)
    before = None if retriever.whitening is None else retriever.whitening.basis.copy()
    first = retriever.distances(images[:3])
    retriever.distances([torch.rand(3, 50, 50, generator=rng) for _ in range(4)])
    assert np.array_equal(retriever.distances(images[:3]), first)
    assert before is None or np.array_equal(before, retriever.whitening.basis)
    assert np.array_equal(first.argmin(1), [0, 1, 2])
    assert first.min(1).max() < 1e-6


def test_without_references_the_retriever_advises():
    with pytest.raises(AdviceError, match="fit"):
        Retriever(small()).vector_distances(np.ones((1, 1, 4)))


def test_class_retrieval_leaves_the_query_out():
    from lynceus.gauntlet.baselines import baseline

    report = Retrieval()(baseline("raw pixels"), data.open("digits").take(300))
    assert report.summary["queries"] == 300
    assert 0.5 < report.summary["mAP"] < 1
    assert report.summary["mAP low"] < report.summary["mAP"]
    assert report.summary["P@1"] > 0.9
    digits = data.open("digits").take(120)
    lone = digits.subset(np.r_[np.flatnonzero(digits.labels == 0)[:10], np.flatnonzero(digits.labels == 1)[:1]])
    assert Retrieval()(baseline("raw pixels"), lone).summary["queries without positives"] == 1
