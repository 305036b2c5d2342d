"""engine="ray": the answers of the local engine through Ray Serve; clear advice where Ray Serve is not whole."""

import builtins
import types

import pytest

pytest.importorskip("fastapi", reason='pip install "lynceus[serve]"')

from lynceus.core.errors import AdviceError, MissingError
from lynceus.serve import ServeConfig, mixes, serve
from lynceus.serve.client import Client, ServeError


def ray_serve():
    """Why Ray Serve cannot be run here; "" when it can."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        return f'Ray Serve is not whole: {str(error).splitlines()[0]}; pip install "ray[serve]"'
    return ""


@pytest.mark.slow
def test_ray_serve_answers_as_the_local_engine_does(tmp_path):
    if why := ray_serve():
        pytest.skip(why)
    from lynceus import create_model
    from lynceus.core.rng import borrowed
    from lynceus.train.checkpoint import save_model

    with borrowed(0, "weights"):
        path = save_model(create_model("resnet_nano"), tmp_path / "net.safetensors")
    bodies = [mixes.photo("small", seed=i) for i in range(4)]
    config = ServeConfig(models=(f"net={path}",), port=0, threads=1)
    with serve(config=config) as server, Client(server.url) as client:
        local = [client.predict(b, scores=True) for b in bodies]
    with serve(config=config, engine="ray", workers=2) as server, Client(server.url) as client:
        assert server.alive
        far = [client.predict(b, scores=True, trace=True) for b in bodies]
        assert client.ready()
        assert [m["name"] for m in client.models()] == ["net"]
        assert len(client.predict_many(bodies)) == 4
        with pytest.raises(ServeError) as said:
            client.predict(b"no picture")
        assert said.value.status == 415
    for one, other in zip(local, far):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)
        assert {"decode", "infer", "serialise"} <= {s["name"] for s in other["trace"]["spans"]}


@pytest.mark.parametrize(
    ("missing", "kind", "said"),
    [("ray", MissingError, r"lynceus\[cluster\]"), ("grpc", AdviceError, r"ray\[serve\]")],
)
def test_missing_parts_are_advised(monkeypatch, missing, kind, said):
    real = builtins.__import__

    def without(name, scope=None, local=None, names=(), level=0):
        if name == "ray" and (missing == "ray" or names):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return types.ModuleType("ray") if name == "ray" else real(name, scope, local, names, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(kind, match=said):
        serve("resnet_nano", config=ServeConfig(port=0, engine="ray"))


def test_an_engine_that_there_is_not():
    with pytest.raises(AdviceError, match="Did you mean 'ray'"):
        ServeConfig(engine="rya")
