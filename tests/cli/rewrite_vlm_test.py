"""`lynceus rewrite vlm_tokens`: a folder of transformers in, figures, a picture and the options out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.rewrite.vlm_tokens import prune, watch
from lynceus.rewrite.vlm_tokens.measure import measure, picture, pixels_of
from lynceus.rewrite.vlm_tokens.saved import load, open_processor, open_vlm

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=7
    )
    words = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=sight, text_config=words, image_token_id=199)
    made = tmp_path_factory.mktemp("vlm") / "model"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(made)
    return made


def test_the_command_reports_and_saves(folder, tmp_path, capsys):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(photo)
    flags = ["--picture", str(photo), "--repeats", "1", "--layers", "2", "5", "--ratio", "0.6", "--out", str(out)]
    assert main(["rewrite", "vlm_tokens", str(folder), *flags]) == 0
    said = capsys.readouterr().out
    for part in ("prefill time saved", "FLOPs saved by model", "layer 2", "layer 5", "the same in Python"):
        assert part in said
    report = json.loads((out / "report.json").read_text())
    dense, short = report["rows"]
    assert short["MACs"] < 0.7 * dense["MACs"]
    assert report["summary"]["model error"] < 0.03
    assert list(report["figures"]) == ["kept.png"]
    assert load(out).rewrite.layers == (2, 5)


def test_measure_counts_what_the_layers_do(folder):
    model = open_vlm(folder)
    pruned = prune(model)
    ids = torch.cat([torch.tensor([5, 6]), torch.full((144,), 199), torch.randint(3, 190, (9,))])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 84, 84)}
    report = measure(model, pruned, inputs, repeats=1)
    with watch() as seen:
        pruned(**inputs)
    assert report.rows[1]["image tokens"] == pytest.approx((np.mean(seen[0].counts(8)) - 11) / 144)
    assert report.summary["model error"] < 0.03
    assert report.arrays["kept_2"].sum() == int(seen[0].picture(2).sum())
    drawn = picture(None, seen[0], (12, 12))["kept.png"]
    assert drawn.startswith(b"\x89PNG")
    with pytest.raises(AdviceError, match="no grid of 9 x 9"):
        picture(None, seen[0], (9, 9))
    with pytest.raises(AdviceError, match="repeats"):
        measure(model, model, inputs)


def test_pictures_become_pixels():
    image = Image.new("RGB", (6, 4), (255, 0, 51))
    assert pixels_of(image, None).shape == (3, 4, 6)
    assert pixels_of(image, (8, 10))[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_mistakes_are_told_before_long_work(folder, tmp_path, capsys):
    def says(*flags):
        assert main(["rewrite", "vlm_tokens", *map(str, flags)]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "config.json" in says(tmp_path)
    assert "layers=(2, 4)" in says(folder, "--layers", "8", "16")
    assert "ratio=1" in says(folder, "--ratio", "2")
    assert "at least 1" in says(folder, "--batch", "0")
    assert "--picture FILE" in says(folder, "--prompt", "where?")
    assert "no picture" in says(folder, "--picture", tmp_path / "none.png")
    with pytest.raises(AdviceError, match="no processor"):
        open_processor(folder)
