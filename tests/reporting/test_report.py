"""What people see: the page, the card, the terminal and W&B, from a run with hostile names."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.decompose.dependency_graph import DependencyGraph
from gradloc.reporting import block_figures
from gradloc.reporting.html import render_html

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture
def hostile(tmp_path: Path) -> gradloc.Run:
    model = nn.ModuleDict(
        {
            "<script>alert(1)</script>": nn.Linear(40, 20),
            "[red]x$": nn.Linear(20, 3),
            "3": nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)),
        }
    )
    optimizer = torch.optim.Adam(model.parameters())
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4)
    for _ in range(12):
        x = torch.randn(8, 40)
        for part in model.values():
            x = part(x)
        x.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(tmp_path / "r")


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


def test_blocks_and_graphs_are_drawn(hostile: gradloc.Run) -> None:
    """Before and after sorting, and what feeds what; many units are summed up, and an empty graph is one, too."""
    random = np.random.default_rng(0)
    chain = next(c for c in hostile.info.chains if c.operators[0].startswith("3"))
    labels = (np.array([0, 1, HUB]), np.array([0, 0, 1, 1, -1, 0]), np.array([1, 0, 0]))
    plan = BlockPlan("structural", (ChainPlan(chain, labels, 2),), "none")
    many = DependencyGraph.from_edges([("units", 900)], random.integers(0, 900, size=(700, 2)))
    graphs = {"<b>many</b>": many, "none": DependencyGraph.from_edges([("units", 3)], []), "ring": ring()}
    report = gradloc.report(hostile, plan=plan, graph=graphs, show=False, wandb=False)
    charts = block_figures.block_maps(report.data)
    assert [chart.title for chart in charts] == ["3.0.weight: blocks", "3.2.weight: blocks"]
    assert "0 outputs and 1 inputs belong to all blocks" in charts[0].description
    drawn = {name: chart for name, chart, _ in block_figures.graph_charts(report.data)}
    assert "largest that others feed" in drawn["<b>many</b>"].description
    assert "3 units isolated" in drawn["none"].description
    assert "3 strong components in 3 topological layers, 1 of them circles" in drawn["ring"].description
    checker = Checker()
    page = render_html(report.data)
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert "<b>many" not in page


def ring() -> DependencyGraph:
    """One unit feeds a circle of three, which feeds another."""
    return DependencyGraph.from_edges([("units", 5)], [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4)])


def test_units_are_sorted_hub_first_and_isolated_last() -> None:
    order, begins = block_figures.block_order(np.array([1, -1, 0, HUB, 1, 0]))
    assert order.tolist() == [3, 2, 5, 0, 4, 1]
    assert begins.tolist() == [1, 3, 5]


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


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_wandb_gets_curves_against_the_optimizer_step(
    hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    report = gradloc.report(hostile, show=False, wandb=False)
    result = report.log_wandb(True, tmp_path)
    assert result.problem is None
    file = next(Path(result.place).glob("*.wandb"))
    history = read_history(file)
    steps = [row["gradloc/step"] for row in history if "gradloc/model/gini" in row]
    assert steps == [4, 8, 12]
    expected = report.data.model_curve["gini"].tolist()
    np.testing.assert_allclose([row["gradloc/model/gini"] for row in history if "gradloc/model/gini" in row], expected)


def read_history(path: Path) -> list[dict]:
    """History rows of an offline W&B file: LevelDB log blocks of 32 KiB around protobuf records."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    data, rows, payload, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(payload)
            payload = b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows
