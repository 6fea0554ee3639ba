"""What people see: the page, the card, the terminal and W&B, from a run with hostile names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import gradloc
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.decompose.dependency_graph import DependencyGraph
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError
from gradloc.reporting.choice import telling_modules
from gradloc.reporting.figures import structure
from gradloc.reporting.html import render_html
from gradloc.reporting.terminal import summary_text
from gradloc.reporting.tree import module_tree
from tests.reporting.page_checker import checked


def test_the_page_is_whole_harmless_and_deterministic(hostile: gradloc.Run, tmp_path: Path) -> None:
    masks = gradloc.find_masks(hostile, density=0.5)
    report = gradloc.report(hostile, masks=masks, show=False, wandb=False)
    page = report.save_html(tmp_path / "page.html").read_text()
    checker = checked(page)
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
    charts = structure.block_maps(report.data)
    assert [chart.title for chart in charts] == ["3.0.weight: blocks", "3.2.weight: blocks"]
    assert "0 outputs and 1 input belong to all blocks" in charts[0].description
    drawn = {name: chart for name, chart, _ in structure.graph_charts(report.data)}
    assert "largest that others feed" in drawn["<b>many</b>"].description
    assert "3 units isolated" in drawn["none"].description
    assert "3 strong components in 3 topological layers, 1 of them circles" in drawn["ring"].description
    page = render_html(report.data)
    checked(page)
    assert "<b>many" not in page


def ring() -> DependencyGraph:
    """One unit feeds a circle of three, which feeds another."""
    return DependencyGraph.from_edges([("units", 5)], [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4)])


def test_units_are_sorted_hub_first_and_isolated_last() -> None:
    order, begins = structure.block_order(np.array([1, -1, 0, HUB, 1, 0]))
    assert order.tolist() == [3, 2, 5, 0, 4, 1]
    assert begins.tolist() == [1, 3, 5]


def test_the_terminal_fits_a_screen_and_shows_names_as_they_are(hostile: gradloc.Run) -> None:
    report = gradloc.report(hostile, show=False, wandb=False)
    text = str(report)
    assert "[red]x$" in text
    assert len(text.splitlines()) <= 24
    assert len(summary_text(report.data, width=80).splitlines()) <= 24
    assert (
        f"In the last window, steps {report.data.last_modules['first_step'].min()} to {report.data.final_step}" in text
    )
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
    assert found[0].text.startswith("Half of the gradient energy (")
    assert (
        "50 % of the tested weights could go: with them taken away at once and no training after, the validation loss is 2.02 instead of 2 "
        "(+0.02 ± 0.004; what has the most evidence is kept, density 0.5)."
    ) in [one.text for one in found[:3]]
    dear = gradloc.report(hostile, removal=removal.tail(1), show=False, wandb=False).findings
    assert any(one.text.startswith("Nothing that was tried goes for free: with the least of it, 90 %") for one in dear)


def test_what_belongs_to_another_model_is_not_shown_as_this_runs(hostile: gradloc.Run) -> None:
    other = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    masks = gradloc.MaskSet({name: np.ones(p.shape, bool) for name, p in other.named_parameters() if p.ndim == 2})
    plan = gradloc.plan_blocks(other, masks, blocks=2)
    with pytest.raises(
        ModelMismatchError,
        match=r"masks: made for another model than the run's: the run has none of 0\.weight, 2\.weight",
    ):
        gradloc.report(hostile, masks=masks, show=False, wandb=False)
    with pytest.raises(ModelMismatchError, match=r"plan: made for another model"):
        gradloc.report(hostile, plan=plan, show=False, wandb=False)
    name = hostile.info.parameters[0].name
    with pytest.raises(ModelMismatchError, match=r"has shape \(2, 2\), in the run \("):
        gradloc.report(hostile, masks=gradloc.MaskSet({name: np.ones((2, 2), bool)}), show=False, wandb=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"masks": "masks.safetensors"}, "masks is a str"),
        ({"plan": "plan.safetensors"}, "plan is a str"),
        ({"plan": [None]}, "plan is a NoneType"),
        ({"annealing": "log.jsonl"}, r"annealing is a str that holds no decisions; pass an annealer's \.log"),
        ({"annealing": [{"loss": 1.0}]}, "annealing is a list that holds no decisions"),
        ({"certificate": torch.nn.Identity()}, r"certificate is a Identity; pass the \.certificate"),
        ({"graph": 3}, "graph is a int"),
        ({"support": 3}, "support is a int"),
        ({"removal": 3}, "removal is a int"),
        ({"results": [1]}, "results is a list"),
    ],
)
def test_what_a_page_cannot_show_is_refused(hostile: gradloc.Run, given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gradloc.report(hostile, show=False, wandb=False, **given)  # type: ignore[arg-type]


def test_what_recording_wrote_does_not_grow_by_what_is_put_beside_it(hostile: gradloc.Run) -> None:
    written = gradloc.report(hostile, show=False, wandb=False).data.cost["bytes_written"]
    gradloc.report(hostile, show=False, wandb=False).save_html(Path(hostile.location) / "report.html")
    assert gradloc.report(hostile, show=False, wandb=False).data.cost["bytes_written"] == written > 0


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


def test_an_annealing_log_may_be_a_table(hostile: gradloc.Run) -> None:
    log = [
        {"step": step, "factor": factor, "validation": loss, "limit": 1.1, "decision": decision}
        for step, factor, loss, decision in (
            (0, 1.0, 1.0, "start"),
            (5, 0.5, 9.0, "roll back"),
            (9, 0.0, 1.05, "finish"),
        )
    ]
    listed = gradloc.report(hostile, annealing=log, show=False, wandb=False)
    page = render_html(listed.data)
    for table in (listed.data.annealing, pd.DataFrame(log).set_axis([7, 8, 9])):
        again = gradloc.report(hostile, annealing=table, show=False, wandb=False)
        assert again.findings == listed.findings
        assert render_html(again.data) == page
    assert any("Annealing faded out" in finding.text for finding in listed.findings)
    for nothing in (None, [], pd.DataFrame()):
        assert gradloc.report(hostile, annealing=nothing, show=False, wandb=False).data.annealing.empty


def test_an_unwritable_page_is_refused(hostile: gradloc.Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="writable directory"):
        gradloc.report(hostile, show=False, wandb=False).save_html(tmp_path / "file" / "page.html")
