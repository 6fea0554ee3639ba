"""The page in a real browser: no network, no errors, no sideways scrolling, keyboard, print, and axe's rules.

``SCREENSHOTS=docs/screenshots pytest tests/reporting/test_page_in_browser.py`` writes what it saw.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import gradloc
from gradloc.reporting.report import Report
from tests.conftest import make_net, train
from tests.reporting.browser import chromium
from tests.reporting.complete import complete_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = (390, 1024, 1920)
SCHEMES = ("light", "dark")
TALL = 4200


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run with everything, of one with a single window and nothing given, and of two runs side by side."""
    folder = tmp_path_factory.mktemp("pages")
    whole = complete_report(folder / "whole")
    shown = Report(replace(whole.data, location="runs/complete"))
    short = gradloc.load_run(folder / "whole" / "run")
    data = gradloc.report(short, show=False, wandb=False).data
    frames = {name: getattr(data, name) for name in ("locality", "modules", "containers", "model_curve")}
    bare = Report(replace(data, **{name: frame[frame["window"] == 0] for name, frame in frames.items()}))
    model, optimizer = make_net(1)
    gradloc.wrap(optimizer, model, run=folder / "other", every=1, flush_every=4, firings=False)
    train(model, optimizer, 20, seed=1)
    gradloc.recorder_of(optimizer).close()
    both = gradloc.report_comparison({"seed 0": short, "seed 1": folder / "other"}, show=False)
    return {
        "whole": shown.save_html(folder / "whole.html"),
        "bare": bare.save_html(folder / "bare.html"),
        "comparison": both.save_html(folder / "comparison.html"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def opened(browser: Browser, path: Path, width: int = 1024, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page from ``file://``, offline, and a list that fills with what went wrong or was asked of the network."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request",
        lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto(path.as_uri())
    return page, trouble


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_shows_everything_without_sideways_scrolling(
    browser: Browser, pages: dict[str, Path], width: int, scheme: str
) -> None:
    page, trouble = opened(browser, pages["whole"], width, scheme)
    assert trouble == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert len(drawn) >= 18
    assert all(w > 100 and h > 50 for w, h in drawn)
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(channels(paper)) < sum(channels(ink))) == (scheme == "dark")
    if os.environ.get("SCREENSHOTS"):
        folder = Path(os.environ["SCREENSHOTS"])
        folder.mkdir(parents=True, exist_ok=True)
        seen = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": TALL})
        Image.open(io.BytesIO(seen)).convert("RGB").quantize(96).save(
            folder / f"page-{width}-{scheme}.png", optimize=True
        )
    page.context.close()


def channels(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


@pytest.mark.parametrize("name", ["whole", "bare", "comparison"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing(browser: Browser, pages: dict[str, Path], scheme: str, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened(browser, pages[name], 1024, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    page.context.close()


def test_module_links_lead_there_and_back(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["whole"])
    tree = page.locator("details.module").filter(has=page.locator("> summary .name", has_text="up")).last
    tree.locator("> summary").press("Enter") if tree.is_visible() else page.locator(
        "summary", has_text="ffn"
    ).first.press("Enter")
    targets = page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
    )
    assert all(page.evaluate("id => document.getElementById(id) !== null", target) for target in set(targets))
    curve = page.locator("[id^=curve-]").last
    link = curve.locator("a").first
    target = str(link.get_attribute("href"))
    link.press("Enter")
    # The browser opens what a fragment lies in.
    page.wait_for_function("id => document.querySelector(id).checkVisibility()", arg=target)
    page.context.close()


def test_the_keyboard_reaches_sections_and_wide_charts(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["whole"], 390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#findings")
    page.evaluate("document.querySelector('.wide').focus()")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.wide').scrollLeft > 0")
    page.context.close()


@pytest.mark.parametrize("width", [390, 1024])
def test_a_comparison_shows_its_charts(browser: Browser, pages: dict[str, Path], width: int) -> None:
    page, trouble = opened(browser, pages["comparison"], width)
    assert trouble == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("figure svg").count() == 2
    if os.environ.get("SCREENSHOTS"):
        seen = page.screenshot(full_page=True)
        Image.open(io.BytesIO(seen)).convert("RGB").quantize(96).save(
            Path(os.environ["SCREENSHOTS"]) / f"comparison-{width}.png", optimize=True
        )
    page.context.close()


def test_print_has_no_navigation_and_fits_the_paper(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["whole"], 700)
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().right))"
    )
    assert widest <= 700
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.context.close()


def test_a_run_of_one_window_says_what_is_missing(browser: Browser, pages: dict[str, Path]) -> None:
    page, trouble = opened(browser, pages["bare"])
    assert trouble == []
    words = page.locator("section[aria-labelledby=missing]").inner_text()
    assert "masks" in words
    assert "a certificate" in words
    assert "nan" not in page.locator("main").inner_text().lower().split()
    page.context.close()
