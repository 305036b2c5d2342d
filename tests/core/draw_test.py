"""Figures as bytes, and predictions drawn on their pictures."""

import io
import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from lynceus.core import plots
from lynceus.core.draw import draw_prediction
from lynceus.core.errors import AdviceError
from lynceus.core.types import Prediction

FIGURES = {
    "scatter": plots.scatter(
        [1, 2], [3, float("nan")], labels=["a", "b"], groups=["x", "y"], log_x=True, y_error=[0.1, 0.2]
    ),
    "lines": plots.lines(
        {"a": (range(3), [1, 2, 3]), "b": (torch.arange(3), torch.ones(3))}, bands={"a": ([0, 1, 2], [2, 3, 4])}
    ),
    "bars": plots.bars(["a", "b"], {"x": [1, 2], "y": [3, 4]}, errors={"x": [0.1, 0.2]}, horizontal=False, log=True),
    "heatmap": plots.heatmap(torch.rand(2, 3), x_names=list("abc"), y_names=list("de"), low=0, high=1),
    "confusion": plots.confusion(np.array([[3, 1], [0, 0]]), ["a", "b"], normalise=True),
}


@pytest.mark.parametrize("name", FIGURES)
def test_plotly_accepts_the_figure(name):
    figure = go.Figure(json.loads(FIGURES[name]))  # raises on any property that plotly does not know
    assert len(figure.data) >= 1


def test_nothing_is_nan_in_a_figure():
    json.loads(FIGURES["scatter"], parse_constant=lambda name: pytest.fail(name))
    assert json.loads(FIGURES["scatter"])["data"][1]["y"] == [None]


def test_an_empty_class_has_an_empty_row():
    assert json.loads(FIGURES["confusion"])["data"][0]["z"] == [[0.75, 0.25], [0.0, 0.0]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.scatter([1, 2], [1]),
        lambda: plots.lines({"a": ([1], [1, 2])}),
        lambda: plots.bars(["a"], [1, 2]),
        lambda: plots.heatmap([1, 2]),
        lambda: plots.image_grid([]),
        lambda: plots.image_grid([torch.zeros(4, 4)]),
        lambda: draw_prediction(Prediction(label=1)),
    ],
)
def test_parts_that_do_not_fit_advise(call):
    with pytest.raises(AdviceError):
        call()


def test_a_grid_shows_each_picture_in_its_cell():
    red, blue = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, 4, 4)
    red[0], blue[2] = 255, 1.0
    grid = Image.open(
        io.BytesIO(plots.image_grid([red, blue, red], ["r", "a very long caption " * 5, "r"], columns=2, side=40))
    )
    assert grid.size == (86, 2 * 58 + 6)
    assert grid.getpixel((20, 20)) == (255, 0, 0, 255)
    assert grid.getpixel((66, 20)) == (0, 0, 255, 255)
    assert grid.getpixel((20, 84)) == (255, 0, 0, 255)


def test_a_grey_picture_is_a_picture():
    assert plots.to_picture(torch.full((1, 2, 2), 0.5)).getpixel((0, 0)) == (128, 128, 128)


def test_a_small_classified_picture_is_enlarged_and_named():
    p = Prediction(label=1, name="cat", scores=torch.tensor([0.1, 0.9]), image=torch.ones(3, 8, 8))
    drawn = p.picture()
    assert drawn.size == (224, 224)
    assert drawn.getpixel((200, 200)) == (255, 255, 255)
    assert len(set(drawn.crop((0, 0, 80, 20)).getdata())) > 1, "the name is written in the corner"


def test_boxes_masks_segments_and_depth_change_what_they_cover():
    image = torch.zeros(3, 256, 256)
    boxes = torch.tensor([[100.0, 120.0, 200.0, 220.0]])
    p = Prediction(
        boxes=boxes, classes=torch.tensor([2]), scores=torch.tensor([0.5]), image=image, extra={"classes": list("abc")}
    )
    drawn = draw_prediction(p)
    assert drawn.getpixel((100, 170)) != (0, 0, 0)
    assert drawn.getpixel((150, 170)) == (0, 0, 0)
    mask = torch.zeros(1, 256, 256, dtype=torch.bool)
    mask[0, :128] = True
    drawn = draw_prediction(Prediction(masks=mask, image=image))
    assert drawn.getpixel((5, 5)) != (0, 0, 0)
    assert drawn.getpixel((5, 200)) == (0, 0, 0)
    segments = torch.full((256, 256), 255)
    segments[:, :128] = 3
    drawn = draw_prediction(Prediction(segments=segments, image=image))
    assert drawn.getpixel((5, 5)) != (0, 0, 0)
    assert drawn.getpixel((200, 5)) == (0, 0, 0)
    depth = torch.ones(256, 256)
    depth[0, 0], depth[1, 1] = float("nan"), 2.0
    drawn = draw_prediction(Prediction(depth=depth, image=image))
    assert drawn.getpixel((0, 0)) == (0, 0, 0)
    assert drawn.getpixel((9, 9))[0] > drawn.getpixel((1, 1))[0] > 0


def test_a_box_outside_the_picture_still_draws():
    boxes = torch.tensor([[-50.0, -9.0, 999.0, 999.0], [30.0, 30.0, 10.0, 10.0]])
    drawn = draw_prediction(Prediction(boxes=boxes, classes=torch.tensor([0, 7]), image=torch.zeros(3, 300, 240)))
    assert drawn.size == (240, 300)
