"""The pipeline without HTTP: offline answers, gapless spans, batches unharmed by a bad member, bounds, hot settings."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from serve_kit import encode, picture

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.data.decode import read_image
from lynceus.serve import Pipeline, ServeConfig
from lynceus.serve.decode import npy
from lynceus.serve.errors import Cancelled, Corrupt, Draining, Expired, ModelFailed, Overloaded, UnknownModel
from lynceus.serve.spans import SPANS
from lynceus.tasks.classify import Classify, resized
from lynceus.train.predict import predict

pytestmark = pytest.mark.usefixtures("no_leaks")


def ask(pipeline, bodies, **options):
    futures = [pipeline.submit(b, **options) for b in bodies]
    return [f.result(30) for f in futures]


def largest(answers, found):
    return max(abs(np.array(a.result["scores"]) - p.scores.numpy()).max() for a, p in zip(answers, found))


@pytest.mark.parametrize("max_batch", [1, 7])
def test_answers_are_those_of_predict(classifier, files, max_batch):
    found = predict(classifier, files, quiet=True)
    assert len({p.label for p in found}) > 1
    with Pipeline(ServeConfig(max_batch=max_batch), classifier) as pipeline:
        answers = ask(pipeline, [f.read_bytes() for f in files])
    assert [a.result["label"] for a in answers] == [p.label for p in found]
    assert [a.result["name"] for a in answers] == [p.name for p in found]
    assert largest(answers, found) < 1e-5


def test_150_photographs_as_offline(imagenet_jpegs):
    torch.manual_seed(0)
    model = Classify(num_classes=10, image_size=64).build(lynceus.create_model("resnet_nano", num_classes=10)).eval()
    found = predict(model, imagenet_jpegs, quiet=True)
    with Pipeline(ServeConfig(max_batch=16), model) as pipeline:
        answers = ask(pipeline, [f.read_bytes() for f in imagenet_jpegs])
    assert len(answers) == 150
    assert largest(answers, found) < 1e-5


def test_a_bare_network_answers_as_its_subject(files):
    model = lynceus.create_model("vit_nano", num_classes=10)
    with Pipeline(ServeConfig(size=48), model) as pipeline:
        answers = ask(pipeline, [f.read_bytes() for f in files[:6]])
    subject = Subject(model, size=48, needs_grad=False)
    for file, answer in zip(files, answers):
        with torch.no_grad():
            want = subject(read_image(file).float()[None] / 255).softmax(-1)[0]
        assert abs(np.array(answer.result["scores"]) - want.numpy()).max() < 1e-5


@pytest.mark.parametrize("placement", ["image", "batch", "device", "client"])
def test_where_pixels_are_prepared_changes_nothing(classifier, files, placement):
    raws = [f.read_bytes() for f in files[:12]]
    images = [read_image(r) for r in raws]
    if placement == "client":
        raws = [npy(resized(i, (32, 32))) for i in images]
    found = predict(classifier, files[:12], quiet=True)
    with Pipeline(ServeConfig(placement=placement), classifier) as pipeline:
        answers = ask(pipeline, raws)
        if placement == "client":
            with pytest.raises(Exception, match="npy only"):
                ask(pipeline, [files[0].read_bytes()])
    assert largest(answers, found) < 1e-5


@pytest.mark.filterwarnings("error:.*does not work here")
def test_every_way_to_run_a_model_serves(classifier, files):
    found = predict(classifier, files[:5], quiet=True)
    with Pipeline(ServeConfig(way="folded", threads=1), classifier) as pipeline:
        assert largest(ask(pipeline, [f.read_bytes() for f in files[:5]]), found) < 1e-4


def test_the_fast_pixels_are_near(classifier, files):
    raws = [encode(picture(300, 400, s), quality=90) for s in range(12)]
    exact, fast = ([], [])
    for kept, config in ((exact, ServeConfig()), (fast, ServeConfig(exact=False))):
        with Pipeline(config, classifier) as pipeline:
            kept += ask(pipeline, raws)
    gap = max(abs(np.array(a.result["scores"]) - np.array(b.result["scores"])).max() for a, b in zip(exact, fast))
    assert 0 < gap < 0.3


def test_spans_follow_each_other_and_sum_to_the_whole(classifier, files):
    with Pipeline(ServeConfig(max_batch=4), classifier) as pipeline:
        before = time.monotonic_ns()
        answers = ask(pipeline, [f.read_bytes() for f in files])
        after = time.monotonic_ns()
    for a in answers:
        spans = a.trace.spans
        assert [n for n, _, _ in spans] == [n for n in SPANS if n in dict.fromkeys(n for n, _, _ in spans)]
        assert spans[0][1] == a.trace.begun >= before
        assert spans[-1][2] <= after
        for (_, start, end), (_, following, _) in itertools.pairwise(spans):
            assert start <= end == following
        assert sum(a.trace.seconds().values()) == pytest.approx(a.trace.total, rel=0.02)
        events = [e for e in a.trace.chrome()["traceEvents"] if e["ph"] == "X"]
        assert sum(e["dur"] for e in events) == pytest.approx(a.trace.total * 1e6, rel=1e-6)


def test_batches_form_and_hold_one_shape_only(toys):
    seen = []

    def spy(image):
        seen.append(tuple(image.shape))
        time.sleep(0.02)
        return toys.mean(image)

    raws = [encode(picture(16, 16, s) if s % 2 else picture(20, 24, s), "PNG") for s in range(24)]
    with Pipeline(ServeConfig(max_batch=5), spy) as pipeline:
        answers = ask(pipeline, raws)
        stats = pipeline.stats()
    assert len(answers) == 24
    calls = seen[1:]  # the first one warmed up
    assert max(s[0] for s in calls) == 5
    assert {s[1:] for s in calls} == {(3, 16, 16), (3, 20, 24)}
    (batches,) = stats["batches"].values()
    assert batches["count"] == len(calls)


def test_a_corrupt_member_does_not_hurt_its_batch(classifier, files):
    raws = [f.read_bytes() for f in files[:8]]
    raws[3] = raws[3][:-200]
    with Pipeline(ServeConfig(max_batch=8, max_wait_ms=50, eager=False), classifier) as pipeline:
        futures = [pipeline.submit(r) for r in raws]
        with pytest.raises(Corrupt):
            futures[3].result(10)
        assert all(futures[i].result(10).result["scores"] for i in range(8) if i != 3)
        assert pipeline.stats()["refused"] == {"corrupt": 1}


def test_a_lone_jpeg_spares_a_thread_and_is_answered_the_same(classifier, files, monkeypatch):
    where = []
    plain = Pipeline._prepared
    monkeypatch.setattr(
        Pipeline, "_prepared", lambda p, job: where.append(threading.current_thread().name) or plain(p, job)
    )
    raws = [encode(picture(60, 80, seed), quality=90) for seed in range(3)]
    with Pipeline(ServeConfig(), classifier) as pipeline:
        lone = [ask(pipeline, [raw])[0] for raw in raws]
        with pytest.raises(Corrupt):
            pipeline.submit(raws[0][:300]).result(30)
        assert set(where) == {"lynceus-infer"}
        names = [n for n, _, _ in lone[0].trace.spans]
        assert names == [n for n in SPANS if n in names]
        assert {"wait_preprocess", "decode", "preprocess", "wait_batch", "infer"} <= set(names)
        crowd = ask(pipeline, raws * 8)
        assert "lynceus-decode" in where
        assert pipeline.count == 0
    for one, other in zip(lone, crowd):
        assert abs(np.array(one.result["scores"]) - np.array(other.result["scores"])).max() < 1e-5


def test_raising_and_nan_fail_that_picture_only(toys):
    plain = np.full((16, 16, 3), 120, np.uint8)
    raws = [encode(plain, "PNG")] * 7
    raws[2] = encode(np.full_like(plain, 255), "PNG")
    raws[5] = encode(np.zeros_like(plain), "PNG")
    with Pipeline(ServeConfig(max_batch=7, max_wait_ms=200, eager=False), {"d": toys.delicate}) as pipeline:
        futures = [pipeline.submit(r) for r in raws]
        for i, future in enumerate(futures):
            if i in (2, 5):
                with pytest.raises(ModelFailed, match="RuntimeError" if i == 2 else "finite"):
                    future.result(10)
            else:
                assert future.result(10).result["label"] == 1
        assert pipeline.stats()["refused"] == {"model_failed": 2}


def test_a_full_pipeline_says_so_and_recovers(toys):
    raw = encode(picture(8, 8), "PNG")
    with Pipeline(ServeConfig(queue=5, max_batch=1), {"slow": toys.slow}) as pipeline:
        futures = [pipeline.submit(raw) for _ in range(5)]
        assert not pipeline.ready
        with pytest.raises(Overloaded) as refusal:
            pipeline.submit(raw)
        assert refusal.value.retry_after >= 1
        assert [f.result(10).result["label"] for f in futures] == [0] * 5
        assert pipeline.ready
        assert pipeline.submit(raw).result(10)


def test_late_and_given_up_requests_leave(toys):
    raw = encode(picture(8, 8), "PNG")
    with Pipeline(ServeConfig(max_batch=1), {"slow": toys.slow}) as pipeline:
        first = pipeline.submit(raw)
        time.sleep(0.03)
        late = pipeline.submit(raw, deadline_s=0.05)
        outcomes = []
        job = pipeline.start(raw, outcomes.append)
        pipeline.cancel(job)
        cancelled = pipeline.submit(raw)
        assert cancelled.cancel()
        with pytest.raises(Expired):
            late.result(10)
        assert first.result(10)
        assert pipeline.drain(10)
        assert isinstance(outcomes[0], Cancelled)
        assert pipeline.count == 0
        assert pipeline.stats()["refused"] == {"expired": 1, "cancelled": 2}


def test_draining_answers_what_is_there(toys):
    raw = encode(picture(8, 8), "PNG")
    pipeline = Pipeline(ServeConfig(max_batch=2), {"slow": toys.slow})
    futures = [pipeline.submit(raw) for _ in range(6)]
    assert not pipeline.drain(0.01)
    with pytest.raises(Draining):
        pipeline.submit(raw)
    pipeline.close()
    assert all(f.done() for f in futures)
    assert [f.result().result["label"] for f in futures] == [0] * 6
    pipeline.close()


def test_hot_settings(toys):
    sizes = []

    def spy(image):
        sizes.append(len(image))
        time.sleep(0.01)
        return toys.mean(image)

    raw = encode(picture(8, 8), "PNG")
    with Pipeline(ServeConfig(max_batch=1), {"spy": spy}) as pipeline:
        ask(pipeline, [raw] * 8)
        assert set(sizes) == {1}
        pipeline.change(max_batch=4, max_wait_ms=100.0, eager=False, preprocess_workers=2)
        del sizes[:]
        ask(pipeline, [raw] * 8)
        assert sizes == [4, 4]
        assert pipeline.config.max_batch == 4
        assert sum(t.name == "lynceus-decode" and t.is_alive() for t in threading.enumerate()) <= 4


def test_reload_takes_new_weights_without_a_pause(classifier, files, tmp_path):
    import copy

    from lynceus.train.checkpoint import save_model

    path = save_model(classifier, tmp_path / "m.safetensors")
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)
    raws = [f.read_bytes() for f in files[:10]]
    with Pipeline(ServeConfig(models=(f"m={path}",))) as pipeline:
        before = ask(pipeline, raws)
        save_model(other, path)
        stop = threading.Event()
        errors = []

        def keep_asking():
            while not stop.is_set():
                try:
                    ask(pipeline, raws[:2])
                except Exception as error:
                    errors.append(error)

        thread = threading.Thread(target=keep_asking)
        thread.start()
        pipeline.reload("m")
        stop.set()
        thread.join()
        after = ask(pipeline, raws)
    assert not errors
    assert largest(before, predict(classifier, files[:10], quiet=True)) < 1e-5
    assert largest(after, predict(other, files[:10], quiet=True)) < 1e-5


def test_models_and_versions(classifier, toys, saved):
    raw = encode(picture(40, 40), "PNG")
    models = (f"a@1={saved}", f"a@2={saved}", "b=python:serve_toys:mean")
    with Pipeline(ServeConfig(models=models)) as pipeline:
        assert [m.label for m in pipeline.registry.all()] == ["a@1", "a@2", "b@1"]
        assert pipeline.registry.find().label == "a@2"
        assert pipeline.registry.find("a@1").label == "a@1"
        assert len(ask(pipeline, [raw], model="b")[0].result["scores"]) == 2
        for name, version in (("c", None), ("a", "3"), ("../a", None), ("a@1@2", None)):
            with pytest.raises(UnknownModel):
                pipeline.submit(raw, model=name, version=version)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (("resnet_nanno",), "resnet_nano"),
        (("no/such/folder",), "no model at"),
        (("python:serve_toys:nothing",), "has no 'nothing'"),
        (("python:no_such_module:f",), "no_such_module"),
        (("a/b=resnet_nano",), "name"),
        ((), "no model to serve"),
    ],
)
def test_mistakes_are_answered_before_anything_starts(models, said, toys):
    with pytest.raises(AdviceError, match=said):
        Pipeline(ServeConfig(models=models))


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "meta:x"])
def test_a_device_that_there_is_not_is_told(device, classifier):
    with pytest.raises(AdviceError, match=f"no device '{device}'; it has cpu"):
        Pipeline(ServeConfig(device=device), classifier)


@pytest.mark.parametrize(
    "wrong",
    [{"max_batch": 0}, {"queue": 0}, {"queue": 8, "max_batch": 9}, {"deadline_s": 0.0}, {"port": 70000},
     {"placement": "gpu"}, {"broker": "kafka"}, {"api_key": ""}, {"size": 0}, {"max_wait_ms": -1.0}],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(AdviceError):
        ServeConfig(**wrong)
