"""`lynceus rewrite streaming`: what it takes, what it writes, and what it says to the rest."""

import json

import pytest
import torch

from lynceus.cli.rewrite import main
from lynceus.core.errors import AdviceError
from lynceus.train.checkpoint import load_model, save_model


def run(*argv):
    return main(["streaming", *map(str, argv)])


def test_a_network_by_name(tmp_path, capsys):
    out = tmp_path / "stream"
    assert run("cost_gcn_nano", "--num-classes", 4, "--repeats", 1, "--export", "--out", out) == 0
    said = capsys.readouterr().out
    assert "first output comes at frame 31" in said
    assert "fresh ones" in said
    summary = json.loads((out / "report.json").read_text())["summary"]
    assert summary["FLOPs, clip / step"] > 20
    assert summary["largest difference, relative"] < 1e-4
    stream = load_model(out)
    state = stream.start((1, 3, 25, 2))
    step = torch.export.load(str(out / "step.pt2")).module()
    held = stream.step_module().inputs(torch.zeros(1, 3, 25, 2), state)[1:]
    for frame in torch.randn(35, 1, 3, 25, 2):
        want, state = stream.step(frame, state)
        y, ready, *held = step(frame, *held)
        assert bool(ready) == (want is not None)
    assert torch.allclose(y, want, atol=1e-5)


def test_a_saved_network_and_weights_for_a_name(tmp_path):
    from safetensors.torch import save_file

    from lynceus.rewrite.streaming.names import create

    net = create("encoder_nano")
    save_model(net, tmp_path / "net")
    assert run(tmp_path / "net", "--repeats", 1, "--out", tmp_path / "a") == 0
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert run("encoder_nano", "--weights", tmp_path / "w.safetensors", "--repeats", 1, "--out", tmp_path / "b") == 0
    for made in ("a", "b"):
        model = load_model(tmp_path / made)
        assert torch.equal(model.model.head.weight, net.head.weight)
    with pytest.raises(AdviceError, match="is a stream already"):
        run(tmp_path / "a", "--out", tmp_path / "c")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resnet_nano"], "one image at a time"),
        (["x3d_q"], "Did you mean"),
        (["x3d_nano", "--frames", "0"], "frames is at least 1"),
        (["x3d_nano", "--frame", "5", "32", "32"], "takes no frames of shape"),
        (["encoder_nano", "--window", "0"], "at least 1"),
        (["x3d_nano", "--batch", "0"], "--batch"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0],
)
def test_mistakes(argv, words, tmp_path):
    with pytest.raises(AdviceError, match=words):
        run(*argv, "--out", tmp_path / "out")
