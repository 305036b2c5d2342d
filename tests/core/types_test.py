"""Samples become batches, predictions become JSON and pictures."""

import json

import pytest
import torch

from lynceus.core.errors import AdviceError
from lynceus.core.types import Batch, Prediction, Sample, as_float, collate


def image(h, w, value=7):
    return torch.full((3, h, w), value, dtype=torch.uint8)


def test_equal_sizes_stack_and_ids_stay():
    batch = collate([Sample(image=image(4, 5), label=2, id="a"), Sample(image=image(4, 5), label=None, id="b")])
    assert batch.image.shape == (2, 3, 4, 5)
    assert batch.label.tolist() == [2, -1]
    assert batch.ids == ["a", "b"]
    assert batch.boxes is None
    assert len(batch) == 2


def test_different_sizes_are_padded_right_and_bottom():
    batch = collate([Sample(image=image(4, 5)), Sample(image=image(2, 7))])
    assert batch.image.shape == (2, 3, 4, 7)
    assert batch.sizes == [(4, 5), (2, 7)]
    assert batch.image[0, :, :4, :5].eq(7).all()
    assert batch.image[0, :, :, 5:].eq(0).all()
    assert batch.image[1, :, 2:].eq(0).all()
    assert batch.label is None


def test_multi_hot_and_ragged():
    boxes = torch.tensor([[0.0, 0, 2, 2]])
    batch = collate(
        [
            Sample(image=image(4, 4), label=torch.tensor([0.0, 1, 1]), boxes=boxes),
            Sample(image=image(4, 4), label=torch.tensor([1.0, 0, 0])),
        ]
    )
    assert batch.label.shape == (2, 3)
    assert batch.boxes[0] is boxes
    assert batch.boxes[1] is None
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert moved.boxes[0].equal(boxes)


def test_empty_batch_advises():
    with pytest.raises(AdviceError, match="at least one"):
        collate([])


def test_pixels_are_float_in_unit_range():
    assert as_float(image(2, 2, 255)).max() == 1
    assert collate([Sample(image=image(2, 2, 51))]).pixels()[0, 0, 0, 0].item() == pytest.approx(0.2)
    kept = torch.rand(1, 3, 2, 2)
    assert as_float(kept) is kept


def test_prediction_as_json_and_files(tmp_path):
    p = Prediction(label=1, name="cat", scores=torch.tensor([0.25, 0.75]), id="x.png", image=image(16, 16))
    assert json.loads(p.to_json()) == {"label": 1, "name": "cat", "scores": [0.25, 0.75], "id": "x.png"}
    assert json.loads(p.save(tmp_path / "deep" / "p.json").read_text())["name"] == "cat"
    assert p.save(tmp_path / "p.png").stat().st_size > 0
