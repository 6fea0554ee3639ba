"""What the first sentences say, on made-up numbers: which way it went, and what is not known."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradloc
from gradloc.core.plan import BlockPlan, ChainPlan, OperatorChain
from gradloc.reporting.data import GraphSummary, ReportData
from gradloc.reporting.figures.structure import condensation_chart
from gradloc.reporting.findings import findings, p_words, verdict_sentence
from gradloc.reporting.html import render_html
from tests.conftest import make_net, train
from tests.reporting.page_checker import checked


def said(data: ReportData, **changes: Any) -> str:
    return " ".join(one.text for one in findings(replace(data, **changes)))


def log(*looks: tuple[float, float | None, str], fades: str | None = None) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [
        {"step": 10 * at, "factor": factor, "validation": loss, "limit": None, "decision": decision}
        for at, (factor, loss, decision) in enumerate(looks)
    ]
    if fades is not None:
        rows[0]["fades"] = fades
    return pd.DataFrame(rows)


@pytest.fixture
def data(hostile: gradloc.Run) -> ReportData:
    return gradloc.report(hostile, show=False, wandb=False).data


def test_annealing_says_what_went_and_how_the_loss_changed(data: ReportData) -> None:
    looks = log((1, 1.5, "start"), (0.4, 1.48, "continue"), (0, 1.4608, "finish"), fades="half of the weights")
    text = said(data, annealing=looks)
    assert "Annealing faded out half of the weights, completely." in text
    assert "went from 1.5 to 1.461 (0.039 better; between two looks it changes by 0.02)" in text
    assert "This is the effect of both" in text
    worse = said(data, annealing=log((1, 1.0, "start"), (0, 1.25, "finish")))
    assert "what the masks or the plan don't keep, completely" in worse
    assert "from 1 to 1.25 (0.25 worse)" in worse


def test_annealing_that_was_stopped_tells_the_loss_of_the_state_that_was_kept(data: ReportData) -> None:
    looks = log((1, 1.0, "start"), (0.5, 1.01, "continue"), (0.5, 9.0, "roll back"), (0.5, 8.0, "stop"))
    text = said(data, annealing=looks)
    assert "to 50 % of its former strength and then stopped" in text
    assert "from 1 to 1.01 (0.01 worse)" in text
    unknown = said(data, annealing=log((1, None, "start"), (0, None, "finish")))
    assert "what it cost isn't known" in unknown


def test_a_stage_says_what_fades(tmp_path: Any) -> None:
    model, optimizer = make_net()
    weight = dict(model.named_parameters())["ffn.up.weight"]
    masks = gradloc.MaskSet({"ffn.up.weight": np.arange(weight.numel()).reshape(weight.shape) % 4 == 0})
    assert (
        gradloc.Annealer(model, optimizer, masks, steps=4).log[0]["fades"]
        == "75 % of the weights in one parameter (to zero)"
    )
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, firing_every=1)
    train(model, optimizer, 8)
    gradloc.recorder_of(optimizer).close()
    plan = gradloc.plan_blocks(model, tmp_path / "r", kind="conditional", blocks=4, keep=0.25)
    annealer = gradloc.Annealer(model, optimizer, plan, steps=4)
    assert annealer.log[0]["fades"] == "the blocks that a token doesn't pick (1 of 4 run) in a feed-forward network"
    annealer.close()
    chain = plan.chains[0]
    several = replace(plan, chains=(chain, replace(chain, active=3), replace(chain, blocks=8, active=2)))
    assert several.running == "1 to 3 of 4, 2 of 8"


def test_persistence_is_told_and_drawn(data: ReportData) -> None:
    """Half-lives: the median of the parameters, and nothing where two windows are too few."""
    names = data.persistence["parameter"].unique()
    lives = dict(zip(names, [10.0, 20.0, np.inf], strict=False))
    known = data.persistence.assign(half_life_steps=data.persistence["parameter"].map(lives))
    assert "falls to half in about 20 steps" in said(data, persistence=known)
    assert "doesn't fall to half" in said(data, persistence=known.assign(half_life_steps=np.inf))
    assert "falls to half" not in said(data, persistence=data.persistence.iloc[:0])
    page = render_html(replace(data, persistence=known.assign(half_life_steps=np.inf)))
    checked(page)
    assert "Overlap of the busiest cells, and how long it lasts" in page
    assert ">more than " in page
    bare = render_html(replace(data, persistence=data.persistence.iloc[:0]))
    assert "It takes two windows" in bare
    assert "persistence, which takes two windows" in bare


def test_training_that_moves_on_is_not_said_to_stay(data: ReportData) -> None:
    curve = data.model_curve
    for overlap, words in ((0.9, "stays mostly"), (0.4, "stays partly"), (0.21, "does not stay")):
        assert f"Training {words} in the same place" in said(
            data, model_curve=curve.assign(overlap=overlap, overlap_chance=0.2)
        )


class CutOff(nn.Module):
    """The first layer gets no error signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.second = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) + 0.0 * self.first(x)


def test_a_layer_without_an_error_signal_is_shown_as_undefined(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = CutOff()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=4, firing_every=1)
    for _ in range(8):
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    report = gradloc.report(tmp_path / "r", show=False, wandb=False)
    rows = report.data.firings.set_index("operator")
    silent = rows.loc["first.0"]
    assert silent["tokens"] == 0
    assert silent.drop("tokens").isna().all()
    assert rows.loc["second.0", "tokens"] > 0
    assert "No error signal was seen at first.0" in said(report.data)
    assert '<th scope="row">first.0</th><td>0</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td>' in render_html(
        report.data
    )


def test_a_run_that_sampled_no_firing_says_so(data: ReportData) -> None:
    none = pd.DataFrame(
        [
            {
                "operator": "a",
                "tokens": 0,
                "fire_share": np.nan,
                "top10_energy": np.nan,
                "never": np.nan,
                "always": np.nan,
                "counted": None,
            }
        ]
    )
    assert "error signal" not in said(data, firings=none)
    assert "No firings were sampled." in render_html(replace(data, firings=none))


def test_layers_with_exact_zeros_and_others_are_told_apart(tmp_path: Any) -> None:
    """40 % behind ReLU and 5 % beyond a threshold have no mean."""
    torch.manual_seed(0)
    relu, gelu = (nn.Sequential(nn.Linear(8, 32), act, nn.Linear(32, 8)) for act in (nn.ReLU(), nn.GELU()))
    model = nn.Sequential(relu, gelu)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firing_every=1)
    for _ in range(6):
        model(torch.randn(40, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    data = gradloc.report(tmp_path / "r", show=False, wandb=False).data
    rows = data.firings.set_index("operator")
    assert rows["counted"].to_dict() == {"0.0": "any", "1.0": "strong"}
    text = said(data)
    exact, strong = (100 * rows.loc[name, "fire_share"] for name in ("0.0", "1.0"))
    assert f"in 1 of 2 layers, {exact:.0f} % of the watched units get any error signal" in text
    assert f"in 1 of 2 layers, {strong:.1f} % of the watched units get a strong error signal" in text
    assert exact > 5 * strong
    alone = said(data, firings=data.firings[data.firings["operator"] == "0.0"])
    assert f"sample), {exact:.0f} % of the watched units get any" in alone
    assert "strong error signal (" not in alone


@pytest.mark.parametrize(
    ("steps", "every", "advice"),
    [
        (200, 40, "5 of 200 steps were observed.* With every=2, flush_every=10, it would be 100 steps in 10 windows"),
        (40, 1, "40 of 40 steps were observed.* With flush_every=4 they would make 10 windows"),
    ],
)
def test_one_window_is_told_in_words_and_not_drawn(recorded: Any, steps: int, every: int, advice: str) -> None:
    *_, path = recorded(steps=steps, every=every, flush_every=100)
    report = gradloc.report(path, show=False, wandb=False)
    assert re.search(rf"^One window: {advice}", report.findings[0].text)
    assert not report.findings[0].problem
    page = report.save_html(path / "page.html").read_text()
    checked(page)
    assert "Locality over training" not in page
    assert "One window makes no curve; its numbers are in the tree below." in page
    assert "<svg" not in report._repr_html_()
    assert "One window: " in str(report)


def test_two_windows_have_a_table_of_persistence_and_no_line(recorded: Any) -> None:
    *_, path = recorded(steps=10)
    report = gradloc.report(path, show=False, wandb=False)
    assert not any(finding.text.startswith("One window") for finding in report.findings)
    page = report.save_html(path / "page.html").read_text()
    assert "Locality over training" in page
    assert "How long training stays in one place</title>" not in page
    assert "Two windows have one distance, which makes no line." in page
    assert "<caption>Overlap of the busiest cells</caption>" in page


def timed(*rows: tuple[int, float, float], passed: bool = True) -> dict[str, Any]:
    """Two chains that take as long as each other."""
    latency = [
        {"chain": name, "tokens": n, "dense": dense, "routed": routed, "kernel": "loop", "speedup": dense / routed}
        for name in ("a", "b")
        for n, dense, routed in rows
    ]
    checks = [{"chain": "a", "name": "weights", "passed": passed, "value": 1.0, "limit": 0.0}]
    return {"passed": passed, "checks": checks, "latency": latency}


def test_whether_routing_pays_is_a_finding(data: ReportData) -> None:
    assert "routed operators" not in said(data)
    text = said(data, certificate=timed((1, 1.0, 2.0), (16, 3.0, 4.0)))
    assert (
        "the routed operators are slower with 1, 16 tokens (×0.5 to ×0.75 of dense's speed). Routing doesn't pay there"
        in text
    )
    text = said(data, certificate=timed((1, 1.0, 2.0), (16, 1.0, 1.01), (2048, 3.0, 1.0)))
    assert "slower with 1 token (×0.5 of dense's speed) and faster with 2,048 tokens (×3 of dense's speed)." in text
    assert "doesn't pay" not in text
    assert "the routed operators are as fast as dense." in said(data, certificate=timed((1, 1.0, 1.0)))


def test_a_failed_certificate_is_a_problem(data: ReportData) -> None:
    first = findings(replace(data, problems=[], certificate=timed((1, 1.0, 1.0), passed=False)))[0]
    assert first.problem
    assert first.text == "The certificate failed in 1 of 1 checks (a): do not use the routed model."


@pytest.mark.parametrize(
    ("p_values", "controls", "words"),
    [
        ([0.05], 19, "(p ≤ 0.05 by 19 controls)"),
        ([0.05, 0.05], 19, "(p ≤ 0.05 by 19 controls, each of 2 operators)"),
        ([0.05, 0.3], 19, "(p ≤ 0.05 by 19 controls in the lowest of 2 operators, 0.3 in the highest)"),
        ([0.1], 19, "(p = 0.1)"),
        ([0.05], 99, "(p = 0.05)"),
        ([0.05], None, "(p = 0.05)"),  # a plan of an earlier version
    ],
)
def test_a_p_value_at_its_floor_is_a_bound(p_values: list[float], controls: int | None, words: str) -> None:
    assert words in verdict_sentence(planned(p_values, controls))


@pytest.mark.parametrize(
    ("plans", "bounds"),
    [
        ([([0.05], 19), ([0.05, 0.05], 19), ([0.05, 0.3], 19)], 4),
        ([([0.1], 19), ([0.05], 99), ([0.05], None)], 0),
    ],
)
def test_the_page_has_a_bound_for_each_p_value_at_its_floor(
    data: ReportData, plans: list[tuple[list[float], int | None]], bounds: int
) -> None:
    page = render_html(replace(data, plans=tuple(planned(*plan) for plan in plans)))
    assert page.count("≤ 0.05 (19 controls)") == bounds


def planned(p_values: list[float], controls: int | None) -> gradloc.BlockPlan:
    layer = OperatorChain("ffn", ("up", "down"), ("relu",), (4, 8, 4))
    labels = tuple(np.arange(n) % 2 for n in layer.widths)
    chains = tuple(ChainPlan(layer, labels, 2, statistics={"kept": 0.6, "chance": 0.5, "p_value": p}) for p in p_values)
    return gradloc.BlockPlan("structural", chains, "inducible", {} if controls is None else {"controls": controls})


def test_blocks_that_are_significant_and_negligible_are_not_called_chance() -> None:
    """An excess of less than 1 % of the evidence is no structure, however significant: the p-value beside it says "beyond chance"."""
    layer = OperatorChain("ffn", ("up", "down"), ("relu",), (4, 8, 4))
    labels = tuple(np.arange(n) % 2 for n in layer.widths)

    def sentence(*p_values: float) -> str:
        chains = tuple(
            ChainPlan(layer, labels, 2, statistics={"kept": 0.55, "chance": 0.547, "p_value": p}) for p in p_values
        )
        return verdict_sentence(gradloc.BlockPlan("structural", chains, "none", {"controls": 19, "alpha": 0.05}))

    assert "too little more to count as structure: 2 blocks hold 55.0 % of the evidence" in sentence(0.05)
    assert "no such blocks beyond chance: 2 blocks" in sentence(0.1)
    assert "no such blocks beyond chance: 2 blocks" in sentence(0.05, 0.4, 1.0)


def test_plans_keep_how_many_controls_they_were_tested_against(recorded: Any) -> None:
    model, _, path = recorded(steps=12)
    plan = gradloc.plan_blocks(model, path, blocks=2, operators=["chain"], shuffles=5)
    assert plan.description["controls"] == 5
    assert gradloc.plan_blocks(model, path, blocks=2, operators=["chain"]).description["controls"] == 19
    assert gradloc.plan_blocks(model, path, kind="conditional", blocks=4).description["controls"] == 19


def test_masks_that_their_tests_cannot_bear_are_a_problem(data: ReportData) -> None:
    keep = {"w": np.array([True, False])}
    doubtful = gradloc.MaskSet(keep, description={"criterion": "wald", "alpha": 0.05, "policy": "conservative", "correction": "bh", "doubt": "it holds 40%"})  # fmt: skip
    first = findings(replace(data, problems=[], masks=doubtful))[0]
    assert first.problem
    assert "Masks: it holds 40%." in first.text
    assert not any(one.problem for one in findings(replace(data, problems=[], masks=gradloc.MaskSet(keep))))


def test_annealing_that_came_to_nothing_says_so(data: ReportData) -> None:
    looks = log((1, 1.0, "start"), (0.95, 9.0, "roll back"), (0.97, 8.0, "stop"))
    looks["back_to"] = [None, 1.0, 1.0]
    text = said(data, annealing=looks)
    assert "to 100 % of its former strength and then stopped" in text
    assert "the model is in the state that the stage began with, with a validation loss of 1." in text
    looks = log((1, 1.0, "start"), (0.9, 1.01, "continue"), (0.85, 9.0, "stop"))
    looks["back_to"] = [None, None, 0.9]
    assert "to 90 % of its former strength" in said(data, annealing=looks)


def test_one_of_a_kind_is_in_the_singular() -> None:
    one = np.ones(1, np.int64)
    chain = GraphSummary(3, 1, 1, one * 2, np.array([2, 1]), (np.array([0, 1]),), np.empty((0, 2), np.int64))
    said = condensation_chart("net", chain).description
    assert said.startswith(
        "3 units, 1 dependency, 1 component, the largest of 2 units; 1 unit isolated. 2 strong components in 1 topological layer"
    )
    assert p_words(0.5, 1) == "p ≤ 0.5 by 1 control"
    layer = OperatorChain("ffn", ("up", "down"), ("relu",), (1, 2, 1))
    whole = ChainPlan(layer, (np.zeros(1, int), np.array([0, -1]), np.zeros(1, int)), 1)
    assert (
        repr(BlockPlan("structural", (whole,), "none")) == "BlockPlan(structural, 1 operator, 1 block, verdict='none')"
    )
