"""What people see: the page, the card, the terminal and W&B, from a run with hostile names."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradloc
from gradloc.reporting.html import render_html

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Counts what a page must not have, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("src", "href", "xlink:href") and not str(value).startswith(("#", "data:")):
                self.fetched.append(str(value))
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_harmless_and_deterministic(hostile: gradloc.Run, tmp_path: Path) -> None:
    masks = gradloc.find_masks(hostile, density=0.5)
    report = gradloc.report(hostile, masks=masks, show=False, wandb=False)
    page = report.save_html(tmp_path / "page.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.scripts == 0
    assert checker.fetched == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert checker.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(checker.headings, checker.headings[1:], strict=False))
    assert "alert(1)" in page
    assert "<script" not in page
    assert render_html(report.data) == page
    assert ">nan<" not in page.lower()


def test_the_terminal_fits_a_screen_and_shows_names_as_they_are(hostile: gradloc.Run) -> None:
    report = gradloc.report(hostile, show=False, wandb=False)
    text = str(report)
    assert "[red]x$" in text
    assert len(text.splitlines()) <= 24
    assert "<script>" not in report._repr_html_()


def test_locality_columns_are_sound(hostile: gradloc.Run) -> None:
    curves = hostile.locality()
    shares = curves[
        ["event_rate", "active_fraction", "core_fraction", "gini", "participation", "top1_share", "dead_fraction"]
    ]
    assert ((shares >= 0) & (shares <= 1)).all().all()
    assert curves["overlap"].isna().sum() == curves["parameter"].nunique()
    assert isinstance(curves, pd.DataFrame)
    assert np.isfinite(curves["grad_rms"]).all()


def test_an_unwritable_page_is_refused(hostile: gradloc.Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="writable directory"):
        gradloc.report(hostile, show=False, wandb=False).save_html(tmp_path / "file" / "page.html")
