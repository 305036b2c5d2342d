"""The page of the server in a browser: a picture, its answer, its timeline, live plots; nothing from elsewhere."""

import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from lynceus.core.types import Prediction

CHROMIUM = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


class Bright(nn.Module):
    """Two classes: by how bright the picture is."""

    owns_pixels = True
    classes = ["dark <b>", "bright"]
    image_size = 32

    def forward(self, image):
        light = image.mean((1, 2, 3))
        return torch.stack([0.5 - light, light - 0.5], 1) * 20


def boxes(image):
    """A detector that finds one object in the upper left quarter."""
    return [
        Prediction(boxes=torch.tensor([[1.0, 1, 40, 30]]), classes=torch.tensor([1]), scores=torch.tensor([0.875]))
        for _ in image
    ]


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi", reason='pip install "lynceus[serve]"')
    from lynceus.serve import ServeConfig, serve

    with serve({"bright": Bright(), "boxes": boxes}, config=ServeConfig(port=0, size=64)) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make dev")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page()
    page.asked, page.faults = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(server.url + "/")
    page.wait_for_selector("#model option", state="attached")
    yield page
    page.close()


def jpeg(value=250, size=(90, 60), format="JPEG"):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(out, format)
    return out.getvalue()


def choose(page, body, name="picture.jpg", kind="image/jpeg"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": body})


def test_a_picture_gets_its_answer_and_the_timeline_of_that_request(page, server):
    choose(page, jpeg())
    page.wait_for_selector("#timeline svg")
    assert page.inner_text("#answer .bar >> nth=0").split() == ["bright", "1.000"]
    spans = page.eval_on_selector_all("#timeline rect", "all => all.map(r => r.dataset.span)")
    assert {"receive", "decode", "preprocess", "infer", "postprocess"} <= set(spans)
    shares = [
        float(t.split()[0])
        for t in page.eval_on_selector_all("#timeline td:nth-child(3)", "e => e.map(x => x.textContent)")
    ]
    assert sum(shares) == pytest.approx(100, abs=2)
    # the bars lie end to end from left to right
    bars = page.eval_on_selector_all(
        "#timeline rect", "all => all.map(r => [+r.getAttribute('x'), +r.getAttribute('width')])"
    )
    assert bars[0][0] == 0
    assert all(a[0] + a[1] <= b[0] + 1 for a, b in itertools.pairwise(bars))
    assert bars[-1][0] + bars[-1][1] == pytest.approx(500, abs=2)
    identity = page.get_attribute("#timeline a", "download").removesuffix(".json")
    assert identity in server.door.traces
    assert page.evaluate("document.getElementById('picture').width") == 90
    assert page.faults == []


def test_a_picture_may_be_dropped(page):
    handle = page.evaluate_handle(
        """bytes => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)], "a.png",
        {type: "image/png"})); return t; }""",
        list(jpeg(3, format="PNG")),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": handle})
    page.wait_for_selector("#timeline svg")
    assert page.inner_text("#answer .bar >> nth=0").split() == ["dark", "<b>", "1.000"]  # a name is text, never markup
    assert page.query_selector("#answer b") is None


def test_boxes_are_drawn_on_the_picture(page):
    value = next(
        v for v in page.eval_on_selector_all("#model option", "all => all.map(o => o.value)") if v.startswith("boxes")
    )
    page.select_option("#model", value)
    choose(page, jpeg(0))
    page.wait_for_selector("#timeline svg")
    assert "1 object: 1 0.88" in page.inner_text("#answer")
    pixel = "([x, y]) => [...document.getElementById('picture').getContext('2d').getImageData(x, y, 1, 1).data]"
    on_frame, off_frame = page.evaluate(pixel, [30, 28]), page.evaluate(pixel, [80, 50])
    assert max(on_frame[:3]) > 100
    assert max(off_frame[:3]) < 20


def test_a_refusal_is_told(page):
    choose(page, b"this is no picture", "a.jpg")
    page.wait_for_selector("#answer .bad")
    assert page.inner_text("#answer").startswith("415: ")
    assert page.query_selector("#timeline svg") is None


def test_throughput_and_queues_are_live(page):
    for _ in range(3):
        choose(page, jpeg())
        page.wait_for_selector("#timeline svg")
    before = int(page.inner_text("#numbers tr:nth-child(1) td:nth-child(2)"))
    choose(page, jpeg())
    page.wait_for_function(f"+document.querySelector('#numbers tr td:nth-child(2)').textContent > {before}")
    series = page.eval_on_selector_all(".three polyline", "all => all.map(p => p.dataset.series)")
    assert series[:4] == ["answers/s", "p50", "p95", "p99"]
    assert len(series) >= 5  # the queues
    assert "p50" in page.inner_text("#late")
    assert page.inner_text("#state") == "serving"


def test_it_asks_for_nothing_from_elsewhere(page, server):
    choose(page, jpeg())
    page.wait_for_selector("#timeline svg")
    assert page.asked
    assert all(url.startswith((server.url + "/", "data:")) for url in page.asked)


def test_a_narrow_screen_needs_no_scrolling_sideways(browser, server):
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.goto(server.url + "/")
    page.wait_for_selector("#rateplot svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_a_key_is_asked_for_once(browser):
    pytest.importorskip("fastapi", reason='pip install "lynceus[serve]"')
    from lynceus.serve import ServeConfig, serve

    with serve(Bright(), config=ServeConfig(port=0, api_key="secret")) as running:
        page = browser.new_page()
        page.goto(running.url + "/")
        page.wait_for_selector("#keybox:visible")
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        page.wait_for_function("document.getElementById('state').textContent === 'serving'")
        choose(page, jpeg())
        page.wait_for_selector("#timeline svg")
        page.close()
