"""Partitions with equal and free sizes and a hub, against slow counts, planted structure and noise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch import nn

import gradloc
from gradloc.core.assignment import assign_balanced, by_moves
from gradloc.core.kept import kept_share, normalised
from gradloc.core.plan import HUB, BlockPlan, ChainPlan, OperatorChain
from gradloc.decompose import significance
from gradloc.decompose.hub import spread_units
from gradloc.decompose.partition import Partition, partition_chain, spectral_axes
from gradloc.decompose.significance import Try, shuffle_null, shuffle_nulls, shuffled
from gradloc.decompose.structural import plan_structural, random_partition
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError
from tests.oracles import partition as oracle
from tests.oracles import shuffles as shuffle_oracle

CHAIN = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 64, 16))


def planted(
    seed: int, sizes: list[list[int]], hubs: tuple[int, ...] = (), noise: float = 0.05
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Evidence of a chain whose layer l has blocks of ``sizes[l]`` and ``hubs[l]`` units in all of them."""
    random = np.random.default_rng(seed)
    hubs = hubs or (0,) * len(sizes)
    labels = [
        random.permutation(np.concatenate([np.repeat(np.arange(len(s)), s), np.full(h, HUB)])).astype(np.int64)
        for s, h in zip(sizes, hubs, strict=True)
    ]
    evidence = []
    for into, out in pairwise(labels):
        inside = (out[:, None] == into[None, :]) | (out[:, None] == HUB) | (into[None, :] == HUB)
        evidence.append(random.gamma(2.0, size=inside.shape) * np.where(inside, 1.0, noise**2))
    return evidence, labels


LABELS = st.lists(st.integers(-2, 3), min_size=1, max_size=7)


@settings(deadline=None, max_examples=40)
@given(LABELS, st.lists(st.integers(-1, 3), min_size=1, max_size=7), LABELS, st.integers(0, 1000))
def test_kept_evidence_agrees_with_a_count(a: list[int], b: list[int], c: list[int], seed: int) -> None:
    labels = [np.array(layer) for layer in (a, b, c)]
    random = np.random.default_rng(seed)
    evidence = [random.random((len(out), len(into))) + 0.01 for into, out in pairwise(labels)]
    expected = oracle.kept(evidence, labels)
    assert kept_share(normalised(evidence), labels) == pytest.approx(expected, abs=1e-12)
    # A plan's masks keep the same.
    chain = OperatorChain("c", ("x", "y"), ("relu",), tuple(len(layer) for layer in labels))
    plan = ChainPlan(chain, tuple(labels), blocks=4)
    masked = [e[plan.operator_mask(n)].sum() / e.sum() for n, e in enumerate(evidence)]
    assert np.mean(masked) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(["equal", "free"]), st.integers(2, 4))
def test_a_partition_says_what_it_holds(seed: int, sizes: str, blocks: int) -> None:
    random = np.random.default_rng(seed)
    evidence = [random.exponential(size=(9, 6)), random.exponential(size=(5, 9))]
    found = partition_chain(evidence, blocks, sizes=sizes, seed=seed)  # type: ignore[arg-type]
    assert found.excess == pytest.approx(oracle.excess(evidence, list(found.labels)), abs=1e-9)
    assert found.kept == pytest.approx(oracle.kept(evidence, list(found.labels)), abs=1e-9)
    assert found.blocks <= blocks
    if sizes == "equal":
        for layer in found.labels:
            counts = np.bincount(layer, minlength=blocks)
            assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(0, 10_000),
    st.sampled_from(["reals", "few values", "heavy", "alike"]),
)
def test_units_are_moved_to_the_best_balanced_blocks(blocks: int, units: int, seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    gain = {
        "reals": lambda: random.normal(size=(units, blocks)),
        "few values": lambda: random.integers(0, 3, (units, blocks)).astype(float),
        "heavy": lambda: random.pareto(0.5, (units, 1)) * random.normal(size=(units, blocks)),
        "alike": lambda: np.repeat(random.normal(size=(1, blocks)), units, axis=0),
    }[kind]()
    sizes = np.bincount(random.integers(0, blocks, units), minlength=blocks)  # some may be empty
    labels = by_moves(gain, sizes)
    np.testing.assert_array_equal(np.bincount(labels, minlength=blocks), sizes)
    best = oracle.best_gain(gain, sizes)
    assert gain[np.arange(units), labels].sum() == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(gain).max() * units)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_gains_that_are_not_finite_are_refused(wrong: float) -> None:
    gain = np.zeros((200, 4))
    gain[3, 1] = wrong
    with pytest.raises(ValueError, match="gains must be finite"):
        by_moves(gain, np.full(4, 50))
    with pytest.raises(ValueError, match="sum up to the units"):
        by_moves(np.zeros((200, 4)), np.full(4, 49))


def test_wide_layers_get_the_best_blocks_too() -> None:
    gain = np.random.default_rng(0).pareto(2, (1500, 6))
    labels = assign_balanced(gain)
    np.testing.assert_array_equal(np.bincount(labels), 250)
    assert gain[np.arange(1500), labels].sum() == pytest.approx(oracle.best_gain(gain, np.full(6, 250)))


def test_small_free_partitions_are_nearly_always_the_best_of_all() -> None:
    """The search is a local one: it may end beside the best, seldom and never far from it."""
    short = []
    for seed in range(200, 240):
        evidence = np.random.default_rng(seed).exponential(size=(3, 4))
        best = oracle.best_excess(evidence, 2)
        found = partition_chain([evidence], 2, sizes="free", restarts=30, seed=seed).excess
        assert found <= best + 1e-9
        short.append(1 - found / best)
    assert sum(gap > 1e-9 for gap in short) <= 3, short
    assert max(short) < 0.1, short


@pytest.mark.parametrize("seed", range(4))
def test_unequal_blocks_are_found(seed: int) -> None:
    evidence, labels = planted(seed, [[4, 6, 8, 14], [12, 20, 8, 24], [3, 5, 9, 15]])
    found = partition_chain(evidence, 4, sizes="free", seed=seed)
    assert [adjusted_rand_score(a, b) for a, b in zip(found.labels, labels, strict=True)] == [1.0, 1.0, 1.0]
    joint = np.concatenate(found.labels), np.concatenate(labels)
    assert adjusted_rand_score(*joint) == 1.0
    equal = partition_chain(evidence, 4, seed=seed)
    assert equal.kept < found.kept


@pytest.mark.parametrize("sizes", ["equal", "free"])
@pytest.mark.parametrize("seed", range(3))
def test_a_hub_is_found_and_nothing_else_goes_there(seed: int, sizes: str) -> None:
    evidence, labels = planted(seed, [[7] * 4, [16] * 4, [8] * 4], hubs=(4, 0, 3))
    found = partition_chain(evidence, 4, sizes=sizes, hub=0.25, seed=seed)  # type: ignore[arg-type]
    for layer, truth in zip(found.labels, labels, strict=True):
        np.testing.assert_array_equal(layer == HUB, truth == HUB)
    assert adjusted_rand_score(np.concatenate(found.labels), np.concatenate(labels)) == 1.0
    assert found.kept > partition_chain(evidence, 4, sizes=sizes, seed=seed).kept  # type: ignore[arg-type]
    none, _ = planted(seed, [[8] * 4, [16] * 4])
    assert not any((layer == HUB).any() for layer in partition_chain(none, 4, hub=0.25, seed=seed).labels)


def test_the_hub_stays_within_its_share() -> None:
    evidence, _ = planted(0, [[5] * 4, [16] * 4], hubs=(12, 0))
    found = partition_chain(evidence, 4, sizes="free", hub=0.1)
    assert 0 < (found.labels[0] == HUB).sum() <= 3
    # Where all are spread there are no blocks, and so no exceptions to them.
    flat = np.random.default_rng(0).exponential(size=(64, 32))
    halves = [np.arange(32) % 4, np.arange(64) % 4]
    assert not any(units.any() for units in spread_units([flat], halves, 0.5))


def test_tied_ends_share_blocks_and_hub() -> None:
    random = np.random.default_rng(1)
    stream = random.permutation(np.concatenate([np.repeat(np.arange(3), 6), [HUB, HUB]]))
    hidden = np.repeat(np.arange(3), 10)
    inside = (hidden[:, None] == stream) | (stream[None, :] == HUB)
    evidence = [random.gamma(2.0, size=m.shape) * np.where(m, 1.0, 0.01) for m in (inside, inside.T)]
    found = partition_chain(evidence, 3, sizes="free", hub=0.2, tied_ends=True)
    np.testing.assert_array_equal(found.labels[0], found.labels[2])
    assert adjusted_rand_score(found.labels[0], stream) == 1.0
    # Either operator may say alone which units of the stream belong together.
    flat, own = [random.gamma(9.0, size=one.shape) for one in evidence], stream != HUB
    for alone in ([evidence[0], flat[1]], [flat[0], evidence[1]]):
        found = partition_chain(alone, 3, sizes="free", tied_ends=True)
        assert adjusted_rand_score(found.labels[0][own], stream[own]) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_blocks_is_found(seed: int) -> None:
    evidence, labels = planted(seed, [[8, 16, 24], [32, 20, 44]], noise=0.1)
    chain = OperatorChain("one", ("w",), (), (48, 96))
    plan = plan_structural([chain], {"w.weight": evidence[0]}, sizes="free", seed=seed)
    assert plan.chains[0].blocks == 3
    assert adjusted_rand_score(plan.chains[0].labels[1], labels[1]) == 1.0
    assert plan.verdict == "natural"
    statistics = plan.chains[0].statistics
    assert statistics["p_value"] == 0.05
    assert statistics["kept"] - statistics["chance"] == pytest.approx(statistics["excess"])
    assert statistics["cost"] == pytest.approx(1 - statistics["kept"])


def test_choosing_the_number_of_blocks_does_not_make_noise_significant() -> None:
    """Trying many numbers and keeping the best would give p ≤ .2 to far more than a fifth of the noise."""
    p_values = []
    for seed in range(30):
        noise = np.random.default_rng(seed).exponential(size=(24, 12))
        found = shuffle_nulls([noise], {n: Try(n) for n in (2, 4, 6)}, shuffles=9, seed=seed)
        p_values.append(min(null.p_value for null in found.values()))  # whichever looks best
    assert np.mean(np.array(p_values) <= 0.2) <= 0.2 + 3 * np.sqrt(0.16 / 30)
    assert np.mean(np.array(p_values) <= 0.1) <= 0.1 + 3 * np.sqrt(0.09 / 30)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("strength", [1.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_nulls_are_those_of_plain_counts(seed: int, strength: float, scaled: bool) -> None:
    """Of evidence whose units have scales of their own the plain shuffle finds less, of other evidence the one that keeps scales may."""
    random = np.random.default_rng(seed)
    inside = np.equal.outer(np.arange(9) % 3, np.arange(8) % 3)
    evidence = [random.exponential(size=(9, 8)) * np.where(inside, strength, 1.0)]
    evidence[0] *= random.pareto(3, (9, 1)) if scaled else 1.0
    tries = {2: Try(2), "free": Try(3, options={"sizes": "free"}), "hub": Try(3, options={"hub": 0.25})}
    found = shuffle_nulls(evidence, tries, shuffles=7, seed=seed)
    draws = np.random.default_rng(seed)
    shares = normalised(evidence)

    def look(of: list[np.ndarray], own_seed: int) -> dict[object, tuple[float, float]]:
        axes = spectral_axes(of, 3, starts=2)
        how = {"restarts": 2, "sweeps": 6, "axes": axes, "seed": own_seed}
        held = {key: partition_chain(of, one.blocks, **how, **one.options) for key, one in tries.items()}
        return {key: (one.excess, one.kept) for key, one in held.items()}

    observed = look(shares, seed)
    expected = shuffle_oracle.nulls(
        observed, lambda scales, n: look([shuffled(s, draws, scales=scales) for s in shares], seed + 1 + n), 7
    )
    for key, null in found.items():
        assert (null.observed, null.kept) == observed[key]
        of_null = (null.mean, null.p_value, null.kept_mean, null.kept_deviation)
        assert of_null == pytest.approx(expected[key])
        assert (null.excess, null.kept_excess) == (null.observed - null.mean, null.kept - null.kept_mean)


def test_noise_is_claimed_to_have_blocks_no_more_often_than_the_level() -> None:
    """The whole plan, its number of blocks chosen; every second noise has units of unequal scales."""
    chain = OperatorChain("ffn", ("up", "down"), ("relu",), (6, 16, 6))
    claimed = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        shapes = {"up.weight": (16, 6), "down.weight": (6, 16)}
        evidence = {name: random.exponential(size=shape) for name, shape in shapes.items()}
        if seed % 2:
            evidence = {n: e * np.outer(*(random.pareto(3, k) + 0.2 for k in e.shape)) for n, e in evidence.items()}
        claimed += plan_structural([chain], evidence, seed=seed).verdict != "none"
    assert claimed / 100 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_shared_axes_change_nothing() -> None:
    """A search with the singular vectors of more blocks than it looks for is the search with its own."""
    random = np.random.default_rng(0)
    for shape in ((40, 24), (9, 3)):
        evidence = [random.exponential(size=shape)]
        axes = spectral_axes(evidence, 3 if shape[1] == 3 else 8)
        for blocks in (2, 3):
            own, shared = (partition_chain(evidence, blocks, restarts=2, axes=a) for a in (None, axes))
            for one, other in zip(own.labels, shared.labels, strict=True):
                np.testing.assert_array_equal(one, other)
            assert own.excess == shared.excess


def test_shuffles_keep_what_they_say() -> None:
    random = np.random.default_rng(0)
    share = normalised(
        [np.outer(random.pareto(3, 30) + 0.2, random.pareto(3, 20) + 0.2) * random.exponential(size=(30, 20))]
    )[0]
    plain = shuffled(share, random, scales=False)
    np.testing.assert_allclose(np.sort(plain.ravel()), np.sort(share.ravel()))
    scaled = np.sqrt(shuffled(share, random, scales=True))
    ratios = scaled / (np.outer(np.sqrt(share).sum(1), np.sqrt(share).sum(0)) / np.sqrt(share).sum())
    np.testing.assert_allclose(np.sort(ratios.ravel()), shuffle_oracle.spread_ratios(share), atol=1e-12)
    kept = np.mean([np.sqrt(shuffled(share, random, scales=True)).sum(1) for _ in range(200)], axis=0)
    assert np.corrcoef(kept, np.sqrt(share).sum(1))[0, 1] > 0.98


@pytest.mark.parametrize("scales", [True, False])
def test_shuffles_leave_units_without_evidence_alone(scales: bool) -> None:
    random = np.random.default_rng(0)
    evidence = random.exponential(size=(9, 7))
    evidence[[1, 4]], evidence[:, [0, 6]] = 0.0, 0.0
    found = shuffled(evidence, np.random.default_rng(1), scales=scales)
    for axis in (0, 1):
        assert np.array_equal(found.any(axis), evidence.any(axis))
    whole = evidence[np.ix_(evidence.any(1), evidence.any(0))]
    assert np.array_equal(
        found[found.any(1)][:, found.any(0)], shuffled(whole, np.random.default_rng(1), scales=scales)
    )


def test_blocks_are_seen_beside_inputs_that_are_always_zero() -> None:
    """A third of the inputs made blocks invisible that every test without those inputs finds; noise is claimed no more often."""
    blocks = 1 + 3 * np.kron(np.eye(4), np.ones((8, 8)))
    found = []
    for strength in (blocks, np.ones_like(blocks)):
        evidence = [np.random.default_rng(seed).exponential(size=(32, 32)) * strength for seed in range(8)]
        padded = [np.pad(one, ((0, 0), (0, 16))) for one in evidence]
        found.append([shuffle_null([one], 4, seed=seed).p_value <= 0.05 for seed, one in enumerate(padded)])
    assert all(found[0])
    assert sum(found[1]) <= 2


def test_evidence_in_few_units_is_no_evidence_of_none() -> None:
    """Its only dependency was shuffled to where nothing can be, and the operator called never trained."""
    assert shuffle_null([np.pad(np.ones((1, 1)), ((0, 7), (0, 7)))], 2).p_value == 1.0


@pytest.mark.parametrize("scale", [1e-50, 1e-290, 1e50, 1e290])
def test_evidence_of_any_size_is_evidence(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a wide operator was narrowed before it was divided: below 1e-45 it was "never trained", above 3e38 "diverged"."""
    monkeypatch.setattr("gradloc.core.kept.WIDE", 64)
    evidence = np.random.default_rng(0).exponential(size=(8, 8))
    expected, found = normalised([evidence])[0], normalised([evidence * scale])[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_wide_layers_are_tested_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "TESTED_UNITS", 256)  # for its time: nothing else changes with the number
    random = np.random.default_rng(0)
    wide = 300
    labels = random.permutation(np.arange(wide) % 4), np.arange(24) % 4
    evidence = random.exponential(size=(24, wide)) * np.where(labels[1][:, None] == labels[0], 3, 1)
    found = shuffle_null([evidence], 4, shuffles=19, restarts=1)
    assert found.p_value == 0.05
    noise = shuffle_null([random.exponential(size=(24, wide))], 4, shuffles=19, restarts=1)
    assert noise.excess < 0.1 * found.excess


def test_a_part_of_wide_layers_is_of_the_same_units_at_tied_ends_and_never_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(significance, "TESTED_UNITS", 4)
    seen: list[list[np.ndarray]] = []

    def search(of: list[np.ndarray], blocks: int, **how: object) -> Partition:
        seen.append(of)
        return partition_chain(of, blocks, **how)  # type: ignore[arg-type]

    up = np.random.default_rng(0).exponential(size=(6, 40))
    shuffle_nulls([up, up.T], {2: Try(2, search, {"tied_ends": True})}, shuffles=1)
    assert seen[0][0].shape == (6, 8), "four units a block, where that is more"
    np.testing.assert_allclose(seen[0][0], seen[0][1].T)
    seen.clear()
    up[:, np.arange(40) != 5] = 0.0  # of which the part would have nothing
    shuffle_nulls([up], {2: Try(2, search)}, shuffles=1)
    assert seen[0][0].shape == (6, 40)


def test_plans_with_a_hub_are_saved_masked_and_routed(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    evidence, labels = planted(0, [[7] * 4, [16] * 4, [8] * 4], hubs=(4, 0, 0))
    chain = OperatorChain("", ("0", "2"), ("relu",), (32, 64, 32))
    plan = plan_structural([chain], {"0.weight": evidence[0], "2.weight": evidence[1]}, 4, sizes="free", hub=0.25)
    assert plan.chains[0].statistics["hub_units"] == 4
    again = BlockPlan.load(plan.save(tmp_path / "p.safetensors"))
    hub = again.labels("0.weight")[1] == HUB
    np.testing.assert_array_equal(hub, labels[0] == HUB)
    assert again.masks.array("0.weight")[:, hub].all()
    fast, x = gradloc.route_model(model, plan), torch.randn(5, 32)
    again.masks.apply(model)
    torch.testing.assert_close(fast(x), model(x))
    control = random_partition(plan)
    assert (control.labels("0.weight")[1] == HUB).sum() == 4
    density = np.mean([control.masks.array(name).mean() for name in ("0.weight", "2.weight")])
    assert control.chains[0].statistics["kept"] == pytest.approx(density)


def test_a_plan_with_hubs_at_both_ends_has_no_more_than_all_weights() -> None:
    """Conditional plans with units that always run counted them once for every block."""
    ends = np.full(16, HUB)
    hidden = np.append(np.repeat(np.arange(4), 14), np.full(8, HUB))
    assert ChainPlan(CHAIN, (ends, hidden, ends), 4, active=1).density == 1.0


def test_bad_input_is_refused_by_name() -> None:
    ones = np.ones((8, 6))
    with pytest.raises(ConfigError, match="blocks=7 must be between 2 and 6"):
        partition_chain([ones], 7)
    with pytest.raises(ConfigError, match=r"^a layer of a single unit can't be cut into blocks\.$"):
        partition_chain([np.ones((4, 1))], 2)  # as convolutions of grey images have
    with pytest.raises(ConfigError, match=r"sizes='even'.*hub=0.9.*blocks=1 "):
        partition_chain([ones], 1, sizes="even", hub=0.9)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="6 and 8"):
        partition_chain([ones], 2, tied_ends=True)
    with pytest.raises(ConfigError, match="evidence is empty"):
        partition_chain([], 2)
    with pytest.raises(ConfigError, match="don't follow"):
        partition_chain([ones, ones], 2)
    with pytest.raises(ConfigError, match=r"operator 0 has shape \(8,\)"):
        partition_chain([np.ones(8)], 2)
    with pytest.raises(ConfigError, match="down to -1"):
        partition_chain([-ones], 2)
    for bad in (np.nan, np.inf, -np.inf):
        broken = ones.copy()
        broken[0, 0] = bad
        with pytest.raises(NonFiniteError, match="operator 0"):
            partition_chain([broken], 2)
    with pytest.raises(EmptyRunError, match="all zero"):
        partition_chain([np.zeros((8, 6))], 2)
    good = {"up.weight": np.ones((64, 16)), "down.weight": np.ones((16, 64))}
    with pytest.raises(ModelMismatchError, match=r"up.weight: evidence of shape \(63, 16\)"):
        plan_structural([CHAIN], good | {"up.weight": np.ones((63, 16))}, 2)
    with pytest.raises(ConfigError, match="shuffles=0"):
        plan_structural([CHAIN], good, 2, shuffles=0)
    masks = gradloc.MaskSet({"up.weight": np.ones((64, 15), bool), "down.weight": np.ones((16, 64), bool)})
    with pytest.raises(ModelMismatchError, match=r"up.weight: the mask has shape \(64, 15\)"):
        plan_structural([CHAIN], good, 2, masks=masks)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    nothing = gradloc.MaskSet({"0.weight": np.zeros((8, 4), bool), "2.weight": np.ones((4, 8), bool)})
    with pytest.raises(ConfigError, match=r"keep nothing of 0\.weight"):
        gradloc.plan_blocks(model, nothing)
