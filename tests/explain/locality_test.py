"""How far attention looks: against the card's figures, a loop, and what training logs."""

import pytest
import torch

import lynceus
import lynceus.data
from lynceus import FitConfig, fit
from lynceus.backbones.convit import ConViT, ConViTConfig
from lynceus.core.errors import AdviceError
from lynceus.explain.locality import locality
from lynceus.recipes.supervised import Supervised
from lynceus.tasks.classify import Classify

MICRO = ConViTConfig(image_size=(16, 16), patch_size=4, dim=36, depth=3, heads=9, local_layers=2, num_classes=10)


def test_fresh_convit():
    model = ConViT(MICRO).train()
    report = locality(model, torch.rand(2, 3, 16, 24))
    assert [(r["layer"], r["head"]) for r in report.rows] == [
        (f"blocks.{i}.attn", h) for i in range(3) for h in range(9)
    ]
    assert report.summary["gate blocks.0.attn"] == pytest.approx(0.731, abs=1e-3)
    assert (report.rows[0]["dx"], report.rows[0]["dy"], report.rows[0]["span"]) == (-1.0, -1.0, 1.0)
    assert "gate" not in report.rows[-1]
    assert report.summary["distance blocks.0.attn"] < report.summary["distance blocks.2.attn"]
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gates_open_to_position_alone_give_the_known_distances():
    model = ConViT(MICRO)
    for block in model.blocks[:2]:
        torch.nn.init.constant_(block.attn.gating_param, 30.0)
    rows = locality(model, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).rows
    found = {r["head"]: r["distance"] for r in rows if r["layer"] == "blocks.0.attn"}
    assert found[4] == pytest.approx(0.73, abs=0.02)
    assert found[0] == pytest.approx(1.39, abs=0.02)
    assert found[1] == pytest.approx(1.10, abs=0.02)


@pytest.mark.parametrize("name", ["vit_nano", "volo_nano", "convit_nano"])
def test_other_transformers_have_distances_too(name):
    report = locality(lynceus.create_model(name, num_classes=10), torch.rand(2, 3, 32, 32))
    assert report.summary
    assert all(0 < v < 12 for k, v in report.summary.items() if k.startswith("distance"))


def test_networks_without_attention_say_so():
    with pytest.raises(AdviceError, match="ConViT"):
        locality(lynceus.create_model("resnet_nano"), torch.rand(1, 3, 32, 32))


def test_training_logs_gates_and_distances(tmp_path):
    """The evaluation of a run writes them to metrics.csv, once per epoch."""
    data = lynceus.data.open("digits", size=16).take(96)
    some = data.batch(list(range(16))).image
    torch.manual_seed(0)
    recipe = Supervised(Classify(num_classes=10), ConViT(MICRO))
    config = FitConfig(epochs=2, batch_size=32, evaluate_every=1, quiet=True)
    fit(recipe, data, config=config, out=tmp_path / "run", evaluate=lambda subject, _: locality(subject.model, some))
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) >= 3
    assert "gate blocks.1.attn" in lines[0]
    assert "distance blocks.2.attn" in lines[0]
