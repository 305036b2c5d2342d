"""The door: every form of a request, models and versions, key, health, metrics, traces, settings, reload, OpenAPI."""

import base64
import json

import numpy as np
import pytest
import requests
from serve_kit import encode, picture

from lynceus.core.errors import AdviceError
from lynceus.core.remote import served
from lynceus.data.decode import read_image
from lynceus.serve import ServeConfig, serve
from lynceus.serve.decode import npy
from lynceus.tasks.classify import resized
from lynceus.train.predict import predict

PNG = encode(picture(50, 40, 3), "PNG")


@pytest.fixture(scope="module")
def server(saved, toys_folder):
    import sys

    sys.path.insert(0, str(toys_folder))
    models = (
        f"digits@1={saved}",
        f"digits@2={saved}",
        "mean=python:serve_toys:mean",
        "bad=python:serve_toys:delicate",
        "odd=python:serve_toys:odd",
    )
    with serve(config=ServeConfig(models=models, port=0, max_images=8, max_body_mb=2.0)) as server:
        yield server
    sys.path.remove(str(toys_folder))


@pytest.fixture(scope="module")
def answer(classifier):
    (found,) = predict(classifier, [read_image_of(PNG)], quiet=True)
    return found


def read_image_of(raw):
    return read_image(raw).permute(1, 2, 0).numpy()


def post(server, path="/predict", **options):
    return requests.post(server.url + path, timeout=20, **options)


def forms():
    text = base64.b64encode(PNG).decode()
    return {
        "raw": {"data": PNG},
        "typed": {"data": PNG, "headers": {"content-type": "image/png"}},
        "curl": {"data": PNG, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        "file": {"files": {"image": ("a.png", PNG, "image/png")}},
        "any file": {"files": {"whatever": ("b.bin", PNG)}},
        "with text": {"files": {"f": ("a.png", PNG)}, "data": {"note": "hello"}},
        "json": {"json": {"image": text}},
        "data url": {"json": {"image": f"data:image/png;base64,{text}"}},
        "chunked": {"data": iter([PNG[:1000], PNG[1000:]])},
        "npy": {"data": npy(resized(read_image(PNG), (32, 32))), "headers": {"content-type": "application/x-npy"}},
    }


@pytest.mark.parametrize("form", list(forms()))
def test_every_form_gives_the_offline_answer(server, answer, form):
    got = post(server, **forms()[form])
    assert got.status_code == 200, got.text
    made = got.json()
    assert made["label"] == answer.label
    assert made["name"] == answer.name
    assert np.allclose(made["scores"], answer.scores.numpy(), atol=1e-5)
    assert got.headers["x-request-id"] == made["id"]


def test_a_batch_answers_each(server, answer):
    text = base64.b64encode(PNG).decode()
    bad = base64.b64encode(PNG[:300]).decode()
    results = post(server, json={"images": [text, bad, text]}).json()["results"]
    assert results[0]["label"] == results[2]["label"] == answer.label
    assert results[1]["status"] == 422
    many = post(server, files=[("a", ("1.png", PNG)), ("b", ("2.png", PNG))]).json()["results"]
    assert [m["label"] for m in many] == [answer.label] * 2
    assert len(post(server, json={"images": [text]}).json()["results"]) == 1


def test_models_and_versions_behind_one_door(server):
    listed = requests.get(server.url + "/models").json()["models"]
    assert [(m["name"], m["version"]) for m in listed] == [
        ("digits", "1"), ("digits", "2"), ("mean", "1"), ("bad", "1"), ("odd", "1")
    ]  # fmt: skip
    assert requests.get(server.url + "/models/digits@1").json()["size"] == [32, 32]
    assert len(post(server, "/models/mean/predict", data=PNG).json()["scores"]) == 2
    for path in ("/models/digits@1/predict", "/models/digits/predict?version=1", "/predict?version=2"):
        assert post(server, path, data=PNG).status_code == 200
    for path in ("/models/none/predict", "/models/digits@9/predict", "/models/..%2f..%2fetc%2fpasswd/predict"):
        assert post(server, path, data=PNG).status_code == 404
    assert requests.get(server.url + "/models/none").status_code == 404


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (400, {"data": b""}),
        (415, {"data": b"hello"}),
        (415, {"data": PNG, "headers": {"content-type": "text/html"}}),
        (422, {"data": PNG[:500]}),
        (413, {"data": bytes(2_100_000)}),
        (400, {"data": b"{", "headers": {"content-type": "application/json"}}),
        (400, {"data": b"[" * 100000, "headers": {"content-type": "application/json"}}),
        (400, {"json": {"picture": "x"}}),
        (400, {"json": {"image": "not base64!"}}),
        (400, {"json": {"image": 3}}),
        (400, {"json": {"images": []}}),
        (413, {"json": {"images": ["aGk="] * 9}}),
        (400, {"data": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}),
        (400, {"data": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}),
        (400, {"files": {"note": (None, "only text")}}),
        (413, {"files": [("a", (f"{i}.png", PNG)) for i in range(9)]}),
    ],
)
def test_what_cannot_be_answered_says_why(server, status, options):
    got = post(server, **options)
    assert got.status_code == status, got.text
    assert got.json()["error"]
    assert got.json()["kind"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("trcae=1", "Did you mean 'trace'"),
        ("trace=yes", "trace is 1 or 0"),
        ("scores=2", "scores is 1 or 0"),
        ("deadline_s=nan", "number of seconds"),
        ("deadline_s=soon", "number of seconds"),
        ("deadline_s=-1", "number of seconds"),
    ],
)
def test_query_options_are_not_passed_over(server, query, said):
    got = post(server, f"/predict?{query}", data=PNG)
    assert got.status_code == 400
    assert said in got.json()["error"]


def test_a_failing_model_is_500_for_that_picture_only(server):
    white = encode(np.full((9, 9, 3), 255, np.uint8), "PNG")
    black = encode(np.zeros((9, 9, 3), np.uint8), "PNG")
    before = requests.get(server.url + "/stats").json()["refused"].get("model_failed", 0)
    assert [post(server, "/models/bad/predict", data=p).status_code for p in (white, black, PNG)] == [500, 500, 200]
    assert requests.get(server.url + "/stats").json()["refused"]["model_failed"] == before + 2
    nan = post(server, "/models/odd/predict", data=PNG)
    assert (nan.status_code, nan.json()["kind"]) == (500, "model_failed")
    assert 'lynceus_refused_total{kind="model_failed"}' in requests.get(server.url + "/metrics").text


def test_traces(server):
    got = post(server, "/predict?trace=1", data=PNG, headers={"x-request-id": "mine-1"}).json()
    assert got["id"] == "mine-1"
    spans = got["trace"]["spans"]
    assert sum(s["ms"] for s in spans) == pytest.approx(got["trace"]["total_ms"], rel=0.02)
    assert spans[0]["name"] == "receive"
    assert spans[-1]["name"] == "serialise"
    assert "trace" in post(server, data=PNG, headers={"x-trace": "1"}).json()
    assert "trace" not in post(server, data=PNG).json()
    chrome = requests.get(server.url + "/trace/mine-1").json()
    assert {"receive", "decode", "infer", "serialise"} <= {e["name"] for e in chrome["traceEvents"]}
    plain = requests.get(server.url + "/trace/mine-1?format=spans").json()
    assert plain["total_ms"] >= got["trace"]["total_ms"]
    assert requests.get(server.url + "/trace/none").status_code == 404
    assert post(server, data=PNG, headers={"x-request-id": "a b\tc"}).json()["id"] != "a b\tc"


def test_health_stats_metrics_page_and_schema(server):
    from prometheus_client.parser import text_string_to_metric_families

    assert requests.get(server.url + "/health").json() == {"status": "ok"}
    assert requests.get(server.url + "/ready").status_code == 200
    stats = requests.get(server.url + "/stats").json()
    assert {"queues", "throughput", "batches", "latency_ms", "settings", "answered"} <= set(stats)
    families = {f.name: f for f in text_string_to_metric_families(requests.get(server.url + "/metrics").text)}
    assert {"lynceus_span_seconds", "lynceus_request_seconds", "lynceus_batch_size", "lynceus_queue_length"} <= set(
        families
    )
    counts = {s.labels["span"]: s.value for s in families["lynceus_span_seconds"].samples if s.name.endswith("_count")}
    assert counts["decode"] > 0
    assert counts["serialise"] > 0
    assert "text/html" in requests.get(server.url + "/").headers["content-type"]
    schema = requests.get(server.url + "/openapi.json").json()
    assert {"/predict", "/models/{name}/predict", "/health", "/ready", "/metrics", "/models"} <= set(schema["paths"])
    assert "image/jpeg" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    post_of = schema["paths"]["/predict"]["post"]
    sent = post_of["requestBody"]["content"]["application/json"]["examples"]
    assert all(post(server, json=example["value"]).status_code == 200 for example in sent.values())
    assert all("example" in str(answer) for answer in post_of["responses"].values())
    for method, path, status, kind in (
        ("GET", "/nothing", 404, "unknown_path"),
        ("GET", "/predict", 405, "wrong_method"),
    ):
        got = requests.request(method, server.url + path)
        assert (got.status_code, got.json()["kind"]) == (status, kind)
        assert "/docs" in got.json()["error"]


def test_hot_settings(server):
    before = requests.get(server.url + "/settings").json()
    got = requests.patch(server.url + "/settings", json={"max_batch": 3, "max_wait_ms": 7.5})
    assert got.json()["max_batch"] == 3
    assert requests.get(server.url + "/stats").json()["settings"]["max_wait_ms"] == 7.5
    for wrong in (
        {"max_bach": 3},
        {"max_batch": "3"},
        {"max_batch": 0},
        {"host": "0.0.0.0"},
        {},
        [],
        {"workers": 999},
        {"workers": 2},
    ):
        refusal = requests.patch(server.url + "/settings", json=wrong)
        assert refusal.status_code == 400, refusal.text
    assert requests.patch(server.url + "/settings", data=b"{").status_code == 400
    requests.patch(server.url + "/settings", json=before)


def test_reload(server):
    assert requests.post(server.url + "/models/digits/reload").json()["version"] == "2"
    assert requests.post(server.url + "/models/none/reload").status_code == 404
    assert post(server, data=PNG).status_code == 200


def test_a_key_is_asked_for(classifier):
    with serve(classifier, config=ServeConfig(port=0, api_key="secret")) as server:
        for headers in ({}, {"x-api-key": "secre"}, {"authorization": "Bearer nothing"}):
            for path in ("/stats", "/metrics", "/models"):
                assert requests.get(server.url + path, headers=headers).status_code == 401
            assert requests.post(server.url + "/predict", data=PNG, headers=headers).status_code == 401
        assert requests.get(server.url + "/health").status_code == 200
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert requests.post(server.url + "/predict", data=PNG, headers=headers).status_code == 200


def test_a_check_can_ask_this_server(server, classifier):
    import torch

    images = torch.rand(3, 3, 32, 32).mul(255).round() / 255
    subject = served(server.url + "/predict?scores=1")
    with torch.no_grad():
        want = classifier(images).log_softmax(-1)
    assert torch.allclose(subject(images), want, atol=1e-4)


def test_serve_takes_options_and_says_what_is_wrong(classifier, toys):
    with serve(classifier, port=0, max_batch=2, max_wait_ms=1.0) as server:
        assert server.engine.config.max_batch == 2
        with pytest.raises(AdviceError, match="take another --port"):
            serve(classifier, port=server.port)
        with pytest.raises(AdviceError, match="take another --port"):  # said before a model is looked for
            serve({"m": "no_such_model"}, port=server.port)
    with pytest.raises(TypeError, match="max_batch"):
        serve(classifier, max_bach=2)
    assert json.dumps(ServeConfig().hot)
