"""Structure that was planted is found; where there is none, none is claimed."""

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
from gradloc.core.masks import MaskSet
from gradloc.core.plan import OperatorChain
from gradloc.decompose.conditional import plan_conditional, random_clusters
from gradloc.decompose.graph import components
from gradloc.decompose.partition import partition_chain
from gradloc.decompose.significance import shuffle_null
from gradloc.decompose.structural import plan_structural, random_partition
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError

CHAIN = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 64, 16))


def slow_components(mask: np.ndarray) -> set[frozenset[int]]:
    """Connected components by plain search; inputs are numbered first, then outputs."""
    outputs, inputs = mask.shape
    edges = {node: set() for node in range(inputs + outputs)}
    for o, i in np.argwhere(mask):
        edges[i].add(inputs + o)
        edges[inputs + o].add(i)
    found, left = set(), set(edges)
    while left:
        queue, seen = [left.pop()], set()
        while queue:
            node = queue.pop()
            seen.add(node)
            queue += [n for n in edges[node] if n not in seen]
        left -= seen
        if len(seen) > 1:
            found.add(frozenset(int(n) for n in seen))
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.5), st.integers(0, 1000))
def test_components_equal_a_plain_search(outputs: int, inputs: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((outputs, inputs)) < density
    labels = np.concatenate(components([mask]))
    found = {frozenset(np.flatnonzero(labels == b).tolist()) for b in range(labels.max(initial=-1) + 1)}
    assert found == slow_components(mask)


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_a_planted_partition_is_recovered(blocks: int) -> None:
    random = np.random.default_rng(blocks)
    planted = [random.permutation(np.arange(n) % blocks) for n in (32, 64, 32)]
    evidence = [
        random.exponential(size=(len(out), len(into))) * np.where(out[:, None] == into[None, :], 4.0, 1.0)
        for into, out in pairwise(planted)
    ]
    found = partition_chain(evidence, blocks)
    assert [adjusted_rand_score(a, b) for a, b in zip(found.labels, planted, strict=True)] == [1.0, 1.0, 1.0]


def test_noise_and_unequal_scales_are_no_structure() -> None:
    verdicts = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        evidence = {
            name: np.outer(random.pareto(2, o) + 0.1, random.pareto(2, i) + 0.1) * random.exponential(size=(o, i))
            for name, o, i in (("up.weight", 64, 16), ("down.weight", 16, 64))
        }
        verdicts.append(plan_structural([CHAIN], evidence, 4, seed=seed).verdict)
    assert verdicts.count("none") >= 5


def test_noise_gets_no_smaller_p_values_than_it_should() -> None:
    found = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        evidence = [
            np.outer(random.pareto(3, o) + 0.2, random.pareto(3, i) + 0.2) * random.exponential(size=(o, i))
            for o, i in ((64, 16), (16, 64))
        ]
        found.append(shuffle_null(evidence, 4, seed=seed + 1000).p_value)
    p_values = np.array(found)
    # Three standard errors of a share over 60 seeds.
    assert (p_values <= 0.5).mean() < 0.5 + 3 * np.sqrt(0.25 / 60)
    assert (p_values <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


def test_real_evidence_is_searched_no_longer_than_its_shuffles() -> None:
    """Noise, where more restarts do find more: the null must compare what as many restarts find."""
    gained = 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        evidence = [random.exponential(size=shape) for shape in ((64, 16), (16, 64))]
        short, long = (partition_chain(evidence, 4, restarts=n, seed=seed).excess for n in (2, 8))
        assert shuffle_null(evidence, 4, shuffles=1, restarts=2, seed=seed).observed == pytest.approx(short)
        gained += long > short
    assert gained


def test_a_student_of_four_networks_is_taken_apart_exactly(tmp_path: Path) -> None:
    """The teacher is four independent networks over permuted inputs; the student is dense and recorded."""
    torch.manual_seed(0)
    inputs, hidden, groups = 16, 32, 4
    order = torch.randperm(inputs)
    label = np.empty(inputs, int)
    label[order.numpy()] = np.arange(inputs) // (inputs // groups)
    teachers = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(groups)]
    for teacher in teachers:
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.8)
    student = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, inputs))
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0.05)
    gradloc.wrap(
        optimizer, student, run=tmp_path / "r", every=1, granularity="element", flush_every=200, events=("gradient!=0",)
    )
    for _ in range(1500):
        x = torch.randn(128, inputs)
        with torch.no_grad():
            y = torch.empty_like(x)
            for group, teacher in enumerate(teachers):
                part = order[group * 4 : group * 4 + 4]
                y[:, part] = teacher(x[:, part])
        optimizer.zero_grad()
        nn.functional.mse_loss(student(x), y).backward()
        optimizer.step()
    gradloc.recorder_of(optimizer).close()
    plan = gradloc.plan_blocks(student, gradloc.load_run(tmp_path / "r"), blocks=4)
    out_labels, in_labels = plan.labels("0.weight")
    assert adjusted_rand_score(in_labels, label) == 1.0
    assert adjusted_rand_score(plan.labels("2.weight")[0], label) == 1.0
    assert plan.verdict in ("natural", "inducible")
    assert len(out_labels) == hidden


def test_units_that_fire_together_are_clustered() -> None:
    random = np.random.default_rng(0)
    planted = random.permutation(np.arange(64) % 8)
    on = random.random((800, 8)) < 0.2
    fires = random.random((800, 64)) < np.where(on[:, planted], 0.6, 0.03)
    energy = (random.exponential(size=fires.shape) * fires).astype(np.float32)
    plan = plan_conditional([CHAIN], {"ffn": energy}, blocks=8, keep=0.25)
    assert adjusted_rand_score(plan.chains[0].labels[1], planted) == 1.0
    assert plan.verdict == "inducible"
    assert plan.chains[0].active == 2
    control = random_clusters(plan, seed=1).chains[0].labels[1]
    np.testing.assert_array_equal(np.bincount(control), np.bincount(plan.chains[0].labels[1]))
    shuffled = np.stack([random.permutation(column) for column in energy.T], axis=1)
    assert plan_conditional([CHAIN], {"ffn": shuffled}, blocks=8).chains[0].statistics["excess"] < 0.02
    strict = plan_conditional([CHAIN], {"ffn": energy}, blocks=8, alpha=0.01)
    assert (strict.verdict, strict.description["controls"]) == ("inducible", 99)
    assert strict.chains[0].statistics["p_value"] <= 0.01


def test_exact_components_heed_that_ends_are_one_stream() -> None:
    """Blocks that read half of a stream and write the other half feed one another: they are no blocks of it."""
    chain = OperatorChain("ffn", ("up", "down"), ("relu",), (8, 16, 8))
    halves = np.kron(np.eye(2), np.ones((8, 4))).astype(bool)
    for swapped in (False, True):
        kept = {"up.weight": halves, "down.weight": np.roll(halves.T, 4 * swapped, axis=0)}
        evidence = {name: mask.astype(float) for name, mask in kept.items()}
        for form in ("mixed", "disjoint"):
            plan = plan_structural([chain], evidence, 2, form=form, masks=MaskSet(kept))
            exact = plan.chains[0].statistics.get("exact", 0.0)
            assert exact == (not swapped or form == "mixed")
            into, _, out = plan.chains[0].labels
            assert np.array_equal(into, out) == (not swapped or form == "disjoint")
    wider = OperatorChain("ffn", ("up", "down"), ("relu",), (8, 16, 4))
    kept = {"up.weight": halves, "down.weight": halves.T[::2]}
    with pytest.raises(ConfigError, match="as many inputs as outputs"):
        plan_structural([wider], kept, 2, form="disjoint", masks=MaskSet(kept))


@pytest.mark.parametrize(("hidden", "ends"), [(12, 6), (15, 7)])
def test_exact_components_are_none_where_one_is_next_to_all(hidden: int, ends: int) -> None:
    """A stray unit in a component of its own was called a natural decomposition. What components keep by chance is their share of dependencies."""
    chain = OperatorChain("ffn", ("up", "down"), ("relu",), (8, 16, 8))
    apart = np.arange(16)[:, None] // hidden == np.arange(8) // ends
    kept = {"up.weight": apart, "down.weight": apart.T}
    plan = plan_structural([chain], {name: np.ones(mask.shape) for name, mask in kept.items()}, masks=MaskSet(kept))
    statistics = plan.chains[0].statistics
    if hidden == 12:
        assert plan.verdict == "natural"
        assert statistics["chance"] == pytest.approx(apart.mean())
        assert statistics["excess"] == pytest.approx(0.0)
    else:
        assert plan.verdict == "none"
        assert "exact" not in statistics


def test_tokens_for_which_nothing_fired_say_nothing() -> None:
    """Of nothing but those, every share was NaN, p .05, and the verdict inducible."""
    energy = np.zeros((64, 64), np.float32)
    energy[:31] = np.random.default_rng(0).random((31, 64))
    for firings, said in (
        (np.zeros((64, 64)), "0 sampled tokens and 64 for which"),
        (energy, "31 sampled tokens and 33"),
    ):
        with pytest.raises(EmptyRunError, match=said):
            plan_conditional([CHAIN], {"ffn": firings}, 8)


def test_auto_takes_fewer_blocks_where_there_are_fewer_units() -> None:
    narrow = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 12, 16))
    energy = np.random.default_rng(0).random((64, 12))
    for cost in (None, lambda chain, blocks, active: 1.0):
        assert plan_conditional([narrow], {"ffn": energy}, "auto", cost=cost).chains[0].blocks == 12
    with pytest.raises(ConfigError, match="blocks=16 is more than the hidden units of ffn"):
        plan_conditional([narrow], {"ffn": energy}, 16)
    single = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 1, 16))
    with pytest.raises(ConfigError, match="blocks=2 is more than"):
        plan_conditional([single], {"ffn": energy[:, :1]}, "auto")


def test_a_share_that_is_all_blocks_or_none_is_refused() -> None:
    """Of all blocks no test against random ones can be made, and less than a block can't run. Shares that the message names are taken."""
    energy = np.random.default_rng(0).random((64, 64)) * (np.random.default_rng(1).random((64, 64)) < 0.5)
    for keep, wrong, instead in (
        (0.9, "all of 4 blocks", 10),
        (0.1, "half of one of 4 blocks or less", 10),
        (0.06, "half of one of 4 blocks or less", 17),
    ):
        with pytest.raises(ConfigError, match=wrong) as raised:
            plan_conditional([CHAIN], {"ffn": energy}, 4, keep=keep)
        assert f"with blocks=4 it can be 0.25, 0.5, 0.75, or as it is with blocks={instead}." in str(raised.value)
        chain = plan_conditional([CHAIN], {"ffn": energy}, instead, keep=keep).chains[0]
        assert chain.active == round(keep * instead)
    for keep, active in ((0.25, 1), (0.5, 2), (0.75, 3), (0.15, 1), (0.85, 3)):
        plan = plan_conditional([CHAIN], {"ffn": energy}, 4, keep=keep)
        assert plan.chains[0].active == active
    # A number that is looked for is one of which some run, and not all.
    for keep, blocks in ((0.03, 32), (0.95, 16)):
        (chain,) = plan_conditional([CHAIN], {"ffn": energy}, "auto", keep=keep, cost=lambda *_: 1.0).chains
        assert chain.blocks == blocks
        assert 1 <= chain.active < chain.blocks
    with pytest.raises(ConfigError, match="all of 16 blocks"):
        plan_conditional([CHAIN], {"ffn": energy}, "auto", keep=0.99, cost=lambda *_: 1.0)


def test_a_random_partition_keeps_block_sizes() -> None:
    evidence = {"up.weight": np.ones((64, 16)) + np.eye(64, 16), "down.weight": np.ones((16, 64))}
    plan = plan_structural([CHAIN], evidence, 4)
    for one, other in zip(plan.chains[0].labels, random_partition(plan).chains[0].labels, strict=True):
        np.testing.assert_array_equal(np.bincount(one), np.bincount(other))
    into, _, out = random_partition(plan_structural([CHAIN], evidence, 4, form="disjoint")).chains[0].labels
    np.testing.assert_array_equal(into, out)


def test_refusals() -> None:
    ones = {"up.weight": np.ones((64, 16)), "down.weight": np.ones((16, 64))}
    with pytest.raises(ConfigError, match="blocks=1 "):
        plan_structural([CHAIN], ones, 1)
    with pytest.raises(ConfigError, match="between 2 and 16"):
        plan_structural([CHAIN], ones, 17)
    with pytest.raises(NonFiniteError):
        plan_structural([CHAIN], ones | {"up.weight": np.full((64, 16), np.nan)}, 2)
    with pytest.raises(EmptyRunError, match="never trained"):
        plan_structural([CHAIN], ones | {"up.weight": np.zeros((64, 16))}, 2)
    with pytest.raises(EmptyRunError, match="firings=True"):
        plan_conditional([CHAIN], {}, 8)
    fired = np.random.default_rng(0).random((64, 64))
    with pytest.raises(ModelMismatchError, match="firings of 63 units, it has 64"):
        plan_conditional([CHAIN], {"ffn": fired[:, 1:]}, 8)
    with pytest.raises(NonFiniteError, match="diverged"):
        plan_conditional([CHAIN], {"ffn": np.where(fired == fired.max(), np.nan, fired)}, 8)
    with pytest.raises(ConfigError, match="alpha=5"):
        plan_conditional([CHAIN], {"ffn": fired}, 8, alpha=5)
