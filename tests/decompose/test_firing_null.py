"""Firings without co-firing keep everything else, and the verdict knows the difference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.core.plan import HUB, BlockPlan, ChainPlan, OperatorChain
from gradloc.core.router import RouterWeights
from gradloc.decompose import conditional, structural
from gradloc.decompose.conditional import plan_conditional, random_clusters
from gradloc.decompose.firing_clusters import cluster_units
from gradloc.decompose.firing_null import IndependentFirings
from gradloc.errors import ConfigError
from tests.oracles.routing import captured

CHAIN = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 64, 16))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(2, 20), st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_a_draw_keeps_how_often_units_and_tokens_fire(tokens: int, units: int, rate: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    energy = random.exponential(size=(tokens, units)) * (random.random((tokens, units)) < rate * random.random(units))
    firings = IndependentFirings(energy, random)
    for _ in range(2):
        drawn = firings.draw()
        assert np.isfinite(drawn).all()
        for axis in (0, 1):
            np.testing.assert_array_equal((drawn > 0).sum(axis), (energy > 0).sum(axis))


def test_where_tokens_are_of_one_size_each_unit_keeps_its_energies() -> None:
    random = np.random.default_rng(2)
    energy = random.exponential(size=(400, 64)) * (random.random((400, 64)) < 0.4)
    firings = IndependentFirings(energy, random)
    drawn = firings.draw()
    assert firings._sizes.share < 0.2
    largest = np.abs(np.sort(drawn, axis=0) - np.sort(energy, axis=0)).max(0)
    assert (largest < 0.5 * energy.max(0)).all()
    np.testing.assert_allclose(drawn.sum(0), energy.sum(0), rtol=0.1)


def test_units_that_fired_together_no_longer_do() -> None:
    random = np.random.default_rng(0)
    energy = np.repeat(random.random((500, 4)) < 0.3, 8, axis=1).astype(float)
    together = np.corrcoef(energy.T)[0, 1:8]
    drawn = np.corrcoef(IndependentFirings(energy, random).draw().T)[0, 1:8]
    assert together.min() > 0.99
    assert np.abs(drawn).max() < 0.4  # tokens of few groups still make few units fire


@pytest.mark.parametrize("kind", ["rates", "sizes", "tokens", "planted"])
def test_the_verdict_is_of_firing_together(kind: str) -> None:
    """Units of one rate, put together, capture more than random ones: nine of ten such nets were called inducible."""
    claimed = 0
    for seed in range(6):
        random = np.random.default_rng(seed)
        energy = random.exponential(size=(600, 64))
        groups = random.permutation(np.arange(64) % 8)
        chance = {
            "rates": random.beta(1, 4, 64),
            "sizes": np.full(64, 0.2),
            "tokens": random.beta(1, 3, (600, 1)),
            "planted": np.where((random.random((600, 8)) < 0.15)[:, groups], 0.8, 0.1),
        }[kind]
        energy *= random.random(energy.shape) < chance
        if kind == "sizes":
            energy *= random.pareto(2, 64) + 0.1
        plan = plan_conditional([CHAIN], {"ffn": energy}, 8, seed=seed)
        statistics = plan.chains[0].statistics
        assert (
            statistics["excess"] <= statistics["captured"] - max(statistics["chance"], statistics["independent"]) + 1e-9
        )
        claimed += plan.verdict != "none"
    assert claimed == 6 if kind == "planted" else claimed <= 1


@pytest.mark.parametrize("strength", [1.0, 6.0])
@pytest.mark.parametrize(("frequent", "hub"), [(0, 0), (4, 4), (9, 4)])
def test_statistics_are_those_of_plain_counts(
    frequent: int, hub: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub takes half of the budget at most. Held-out tokens judge clusters, drawn ones, and those of the same search where units fire independently."""
    monkeypatch.setattr(conditional, "TESTED_TOKENS", 40)
    random = np.random.default_rng(0)
    chain, groups = OperatorChain("ffn", ("up", "down"), ("relu",), (6, 20, 6)), np.arange(20) % 4
    on = random.integers(0, 4, (60, 1)) == groups
    energy = random.exponential(size=(60, 20)) * (random.random((60, 20)) < np.where(on, 0.1 * strength, 0.1))
    energy[:, :frequent] += 0.5
    energy[7] = 0.0
    (plan,) = plan_conditional([chain], {"ffn": energy}, 4, keep=0.7, alpha=0.2).chains
    labels, active, draws = plan.labels[1], plan.active, np.random.default_rng(0)
    assert (labels == HUB).sum() == hub
    assert active == (2 if hub else 3), "of what the hub leaves"
    assert set(np.flatnonzero(labels == HUB)) <= set(range(frequent))
    judge = energy[draws.permutation(60)[1::2]]
    learn = energy[np.random.default_rng(0).permutation(60)[::2]]
    np.testing.assert_array_equal(labels[labels != HUB], cluster_units(learn[:, labels != HUB], 4))
    held, chances = captured(judge, labels, active, 4), []
    for _ in range(19):
        drawn = labels.copy()
        drawn[labels != HUB] = draws.permutation(labels[labels != HUB])
        chances.append(captured(judge, drawn, active, 4))
    draws = np.random.default_rng(0)
    some = energy[draws.permutation(np.flatnonzero(energy.sum(1)))[:40]]

    def searched(of: np.ndarray) -> float:
        found = np.full(20, HUB)
        found[labels != HUB] = cluster_units(of[::2, labels != HUB], 4, restarts=1)
        return captured(of[1::2], found, active, 4)

    firings, here = IndependentFirings(some, draws), searched(some)
    null = [searched(firings.draw()) for _ in range(19)]
    ranks = [1 + sum(one >= own - 1e-12 for one in other) for own, other in ((held, chances), (here, null))]
    assert plan.statistics == pytest.approx(
        {
            "captured": held,
            "chance": np.mean(chances),
            "independent": held - (here - np.mean(null)),
            "excess": min(held - np.mean(chances), here - np.mean(null)),
            "p_value": max(ranks) / 20,
            "fire_share": (judge > 0).mean(),
            "hub_units": hub,
            "tokens": 60,
        }
    )


def test_what_is_as_large_in_every_draw_is_no_evidence() -> None:
    statistics = plan_conditional([CHAIN], {"ffn": np.ones((64, 64))}, 8, hub_share=1.0).chains[0].statistics
    assert (statistics["p_value"], statistics["excess"]) == (1.0, 0.0)
    assert statistics["hub_units"] == 8, "of those that fire always"
    with pytest.raises(ConfigError, match=r"hub_share=1\.5"):
        plan_conditional([CHAIN], {"ffn": np.ones((64, 64))}, 8, hub_share=1.5)


def test_a_control_has_neither_the_router_nor_the_statistics_of_its_plan() -> None:
    router = RouterWeights.linear(np.ones((4, 16), np.float32), np.zeros(4, np.float32))
    labels = np.full(16, HUB), np.append(np.arange(60) % 4, [HUB] * 4), np.full(16, HUB)
    plan = ChainPlan(CHAIN, labels, 4, active=1, router=router, statistics={"excess": 1.0})
    (drawn,) = random_clusters(BlockPlan("conditional", (plan,), "inducible")).chains
    assert (drawn.router, drawn.statistics) == (None, {})
    assert (drawn.labels[1] != labels[1]).any()
    np.testing.assert_array_equal(drawn.labels[1] == HUB, labels[1] == HUB)


def test_of_the_fast_numbers_of_blocks_the_one_that_captures_the_most_is_taken() -> None:
    energy = np.random.default_rng(0).random((64, 64)) ** 4
    captured = {n: plan_conditional([CHAIN], {"ffn": energy}, n).chains[0].statistics["captured"] for n in (8, 16, 32)}
    assert captured[32] > captured[16] > captured[8]
    for seconds, expected in (({8: 1.0, 16: 1.05, 32: 1.2}, 16), ({8: 1.0, 16: 1.2, 32: 1.2}, 8)):
        plan = plan_conditional([CHAIN], {"ffn": energy}, "auto", cost=lambda chain, n, active, s=seconds: s[n])
        assert plan.chains[0].blocks == expected


@pytest.mark.parametrize(
    ("p_value", "excess", "held", "verdict"),
    [
        (0.05, 0.01, 0.5, "inducible"),
        (0.051, 0.5, 1.0, "none"),
        (0.05, 0.0099, 1.0, "none"),
        (0.05, 0.01, 1.0, "natural"),
    ],
)
def test_verdicts_are_on_the_right_side_of_their_levels(
    p_value: float, excess: float, held: float, verdict: str
) -> None:
    statistics = {"p_value": p_value, "excess": excess, "captured": held, "kept": held}
    labels = np.full(16, HUB), np.arange(64) % 4, np.full(16, HUB)
    assert conditional._verdict(ChainPlan(CHAIN, labels, 4, active=1, statistics=statistics), 0.05) == verdict
    assert structural.verdict_of(statistics, 0.05) == verdict
    if verdict == "natural":
        less = {"captured": 0.9899, "kept": 0.9499}
        plan = ChainPlan(CHAIN, labels, 4, active=1, statistics=statistics | less)
        assert conditional._verdict(plan, 0.05) == structural.verdict_of(statistics | less, 0.05) == "inducible"


@pytest.mark.parametrize(
    ("chains", "whole"),
    [
        (("natural", "natural"), "natural"),
        (("natural", "none"), "inducible"),
        (("inducible", "none", "none"), "none"),
        (("none",), "none"),
    ],
)
def test_a_network_is_what_half_of_its_chains_are(chains: tuple[str, ...], whole: str, monkeypatch) -> None:
    assert structural.overall_verdict(chains) == whole
    said = iter(chains)
    monkeypatch.setattr(conditional, "_verdict", lambda plan, alpha: next(said))
    energy = np.random.default_rng(0).random((40, 8))
    named = [OperatorChain(str(n), (f"{n}.up", f"{n}.down"), ("relu",), (4, 8, 4)) for n in range(len(chains))]
    assert plan_conditional(named, {chain.name: energy for chain in named}, 2, keep=0.5).verdict == whole
