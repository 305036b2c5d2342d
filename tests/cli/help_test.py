"""Help never imports torch, names every option with a text, and every verb is reachable; mistakes end with 2."""

import subprocess
import sys

import pytest

from lynceus.backbones import FAMILIES
from lynceus.cli.__main__ import VERBS, main
from lynceus.cli.check import CHECKS
from lynceus.cli.gauntlet import NANOS
from lynceus.cli.rewrite import OWN, REWRITES
from lynceus.cli.search import SEARCHES

HELP = """
import sys
from lynceus.cli.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = sorted(m for m in ("torch", "numpy", "timm", "accelerate", "sklearn", "plotly") if m in sys.modules)
assert not heavy, f"help imports {heavy}"
sys.exit(code)
"""
WAYS = [["--help"], *([v, "--help"] for v in VERBS)]
WAYS += [["search", s, "--help"] for s in SEARCHES]
WAYS += [["check", c, "--help"] for c in CHECKS] + [["rewrite", r, "--help"] for r in (*REWRITES, *OWN)]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_help_needs_no_torch(way):
    done = subprocess.run([sys.executable, "-c", HELP, *way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["cost", "vit_nanno"], "vit_nano"),
        (["cost", "timm:resnet5"], "resnet50"),
        (["cost", "runs/nothing/here"], "no model at"),
        (["check", "shfit", "vit_nano"], "Did you mean 'shift'"),
        (["models", "zzz"], "no model matching"),
        (["parity"], "at least one record"),
        (["parity", "nothing.json"], "nothing.json"),
        (["inspect", "nothing.pth"], "nothing.pth"),
        (["data", "no/such/folder"], "no/such/folder"),
        (["cost", "vit_nano", "--config", "nothing.yaml"], "nothing.yaml"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_answered(argv, said, capsys):
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_misspelt_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["cost", "vit_nano", "--bach", "2"])
    assert end.value.code == 2
    assert "--batch" in capsys.readouterr().err


def test_yaml_and_flags_are_one_schema(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("batch: 4\nsize: [64, 32]\n")
    with pytest.raises(SystemExit) as end:
        main(["cost", "vit_nano", "--config", str(file), "--batch", "2", "--print-config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "model: vit_nano" in printed
    assert "batch: 2" in printed
    assert "- 64" in printed
    file.write_text("bacth: 4\n")
    assert main(["cost", "vit_nano", "--config", str(file)]) == 2
    assert "batch" in capsys.readouterr().err


def test_every_family_is_a_candidate():
    assert set(NANOS) == {f"{family}_nano" for family in FAMILIES}
