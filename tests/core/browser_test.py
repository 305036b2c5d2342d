"""The page of a report in a real browser: it sorts, filters, answers to the pointer, and asks for nothing."""

import shutil

import numpy as np
import pytest

from lynceus.core import plots
from lynceus.core.report import Report

CHROMIUM = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
NAMES = ["resnet_nano", "convnext_nano", "swin_nano", "vit_nano", "other"]
ACCURACY = [0.97, 0.985, float("nan"), 0.955, 0.1]
LATENCY = [10.5, 9.25, 100.0, 1.0, None]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make dev")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    figures = {
        "cost.plotly": plots.scatter([1, 2, 3, 4], [0.97, 0.985, 0.96, 0.955], labels=NAMES[:4], x_title="ms"),
        "curve.plotly": plots.lines(
            {"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, bands={"loss": ([2.9, 1.9, 0.9], [3.1, 2.1, 1.1])}
        ),
        "confusion.plotly": plots.confusion(np.eye(3) * 5, ["a", "b", "c"]),
        "rank.plotly": plots.bars(["<b>x</b>", "y"], {"frozen": [1.0, 2.0], "tuned": [2.0, 1.0]}, title="z"),
        "worst.png": plots.image_grid([np_image(8)] * 3, ["a", "b", "c"]),
    }
    rows = [{"model": n, "accuracy": a, "latency_ms": m} for n, a, m in zip(NAMES, ACCURACY, LATENCY)]
    report = Report(name="probe", rows=rows, summary={"best": 0.985}, figures=figures, notes=["a note"])
    report.environment |= {"command": "lynceus probe", "seed": "0"}
    return report.save(tmp_path_factory.mktemp("report"))


def np_image(side):
    import torch

    return torch.linspace(0, 1, 3 * side * side).reshape(3, side, side)


class Seen:
    def __init__(self, page):
        self.requests, self.errors = [], []
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)


@pytest.fixture(scope="module")
def opened(browser, path):
    """The whole page, loaded once."""
    context = browser.new_context(viewport={"width": 1180, "height": 900}, color_scheme="light")
    page = context.new_page()
    seen = Seen(page)
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    yield page, seen
    context.close()


@pytest.fixture
def table(browser, path):
    """The table alone, fresh for each test."""
    report = Report.load(path.parent)
    report.figures.clear()
    context = browser.new_context()
    page = context.new_page()
    page.set_content(report.html())
    yield page
    context.close()


def column(page, index):
    return page.locator(f"#rows tbody tr:visible td:nth-child({index + 1})").all_text_contents()


def test_nothing_is_asked_for_and_nothing_complains(opened, path):
    page, seen = opened
    page.wait_for_timeout(500)
    assert seen.requests == [path.as_uri()]
    assert seen.errors == []
    assert page.locator(".plot .main-svg").count() >= 4
    assert page.locator("img.picture").evaluate("image => image.naturalWidth") > 0


def test_a_click_sorts_by_number_and_gaps_stay_last(table):
    page = table
    head = page.locator("#rows th").nth(2)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, 0) == ["vit_nano", "convnext_nano", "resnet_nano", "swin_nano", "other"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, 0) == ["swin_nano", "resnet_nano", "convnext_nano", "vit_nano", "other"]
    head.locator("button").click()
    assert column(page, 0) == NAMES
    page.locator("#rows th button").nth(1).click()
    assert column(page, 0)[-1] == "swin_nano", "nan is last"


def test_the_keyboard_sorts_by_name(table):
    page = table
    page.locator("#rows th button").first.focus()
    page.keyboard.press("Enter")
    assert column(page, 0) == sorted(NAMES)
    page.keyboard.press("Space")
    assert column(page, 0) == sorted(NAMES, reverse=True)


def test_filtering(table):
    page = table
    page.fill("#filter", "nano 0.9")
    assert column(page, 0) == ["resnet_nano", "convnext_nano", "vit_nano"]
    assert page.text_content("#count") == "3 of 5 rows"
    page.fill("#filter", "no such text")
    assert column(page, 0) == []
    assert page.is_visible("#empty")
    page.press("#filter", "Escape")
    assert column(page, 0) == NAMES


def test_hovering_a_point_shows_its_label(opened):
    page, seen = opened
    points = page.locator(".plot").first.locator(".points path.point")
    assert points.count() == 4
    for i in (1, 3):
        points.nth(i).scroll_into_view_if_needed()
        box = points.nth(i).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_function(
            "name => document.querySelector('.plot .hoverlayer').textContent.includes(name)", arg=NAMES[i], timeout=5000
        )
    assert seen.errors == []


def test_names_with_markup_stay_text_in_figures(opened):
    page, _ = opened
    ticks = page.locator(".plot").nth(3).locator(".ytick text").all_text_contents()
    assert sorted(tick.strip() for tick in ticks) == ["<b>x</b>", "y"]


def test_dark_and_light(opened):
    page, seen = opened
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.evaluate(background), page.evaluate(ink)
    page.click("#theme")
    page.wait_for_timeout(200)
    dark = page.evaluate(background), page.evaluate(ink)
    assert light[0] == "rgb(255, 255, 255)"
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.emulate_media(color_scheme="dark")
    page.click("#theme")
    assert page.evaluate(background) == light[0]
    assert seen.errors == []


def test_a_phone_sees_no_sideways_scroll(browser, path):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_it_prints(opened):
    page, seen = opened
    assert page.pdf().startswith(b"%PDF")
    assert seen.errors == []


def test_every_section_sorts_and_filters_its_own_table(browser, tmp_path):
    parts = [
        Report(name=f"part {i}", rows=[{"model": n, "value": float(i * j)} for j, n in enumerate(NAMES)])
        for i in (1, 2)
    ]
    parts[1].figures["curve.plotly"] = plots.lines({"l": ([0, 1], [1.0, 2.0])})
    path = Report(name="whole", summary={"n": 1.0}, parts=parts).save(tmp_path)
    page = browser.new_page()
    seen = Seen(page)
    page.goto(path.as_uri())
    page.fill("#filter-2", "swin")
    assert page.text_content("#count-2") == "1 of 5 rows"
    assert page.text_content("#count-1") == "5 rows"
    page.click("#rows-1 th:nth-child(2) button")
    page.click("#rows-1 th:nth-child(2) button")
    assert page.text_content("#rows-1 tbody tr:first-child td") == "other"
    assert page.text_content("#rows-2 tbody tr:first-child td") == NAMES[0]
    assert page.locator("#part-2 .plot .main-svg").count() > 0
    assert page.locator(".contents a").count() == 2
    assert not seen.errors
    assert len(seen.requests) == 1
    page.close()
