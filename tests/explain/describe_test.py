"""Exemplars, pyramid encoder and captioner: what MILAN needs of a network, in closed form and at other sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.explain.describe.captioner import Captioner, CaptionerConfig
from lynceus.explain.describe.exemplars import enlarged, exemplars
from lynceus.explain.describe.pyramid import PyramidEncoder, masked_mean
from lynceus.explain.describe.quantile import RunningQuantile
from lynceus.reengineer.keys import milan


class Net(nn.Module):
    owns_pixels = True

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((-2, -1)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def pictures():
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [Sample(image=x, id=str(i)) for i, x in enumerate(images)]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 300), units=st.integers(1, 4), share=st.floats(0.01, 0.99), batch=st.integers(1, 64))
def test_a_small_sample_has_its_exact_quantile(n, units, share, batch):
    values = torch.randn(n, units, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    running = RunningQuantile(units, exact=300)
    for part in values.split(batch):
        running.add(part)
    rank = share * n + 0.5  # Hazen: sample i of N stands at (i - 0.5) / N
    low = np.clip(int(np.floor(rank)), 1, n)
    high = np.clip(low + 1, 1, n)
    part = np.clip(rank - low, 0, 1)
    ordered = values.sort(0).values
    expected = ordered[low - 1] * (1 - part) + ordered[high - 1] * part
    torch.testing.assert_close(running.quantile(share), expected)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_long_stream_is_sketched_in_fixed_memory(share):
    values = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(1))
    running = RunningQuantile(3)
    held = []
    for part in values.split(5000):
        running.add(part)
        held.append(sum(v.shape[1] for v in running._levels) + running._held)
    assert running.count == 400_000
    assert max(held) <= 2048 * (1 + np.log2(400_000 / 2048) + 1)
    ranks = (values < running.quantile(share)).double().mean(0)
    assert (ranks - share).abs().max() < 2e-3
    again = RunningQuantile(3)
    for part in values.split(5000):
        again.add(part)
    assert again.quantile(share).equal(running.quantile(share))


def test_exemplars_in_any_batches_are_the_definition(net, pictures):
    images = torch.stack([s.image for s in pictures])
    maps = F.conv2d(images, net.conv.weight, net.conv.bias, 2, 1).detach()  # before the activation in place
    best, ids = maps.amax((-2, -1)).topk(5, dim=0)
    for batch in (7, 128):
        found = exemplars(Subject(net), "conv", pictures, k=5, quantile=0.95, size=40, batch_size=batch)
        assert found.ids.equal(ids.T)
        torch.testing.assert_close(found.activations, best.T)
        flat = maps.permute(1, 0, 2, 3).flatten(1).numpy()
        np.testing.assert_allclose(found.levels, np.quantile(flat, 0.95, axis=1, method="hazen"), atol=1e-6)
        for unit in range(6):
            up = enlarged(maps[found.ids[unit], unit][:, None], 40)
            assert found.masks[unit].equal(up > found.levels[unit])
    some = exemplars(Subject(net), "conv", pictures, k=5, quantile=0.95, size=40, units=[4, 1])
    assert some.units == [4, 1]
    assert some.ids.equal(ids.T[[4, 1]])
    assert len(some.images(pictures, 4)) == 5


def test_after_the_activation_dead_units_are_said_to_be_inactive(net, pictures):
    dead = Net().eval()
    dead.load_state_dict(net.state_dict())
    with torch.no_grad():
        dead.conv.bias[2] = -100.0
    assert exemplars(Subject(dead), "act", pictures, k=3, size=16).inactive == [2]


def test_enlarging_falls_off_beyond_the_outermost_centres():
    ones = torch.ones(1, 1, 4, 4)
    up = enlarged(ones, 28)
    assert up[0, 0, 14, 14] == 1
    assert up[0, 0, 0, 14] == pytest.approx(1 - 3 / 7, abs=1e-6)  # 3/7 of a cell beyond the first centre
    inner = F.interpolate(torch.rand(1, 1, 4, 4), (28, 28), mode="bilinear", align_corners=False)
    assert inner.shape == up.shape


@pytest.mark.parametrize(("name", "layer"), [("vit_nano", "blocks.1"), ("swin_nano", "norm"), ("resnet_nano", "fc")])
def test_tokens_channels_last_and_vectors_are_read(name, layer):
    torch.manual_seed(0)
    model = lynceus.create_model(name, num_classes=5)
    data = [Sample(image=torch.rand(3, 64, 64)) for _ in range(6)]
    found = exemplars(Subject(model), layer, data, k=2, size=32, units=[0, 3])
    assert found.masks.shape == (2, 2, 1, 32, 32)
    assert found.levels.isfinite().all()


def test_a_masked_mean_is_the_mean_over_the_mask():
    maps = torch.rand(3, 5, 8, 8)
    mask = torch.zeros(3, 1, 8, 8)
    mask[1, :, 2:5, 1:4] = 1
    mask[2] = 1
    mean = masked_mean(maps, mask)
    assert mean[0].abs().max() == 0
    torch.testing.assert_close(mean[1], maps[1, :, 2:5, 1:4].mean((-2, -1)))
    torch.testing.assert_close(mean[2], maps[2].mean((-2, -1)))


def test_the_pyramid_is_frozen_and_reads_before_what_works_in_place(net, pictures):
    images = torch.stack([s.image for s in pictures[:4]])
    encoder = PyramidEncoder(net, ["conv", "act"], mean=(0, 0, 0), std=(1, 1, 1)).train()
    assert not net.training
    out = encoder(images)
    assert out.shape == (4, 12)
    assert not any(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(out[:, :6], F.conv2d(images, net.conv.weight, net.conv.bias, 2, 1).mean((-2, -1)))
    assert (out[:, :6] < 0).any()
    assert (out[:, 6:] >= 0).all()
    with pytest.raises(AdviceError, match="conv"):
        PyramidEncoder(net, ["conv2"])


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    return Captioner(CaptionerConfig(vocabulary=11, feature_size=6, embedding=5, hidden=8, length=4)).eval()


def test_forced_decoding_of_the_greedy_words_scores_what_greedy_scored(captioner):
    features = torch.rand(3, 5, 6)
    for weight in (0.0, 0.2, 0.7):
        greedy = captioner.greedy(features, weight=weight)
        forced = captioner.steps(features, greedy.tokens, weight=weight)
        torch.testing.assert_close(greedy.scores, forced.scores)
        assert greedy.tokens.equal(forced.scores.argmax(2))
        torch.testing.assert_close(greedy.attention.sum(2), torch.ones(3, 4))
    torch.testing.assert_close(captioner(features, greedy.tokens).scores.exp().sum(2), torch.ones(3, 4))


def test_the_language_model_counts_up_to_stop_and_with_it(captioner):
    config = captioner.config
    tokens = torch.tensor([[3, config.stop, 5, 7], [3, config.stop, config.pad, config.pad], [3, 1, 2, config.stop]])
    values = captioner.lm.log_probability(tokens)
    assert values[0] == values[1]
    steps = captioner.lm(torch.tensor([[config.start, 3]]))
    torch.testing.assert_close(values[0], steps[0, 0, 3] + steps[0, 1, config.stop])
    features = torch.rand(3, 5, 6)
    whole = captioner.objective(features, tokens, weight=0.5)
    torch.testing.assert_close(whole, captioner(features, tokens).total - 0.5 * values)


def test_the_order_of_regions_does_not_matter(captioner):
    features = torch.rand(2, 5, 6)
    a, b = captioner.greedy(features), captioner.greedy(features.flip(1))
    assert a.tokens.equal(b.tokens)
    torch.testing.assert_close(a.attention, b.attention.flip(2))


def test_records_of_other_networks_are_read():
    state = {"conv1.weight": [4, 3, 5, 5], "conv2.weight": [6, 4, 3, 3], "conv2.bias": [6]}
    text = (
        "conv1 3->4 k5 s1 p2, tanh, maxpool k2, conv2 4->c k3 s1 p0, relu; the recorded layer is conv2 before any relu"
    )
    made = milan.network(text, 6, state)
    assert [n for n, _ in made.named_children()] == ["conv1", "tanh", "maxpool", "conv2", "relu"]
    assert made(torch.rand(2, 3, 16, 16)).shape == (2, 6, 6, 6)
    with pytest.raises(AdviceError, match="fourier"):
        milan.network("fourier 3->4", 4, {})


@pytest.mark.parametrize(
    "call",
    [
        lambda s, d: exemplars(s, "nowhere", d),
        lambda s, d: exemplars(s, "conv", d[:3], k=5),
        lambda s, d: exemplars(s, "conv", d, k=2, quantile=1.0),
        lambda s, d: exemplars(s, "conv", d, k=2, units=[6]),
        lambda s, d: exemplars(Subject(lambda x: x.mean((-2, -1))), "conv", d),
        lambda s, d: exemplars(s, "conv", [*d, Sample(image=torch.rand(3, 8, 8))], k=2),
        lambda s, d: RunningQuantile(2).quantile(0.5),
        lambda s, d: RunningQuantile(2).add(torch.rand(4, 3)),
    ],
)
def test_mistakes_advise(net, pictures, call):
    with pytest.raises(AdviceError):
        call(Subject(net), pictures)
