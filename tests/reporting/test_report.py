"""What people see: the page, the card, the terminal and W&B, from a run with hostile names."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import gradloc
from gradloc.errors import EmptyRunError
from gradloc.reporting.choice import telling_modules
from gradloc.reporting.html import render_html
from gradloc.reporting.terminal import summary_text
from gradloc.reporting.tree import module_tree

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
    assert len(summary_text(report.data, width=80).splitlines()) <= 24
    assert "<script>" not in report._repr_html_()
    assert all(f"[{finding.more}]" in text.replace("\n", " ") for finding in report.findings[:3])


def test_what_is_most_useful_comes_first(hostile: gradloc.Run) -> None:
    removal = pd.DataFrame(
        [
            {"policy": "density", "alpha": np.nan, "density": 0.5, "removed": 0.5, "loss": 2.02, "increase": 0.02, "increase_error": 0.004},
            {"policy": "aggressive", "alpha": 0.05, "density": np.nan, "removed": 0.9, "loss": 3.0, "increase": 1.0, "increase_error": 0.1},
        ]
    )  # fmt: skip
    found = gradloc.report(hostile, removal=removal, show=False, wandb=False).findings
    assert found[0].text.startswith("Half of the gradient energy landed in")
    assert "50 % of the tested weights could go at once for +0.02 loss ± 0.004, density 0.5." in [
        one.text for one in found[:3]
    ]
    dear = gradloc.report(hostile, removal=removal.tail(1), show=False, wandb=False).findings
    assert any(one.text.startswith("Nothing goes for free: taking 90 %") for one in dear)


def test_a_tree_holds_every_parameter_once(hostile: gradloc.Run) -> None:
    data = gradloc.report(hostile, show=False, wandb=False).data
    waiting, seen, numbers = [module_tree(data)], [], []
    while waiting:
        node = waiting.pop()
        numbers.append(node.number)
        waiting += node.children
        seen += [f"{node.name}.{row[0]}" for row in node.parameters]
    assert sorted(seen) == sorted(parameter.name for parameter in hostile.info.parameters)
    assert len(set(numbers)) == len(numbers)


def test_the_most_telling_modules_are_those_with_energy_and_those_that_changed(hostile: gradloc.Run) -> None:
    data = gradloc.report(hostile, show=False, wandb=False).data
    energy = data.modules.groupby("module")["energy_share"].mean().nlargest(1).index[0]
    assert energy in telling_modules(data, 2)
    assert len(telling_modules(data, 3)) == 3
    assert telling_modules(data, 99) == list(dict.fromkeys(data.modules["module"]))


def test_a_run_without_a_finished_window_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = gradloc.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, run=tmp_path / "empty")
    gradloc.recorder_of(optimizer).close()
    with pytest.raises(EmptyRunError):
        gradloc.report(tmp_path / "empty", show=False, wandb=False)


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
