"""Extraction: any layer, any batch size, each image once, on disk and in memory."""

import time

import numpy as np
import pytest
import torch

import lynceus
from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.identity import model_key
from lynceus.core.subject import Subject
from lynceus.gauntlet.features import Extractor, FeatureBank, FeatureCache, split, stratified

FAMILIES = ("resnet_nano", "vit_nano", "convnext_nano", "swin_nano")


@pytest.fixture(scope="module")
def digits():
    return data.open("digits").take(200)


def model(name, seed=0):
    torch.manual_seed(seed)
    return lynceus.create_model(name, num_classes=4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("inner", [False, True])
def test_the_batch_size_does_not_matter(name, inner, digits):
    net = model(name)
    images = digits.images[:20].repeat_interleave(4, 2).repeat_interleave(4, 3)
    layer = net.stages[1].name if inner else None
    one, many = (Extractor(net, layer, batch_size=b, quiet=True)(images) for b in (1, 64))
    assert one.shape[0] == 20
    assert one.shape[1] == (net.stages[1].channels if inner else net.num_features)
    assert torch.allclose(one, many, atol=1e-5, rtol=1e-5)
    assert one.std(0).max() > 0


def test_pooled_is_what_the_classifier_reads(digits):
    net = model("resnet_nano")
    subject = Subject(net)
    found = Extractor(subject, quiet=True)(digits.images[:5])
    assert torch.allclose(net.get_classifier()(found), subject(digits.images[:5] / 255), atol=1e-5)


def test_every_inner_layer_of_a_plain_network_answers():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 5))
    images = torch.rand(4, 3, 8, 8)
    subject = Subject(net, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    before, after = (Extractor(subject, layer, pool="flat", channels="first")(images) for layer in ("0", "1"))
    with pytest.raises(AdviceError, match="channels='first'"):  # six channels on a map of 6 x 6
        Extractor(subject, "1")(images)
    assert torch.allclose(before.relu(), after, atol=1e-6)
    assert torch.allclose(
        Extractor(subject, "0", pool=2)(images)[:, 0], net[0](images)[:, 0, :3, :3].mean((1, 2)), atol=1e-5
    )
    assert torch.allclose(Extractor(subject, "3")(images), net(images), atol=1e-5)
    with pytest.raises(AdviceError, match="Did you mean"):
        Extractor(lynceus.create_model("resnet_nano"), "layers.O")


def test_a_second_pass_computes_nothing(digits, tmp_path):
    calls = []
    net = model("resnet_nano")
    net.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    forward = net.forward_features
    net.forward_features = lambda x: (calls.append(len(x)), forward(x))[1]
    first = Extractor(net, cache=tmp_path, quiet=True)
    once = first.of(digits)
    assert sum(calls) == len(digits) == first.cache.misses
    calls.clear()
    again = Extractor(net, cache=tmp_path, quiet=True)  # another process would find the same folder
    assert np.array_equal(again.of(digits).vectors, once.vectors)
    assert calls == []
    assert again.cache.misses == 0
    assert again.cache.hits == len(digits)
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_shard_is_only_a_miss(digits, tmp_path):
    net = model("resnet_nano")
    once = Extractor(net, cache=tmp_path, quiet=True).of(digits)
    shards = sorted(tmp_path.rglob("*.safetensors"))
    shards[0].write_bytes(b"damaged")
    again = Extractor(net, cache=tmp_path, quiet=True)
    assert np.allclose(again.of(digits).vectors, once.vectors, atol=1e-6)
    assert 0 < again.cache.misses < len(digits)


def test_the_key_sees_weights_and_buffers_and_size():
    same = model_key(Subject(model("resnet_nano", 0)))
    assert same == model_key(Subject(model("resnet_nano", 0)))
    assert same != model_key(Subject(model("resnet_nano", 1)))
    assert same != model_key(Subject(model("resnet_nano", 0), size=64))
    assert same != model_key(Subject(model("resnet_nano", 0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    net = model("resnet_nano", 0)
    next(b for n, b in net.named_buffers() if "mean" in n).add_(1)
    assert same != model_key(Subject(net))


def test_a_changed_model_is_not_served_from_the_cache(digits):
    bank, net = FeatureBank(quiet=True), model("resnet_nano")
    before = bank.get(Subject(net), digits)
    assert bank.get(Subject(net), digits) is before
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    assert not np.allclose(bank.get(Subject(net), digits).vectors, before.vectors)


def test_training_mode_is_left_as_it_was(digits):
    net = model("resnet_nano")
    subject = Subject(net)
    still = Extractor(subject, quiet=True)(digits.images[:8])
    net.train()
    assert torch.allclose(Extractor(subject, quiet=True)(digits.images[:8]), still, atol=1e-6)
    assert net.training
    assert all(m.training for m in net.modules())


def test_pictures_of_many_sizes_are_not_padded():
    net = model("resnet_nano")
    images = [torch.rand(3, h, w) for h, w in ((32, 32), (40, 32), (32, 32), (33, 47))]
    together = Extractor(net)(images)
    alone = torch.cat([Extractor(net)(x[None]) for x in images])
    assert torch.allclose(together, alone, atol=1e-5)


def test_functions_have_features_but_no_layers(digits):
    subject = Subject(lambda x: x.mean((2, 3)), features=lambda x: [x.mean((2, 3))], name="means")
    cache = FeatureCache()
    assert Extractor(subject, cache=cache, quiet=True).of(digits).vectors.shape == (200, 3)
    with pytest.raises(AdviceError, match="plain function"):
        Extractor(subject, "layer")


@pytest.mark.parametrize("bad", [[], None])
def test_empty_data_advises(bad):
    with pytest.raises(AdviceError, match="empty"):
        split(bad, Subject(model("resnet_nano")), None, test_fraction=0.3, seed=0)


def test_a_split_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [50, 20, 2])
    rest, taken = stratified(labels, 0.3, seed=1)
    assert sorted([*rest, *taken]) == list(range(72))
    assert list(np.bincount(labels[taken])) == [15, 6, 1]
    assert np.array_equal(taken, stratified(labels, 0.3, seed=1)[1])
    assert not np.array_equal(taken, stratified(labels, 0.3, seed=2)[1])


@pytest.mark.slow
def test_the_second_pass_is_many_times_faster():
    """The speed itself is measured by bench.off_the_shelf; here it may only not be slower."""
    digits, net = data.open("digits"), model("resnet_nano")
    extractor = Extractor(net, quiet=True)
    start = time.perf_counter()
    extractor.of(digits)
    first = time.perf_counter() - start
    extractor.of(digits)
    assert time.perf_counter() - start - first < first
