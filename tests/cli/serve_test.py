"""`lynceus serve` says what is wrong before anything starts; that it serves is tested in tests/serve."""

import os
import signal
import sys
import warnings
from types import SimpleNamespace

import pytest

from lynceus.cli.__main__ import VERBS, main
from lynceus.cli._run import stoppable
from lynceus.core.errors import AdviceWarning


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Name a model to serve"),
        (["resnet_nanno"], "resnet_nano"),
        (["runs/nothing/here"], "no model at"),
        (["resnet_nano", "--pipeline", "chain.yaml"], "second server"),
        (["--pipeline", "nothing.yaml"], "nothing.yaml"),
        (["resnet_nano", "--device", "tpu"], "no device 'tpu'; it has cpu"),
        (["resnet_nano", "--workers", "1", "--broker", "file:/proc/none"], "cannot write into"),
        (["resnet_nano", "--max-batch", "0"], "max_batch is at least 1"),
        (["resnet_nano", "--broker", "kafka"], "broker"),
        (["resnet_nano", "--workers", "1", "--broker", "redis://127.0.0.1:1/0"], "redis-server --appendonly yes"),
    ],
    ids=" ".join,
)
def test_mistakes_are_answered(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.yaml").write_text("steps: [{model: a}, {model: b}]\n")
    assert main(["serve", "--port", "0", *argv]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_warning_is_one_line_of_advice(monkeypatch):
    seen = []

    def verb(argv):
        for category in (AdviceWarning, UserWarning):
            seen.append(warnings.formatwarning("the text", category, "file.py", 7, "code"))
        return 0

    monkeypatch.setitem(sys.modules, "a_verb", SimpleNamespace(main=verb))
    monkeypatch.setitem(VERBS, "serve", ("a_verb", ""))
    before = warnings.formatwarning
    assert main(["serve"]) == 0
    assert seen == ["lynceus serve: the text\n", before("the text", UserWarning, "file.py", 7, "code")]
    assert warnings.formatwarning is before


def test_sigterm_ends_what_measures_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped"), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_chain_takes_one_model(capsys):
    assert main(["profile", "--chain", "resnet_nano", "resnet_micro"]) == 2
    assert "--chain takes one model" in capsys.readouterr().err


def test_misspelt_options_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", "resnet_nano", "--max-bach", "2"])
    assert end.value.code == 2
    assert "--max-batch" in capsys.readouterr().err
