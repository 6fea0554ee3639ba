"""Blocks of every kind of operator, from evidence and from masks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch import nn

import gradloc
from gradloc import errors
from gradloc.core.kept import kept_share, normalised
from gradloc.core.masks import MaskSet
from gradloc.core.plan import ISOLATED
from gradloc.decompose.graph import components
from gradloc.decompose.overlap import partition_overlapping
from gradloc.decompose.partition import partition_chain
from gradloc.decompose.structural import plan_structural, random_partition
from gradloc.reporting.findings import verdict_sentence
from gradloc.route.find import find_operators
from tests.oracles.operators import together
from tests.route.operator_cases import CASES, Causal, SwiGLU

RECURRENT = [(0, 1), (1, 1), (1, 2), (2, 2)]
"""Input and recurrent weights of two layers."""
GATED = [(0, 1), (0, 1), (1, 2)]


def slow_kept(evidence: list[np.ndarray], labels: list[np.ndarray], edges: list[tuple[int, int]]) -> float:
    """Share of evidence inside blocks, one dependency after another."""
    shares = []
    for values, (into, out) in zip(evidence, edges, strict=True):
        inside = sum(values[o, i] for o, i in np.ndindex(*values.shape) if together(labels[out], labels[into], o, i))
        shares.append(inside / values.sum())
    return float(np.mean(shares))


def planted_evidence(
    widths: tuple[int, ...], edges: list[tuple[int, int]], blocks: int, seed: int, contrast: float = 6.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    planted = [random.permutation(np.arange(n) % blocks) for n in widths]
    evidence = [
        random.exponential(size=(widths[out], widths[into]))
        * np.where(planted[out][:, None] == planted[into][None, :], contrast, 1.0)
        for into, out in edges
    ]
    return evidence, planted


@pytest.mark.parametrize("edges", [RECURRENT, GATED], ids=["recurrent", "gated"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_a_planted_partition_is_recovered_across_any_edges(edges: list[tuple[int, int]], blocks: int) -> None:
    widths = (24, 32, 32) if edges is RECURRENT else (24, 48, 24)
    evidence, planted = planted_evidence(widths, edges, blocks, seed=blocks)
    found = partition_chain(evidence, blocks, edges=edges)
    assert [adjusted_rand_score(a, b) for a, b in zip(found.labels, planted, strict=True)] == [1.0, 1.0, 1.0]
    assert found.kept == pytest.approx(slow_kept(evidence, list(found.labels), edges))


def test_a_recurrence_alone_shows_its_blocks() -> None:
    """Inputs that say nothing: only the hidden units' own edges do."""
    random = np.random.default_rng(0)
    planted = random.permutation(np.arange(32) % 4)
    hidden = random.exponential(size=(32, 32)) * np.where(planted[:, None] == planted[None, :], 8.0, 1.0)
    found = partition_chain([np.ones((32, 8)), hidden], 4, edges=[(0, 1), (1, 1)])
    assert adjusted_rand_score(found.labels[1], planted) == 1.0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(8, 24), st.sampled_from([0.0, 0.2, 0.5]), st.integers(0, 10_000))
def test_overlapping_blocks_cover_each_dependency_once_and_say_what_they_keep(
    blocks: int, eighths: int, hub: float, seed: int
) -> None:
    overlap = eighths / 8  # exact, so that what is rounded up below is, too
    random = np.random.default_rng(seed)
    widths = tuple(random.integers(blocks, 12, 3))
    evidence = [random.exponential(size=(o, i)) for i, o in pairwise(widths)]
    found = partition_overlapping(evidence, blocks, free=[0, 2], overlap=overlap, hub=hub, restarts=2, seed=seed)
    edges = [(0, 1), (1, 2)]
    assert found.kept == pytest.approx(slow_kept(evidence, list(found.labels), edges))
    assert found.kept == pytest.approx(kept_share(normalised(evidence), found.labels, edges))
    count = blocks + (hub > 0)
    for layer in (0, 2):
        assert found.labels[layer].shape == (count, widths[layer])
        taken = found.labels[layer][:blocks].sum(1)
        assert (taken == min(widths[layer], -int(-overlap * widths[layer] // blocks))).all()
    assert set(found.labels[1]) <= set(range(count))
    assert set(range(blocks)) <= set(found.labels[1])
    if hub:
        assert found.labels[0][blocks].all()
        assert (found.labels[1] == blocks).sum() == min(round(hub * widths[1]), widths[1] - blocks)


def test_shared_inputs_are_found_and_a_hub_takes_what_fits_nowhere() -> None:
    random = np.random.default_rng(0)
    hidden = np.arange(32) % 4
    reads = np.zeros((4, 16), bool)
    for block in range(4):
        reads[block, [*range(block * 3, block * 3 + 3), 12, 13, 14, 15]] = True  # three of its own, four that all read
    up = random.exponential(size=(32, 16)) * np.where(reads[hidden], 20.0, 0.05)
    down = random.exponential(size=(12, 32)) * np.where(hidden[None, :] == np.arange(12)[:, None] % 4, 20.0, 0.05)
    shared = partition_overlapping([up, down], 4, free=[0, 2], overlap=1.75)
    disjoint = partition_chain([up, down], 4)
    assert adjusted_rand_score(shared.labels[1], hidden) == 1.0
    assert shared.kept > 0.98 > disjoint.kept
    assert {tuple(row) for row in shared.labels[0]} == {tuple(row) for row in reads}
    everywhere = random.choice(32, 4, replace=False)
    up[everywhere], down[:, everywhere] = 20.0, 20.0
    with_hub = partition_overlapping([up, down], 4, free=[0, 2], overlap=1.75, hub=4 / 32)
    assert set(np.flatnonzero(with_hub.labels[1] == 4)) == set(everywhere)


def slow_groups(
    masks: list[np.ndarray], edges: list[tuple[int, int]], widths: tuple[int, ...]
) -> list[set[tuple[int, int]]]:
    """Connected (layer, unit) pairs by plain search, without units that nothing is joined to."""
    near: dict[tuple[int, int], set[tuple[int, int]]] = {
        (layer, u): set() for layer, n in enumerate(widths) for u in range(n)
    }
    for mask, (into, out) in zip(masks, edges, strict=True):
        for o, i in np.argwhere(mask):
            near[out, int(o)].add((into, int(i)))
            near[into, int(i)].add((out, int(o)))
    found, left = [], {unit for unit, others in near.items() if others}
    while left:
        queue, seen = [left.pop()], set()
        while queue:
            unit = queue.pop()
            seen.add(unit)
            queue += near[unit] - seen
        left -= seen
        found.append(seen)
    return found


def test_rounding_adds_no_unit_to_overlapping_blocks() -> None:
    evidence = np.random.default_rng(0).random((10, 50))
    found = partition_overlapping([evidence], 5, free=[0], overlap=1.1, restarts=1)
    assert found.labels[0].sum(1).tolist() == [11] * 5


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([RECURRENT, GATED]), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.4), st.integers(0, 1000)
)
def test_components_across_any_edges_equal_a_plain_search(
    edges: list[tuple[int, int]], inputs: int, hidden: int, density: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    widths = (inputs, hidden, hidden)
    masks = [random.random((widths[out], widths[into])) < density for into, out in edges]
    labels = components(masks, edges)
    top = max(int(found.max(initial=-1)) for found in labels)
    found = [
        {(layer, int(u)) for layer in range(3) for u in np.flatnonzero(labels[layer] == b)} for b in range(top + 1)
    ]
    expected = slow_groups(masks, edges, widths)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert [len(group) for group in found] == sorted((len(group) for group in found), reverse=True)


class Everything(nn.Module):
    """One operator of every kind, and one module of no kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = Causal(16, 4, 4, True)
        self.torch_attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.gated = SwiGLU(16, 32, True)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.both = nn.GRU(16, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x) + self.torch_attention(x, x, x, need_weights=False)[0]
        x = x + self.gated(x) + self.ffn(x) + self.lstm(x)[0] + self.both(x)[0]
        return self.head(x)


@pytest.fixture(scope="module")
def recorded_everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Everything, Path]:
    torch.manual_seed(0)
    model, path = Everything(), tmp_path_factory.mktemp("runs") / "run"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    gradloc.wrap(optimizer, model, run=path, every=1, granularity="element", firings=False)
    for _ in range(8):
        tokens = torch.randint(16, (4, 10))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    gradloc.recorder_of(optimizer).close()
    return model.eval(), path


@pytest.mark.parametrize("form", ["mixed", "overlapping"])
@pytest.mark.parametrize("from_model", [True, False])
def test_every_kind_is_planned_from_a_run_and_routed(
    recorded_everything, tmp_path, form: str, from_model: bool
) -> None:
    model, path = recorded_everything
    kinds = ("chain", "linear", "embedding", "gated", "attention", "conv", "recurrent")
    options = {"hub": 0.1} if form == "overlapping" else {}
    plan = gradloc.plan_blocks(
        model if from_model else None, path, blocks=2, form=form, operators=kinds, shuffles=2, **options
    )
    assert {c.chain.kind for c in plan.chains} == set(kinds)
    assert set(plan.description["skipped"]) == {"both"}
    if from_model:
        assert "bidirectional" in plan.description["skipped"]["both"]
    assert all(0 < c.statistics["kept"] <= 1 for c in plan.chains)
    plan = gradloc.BlockPlan.load(plan.save(tmp_path / "plan.safetensors"))
    fast = gradloc.route_model(model, plan)
    assert fast.certificate.passed
    dense = Everything().eval()
    dense.load_state_dict(model.state_dict())
    plan.masks.apply(dense)
    tokens = torch.randint(16, (3, 10))
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    control = random_partition(plan)
    assert gradloc.route_model(model, control).certificate.passed


def test_what_is_left_out_is_named(recorded_everything) -> None:
    model, path = recorded_everything
    plan = gradloc.plan_blocks(model, path, blocks=8, shuffles=1)
    assert {c.chain.name for c in plan.chains} == {"conv", "gated", "ffn", "lstm"}
    skipped = plan.description["skipped"]
    assert "between 2 and 4" in skipped["attention"]
    assert "operators=" in skipped["tokens"]
    assert "operators=" in skipped["head"]
    only = gradloc.plan_blocks(model, path, blocks=2, shuffles=1, include="head")
    assert [c.chain.kind for c in only.chains] == ["linear"]
    assert "include=" in only.description["skipped"]["ffn"]
    with pytest.raises(errors.ConfigError, match="magnet"):
        gradloc.plan_blocks(model, path, operators=["magnet"])
    with pytest.raises(errors.ConfigError, match="no operator of kind conv"):
        gradloc.plan_blocks(model, path, operators=["conv"], include="ffn")
    with pytest.raises(errors.EmptyRunError, match="recorded with firings=False"):
        gradloc.plan_blocks(model, path, kind="conditional", blocks=4)


def test_masks_that_split_an_operator_become_its_blocks(recorded_everything) -> None:
    model, _ = recorded_everything
    operators, _ = find_operators(model)
    random = np.random.default_rng(0)
    keep, planted = {}, {}
    for operator in operators:
        labels = [random.permutation(np.arange(n) % 2) for n in operator.widths]
        labels[-1][0] = ISOLATED
        planted[operator.name] = labels
        for parameter, (into, out) in zip(operator.matrices, operator.edges, strict=True):
            inside = (labels[out][:, None] == labels[into][None, :]) & (labels[out][:, None] >= 0)
            keep[parameter.name] = parameter.layout.ungrid(np.repeat(inside[:, :, None], parameter.layout.channels, 2))
    masks = MaskSet(keep)
    kinds = tuple({operator.kind for operator in operators})
    plan = gradloc.plan_blocks(model, masks, operators=kinds)
    assert plan.verdict == "natural"
    assert len(plan.chains) == len(operators)
    for chain in plan.chains:
        for found, expected in zip(chain.labels, planted[chain.chain.name], strict=True):
            assert adjusted_rand_score(found, expected) == 1.0
    assert all(np.array_equal(plan.masks.array(name), masks.array(name)) for name in masks)


def test_forms_and_arguments_that_do_not_fit_are_refused() -> None:
    operators, _ = find_operators(nn.ModuleDict({"conv": nn.Conv1d(4, 8, 1), "ffn": CASES["chain"].make(8, True)}))
    random = np.random.default_rng(0)
    evidence = {p.name: random.random((p.layout.out_units, p.layout.in_units)) for o in operators for p in o.matrices}
    plan = plan_structural(operators, evidence, 2, form="disjoint", shuffles=1)
    assert [c.chain.name for c in plan.chains] == ["ffn"]
    assert "as many inputs as outputs" in plan.description["skipped"]["conv"]
    with pytest.raises(errors.ConfigError, match="as many inputs"):
        plan_structural(operators[:1], evidence, 2, form="disjoint", shuffles=1)
    for options, word in (
        ({"form": "round"}, "overlapping"),
        ({"form": "overlapping", "sizes": "free"}, "sizes='free'"),
        ({"form": "overlapping", "hub": 1.0}, "below 1"),
        ({"form": "overlapping", "overlap": 0.5}, "at least 1"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            plan_structural(operators, evidence, 2, shuffles=1, **options)


@pytest.mark.parametrize("kind", ["chain", "gated"])
def test_units_that_masks_remove_make_smaller_matrices(kind: str) -> None:
    """A row, its bias and the next column go, as ``granularity="unit"`` has it; where blocks are asked for, they are made."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": CASES[kind].make(16, True)}).eval()  # one of them has dropout
    ((chain,), _), random = find_operators(model), np.random.default_rng(0)
    stays = [np.ones(width, bool) for width in chain.widths]
    stays[1] = random.random(chain.widths[1]) < 0.5
    keep = {
        p.name: stays[out][:, None] & stays[into] for p, (into, out) in zip(chain.matrices, chain.edges, strict=True)
    }
    keep |= {p.name: stays[1] for p in chain.parameters if p.into is None and p.out == 1}
    masks = MaskSet(keep)
    plan = gradloc.plan_blocks(model, masks)
    assert [c.blocks for c in plan.chains] == [1]
    assert np.array_equal(plan.chains[0].labels[1] != ISOLATED, stays[1])
    assert plan.verdict == "none"
    assert plan.chains[0].statistics["kept"] == 1.0
    assert verdict_sentence(plan).startswith("Units are removed, and blocks weren't looked for")
    masks.apply(model)
    fast, x = gradloc.route_model(model, plan), torch.randn(5, chain.widths[0])
    torch.testing.assert_close(fast["ffn"](x), model["ffn"](x))
    assert list(fast["ffn"].layers[1].sizes) == [stays[1].sum()]
    assert gradloc.plan_blocks(model, masks, blocks=2).chains[0].blocks == 2
