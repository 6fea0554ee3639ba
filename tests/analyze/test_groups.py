"""What is decided together, against plain loops; and that what goes can really go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import gradloc
from gradloc import errors
from gradloc.analyze.selection import highest
from gradloc.analyze.support import joint_tests
from gradloc.core.groups import DependencyGroup, best_of_each, residual_groups, unit_groups
from gradloc.core.layout import DependencyLayout
from gradloc.core.plan import OperatorChain
from gradloc.core.standard_layouts import plain_layout
from tests.oracles.groups import group_members, kept_by_group

# These runs are too short for their tests to bear masks; what is decided is looked at here, not whether it is right.
pytestmark = pytest.mark.filterwarnings("ignore::gradloc.errors.WeakEvidenceWarning")

UP, DOWN = "ffn.up.weight", "ffn.down.weight"


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(2, 5), st.data())
def test_n_of_m_keeps_the_best_of_every_group(out: int, into: int, channels: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    grid = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 4, (out, into, channels)).astype(float)
    kept = best_of_each(grid, n, m)
    for o, c in np.ndindex(out, channels):
        for begin in range(0, into, m):
            values = grid[o, begin : begin + m, c].tolist()
            wanted = n if len(values) == m else -(-n * len(values) // m)
            best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:wanted]
            assert np.flatnonzero(kept[o, begin : begin + m, c]).tolist() == sorted(best)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=30), st.floats(0.05, 1))
def test_a_share_of_weights_is_kept_where_sizes_differ(items: list[tuple[float, int]], density: float) -> None:
    scores, sizes = np.array([s for s, _ in items]), np.array([n for _, n in items])
    kept = highest(scores, density, sizes)
    assert kept.any()
    if not kept.all():
        assert scores[kept].min() >= scores[~kept].max()
    assert abs(sizes[kept].sum() - density * sizes.sum()) <= max(sizes.max(), sizes[np.argmax(scores)])


@pytest.mark.parametrize("granularity", ["dependency", "element", "tile", "row", "column", "unit"])
@pytest.mark.parametrize("criterion", ["saliency", "magnitude"])
def test_masks_equal_a_loop_over_what_is_decided_at_once(recorded, granularity: str, criterion: str) -> None:
    """All parameters with inputs, the convolution among them; each decision's mean score, highest first."""
    *_, path = recorded(granularity="element")
    run = gradloc.load_run(path)
    masks = gradloc.find_masks(run, criterion, density=0.4, granularity=granularity)
    last = run.weights("last")
    scores = {}
    for parameter in run.info.parameters:
        evidence, weight = run.evidence(parameter.name), last[parameter.name].astype(float)
        square = evidence.grad_sumsq / evidence.exposure / parameter.layout.channels  # one cell a dependency
        curvature = parameter.layout.ungrid(np.repeat(np.sqrt(square)[:, :, None], parameter.layout.channels, axis=2))
        scores[parameter.name] = np.abs(weight) if criterion == "magnitude" else weight**2 * curvature
    names = ["conv.weight", UP, DOWN, "head.weight"]
    groups = group_members(granularity, {name: scores[name] for name in names}, scores, {UP: DOWN})
    expected = kept_by_group(groups, scores, 0.4)
    assert set(masks) == set(expected)
    for name, keep in expected.items():
        np.testing.assert_array_equal(masks.array(name), keep, err_msg=name)


def test_units_that_go_change_nothing_when_they_are_cut_out(recorded) -> None:
    """A hidden unit's row, bias and column go together, so that the network without it computes the same."""
    model, _, path = recorded()
    masks = gradloc.find_masks(path, density=0.5, granularity="unit", include=[UP])
    assert set(masks) == {UP, "ffn.up.bias", DOWN}
    masks.apply(model)
    kept = masks["ffn.up.bias"]
    assert 0 < int(kept.sum()) < len(kept)
    ffn, x = model.ffn, torch.randn(7, 20)
    small = nn.Sequential(nn.Linear(20, int(kept.sum())), nn.ReLU(), nn.Linear(int(kept.sum()), 20))
    with torch.no_grad():
        small[0].weight.copy_(ffn.up.weight[kept])
        small[0].bias.copy_(ffn.up.bias[kept])
        small[2].weight.copy_(ffn.down.weight[:, kept])
        small[2].bias.copy_(ffn.down.bias)
        torch.testing.assert_close(small(x), ffn(x))


def test_two_of_four_by_the_public_way(recorded) -> None:
    *_, path = recorded()
    masks = gradloc.find_masks(path, granularity="2:4", include=[UP])
    groups = masks.array(UP).reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    with pytest.raises(errors.ConfigError, match="leave density= and budget= out"):
        gradloc.find_masks(path, density=0.5, granularity="2:4")
    with pytest.raises(errors.ConfigError, match="0 < n < m"):
        gradloc.find_masks(path, granularity="4:4")
    with pytest.raises(errors.ConfigError, match="can't be tested"):
        gradloc.find_masks(path, alpha=0.05, granularity="2:4")


def test_a_member_that_is_too_short_to_be_tested_has_no_say() -> None:
    """A bias of eight values has no scale of its own, and nothing was claimed of any unit that it belongs to."""
    layouts = {"weight": DependencyLayout((8, 16), (8, 16), "oc"), "bias": DependencyLayout((8,), (8,), "o")}
    group = DependencyGroup("units", layouts)
    z = np.random.default_rng(0).normal(size=(8, 16))
    z[0] = 5.0
    found = joint_tests(group, {"weight": z, "bias": np.full(8, np.nan)})
    np.testing.assert_allclose(found.difference[:, 0], stats.chi2.sf((z**2).sum(1), 16))
    assert (found.equivalence == 1).all()  # of what isn't known, nothing is negligible
    assert list(found.members) == ["weight", "bias"]
    nothing = joint_tests(group, {"weight": np.full((8, 16), np.nan), "bias": np.full(8, np.nan)})
    assert (nothing.difference == 1).all()


def test_residual_edges_are_tested_as_one_sequence(tmp_path) -> None:
    """Each pair of features: all channels of both weights, by the chi-square of their sum."""
    torch.manual_seed(0)
    d, hidden, up, down = 8, 24, "0.weight", "2.weight"
    model = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, granularity="element")
    for _ in range(400):
        x = torch.randn(16, d)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(tmp_path / "r")
    joint = gradloc.find_support(run, groups="residual")
    apart = gradloc.find_support(run)
    assert list(joint.tests) == [""]  # the chain is the model itself
    z = {name: test.statistic for name, test in apart.tests.items()}  # one channel each: signed, in standard deviations
    for i, j in [(0, 0), (3, 7), (7, 4)]:
        channels = [z[up][k * d + i, j] for k in range(3)] + [z[down][i, k * d + j] for k in range(3)]
        q = sum(value**2 for value in channels)
        assert joint.tests[""].difference[i, j] == pytest.approx(stats.chi2.sf(q, 6), rel=1e-9)
    masks = joint.masks(0.3, "aggressive")
    assert 0 < masks.density < 1
    of_up, of_down = masks.array(up).reshape(3, d, d), masks.array(down).reshape(d, 3, d)
    assert (of_up == of_up[:1]).all()
    assert (of_down == of_up[0][:, None, :]).all()
    assert joint.explain(up, (0, 0))["decided_with"] == [down]
    again = gradloc.Support.load(joint.save(tmp_path / "support.safetensors"))
    np.testing.assert_array_equal(again.masks(0.3, "aggressive").array(down), masks.array(down))
    at_density = gradloc.find_masks(run, density=0.3, groups="residual")
    assert (at_density.array(up).reshape(3, d, d) == at_density.array(up)[None, :d]).all()
    assert at_density.density == pytest.approx(0.3, abs=0.01)


def test_coarser_hypotheses(recorded) -> None:
    *_, path = recorded(granularity="element")
    support = gradloc.find_support(path)
    p, negligible = support.tests[UP].difference, support.tests[UP].equivalence
    rows = support.at("row").tests[UP]
    for row in range(len(p)):
        mean = np.mean([np.tan(np.pi * (0.5 - min(max(value, 1e-14), 1 - 1e-15))) for value in p[row]])
        assert rows.difference[row, 0] == pytest.approx(stats.cauchy.sf(mean), rel=1e-6)
        assert rows.equivalence[row, 0] == negligible[row].max()
    tiles = support.at("tile").tests[UP]
    assert tiles.equivalence[0, 1] == negligible[:16, 16:].max()
    units = support.at("unit").tests[UP]
    down = support.tests[DOWN].equivalence
    assert units.equivalence[3, 0] == max(negligible[3].max(), down[:, 3].max())
    masks = support.masks(0.3, "aggressive", granularity="row")
    assert {float(row.mean()) for row in masks.array(UP)} <= {0.0, 1.0}
    saved = gradloc.Support.load(support.at("unit").save(path / "units.safetensors"))
    np.testing.assert_array_equal(saved.tests[UP].difference, units.difference)
    with pytest.raises(errors.ConfigError, match="granularity='element'"):
        support.at("element")


def three_layers(path: Path) -> gradloc.Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    gradloc.wrap(optimizer, model, run=path, every=1, flush_every=4)
    for _ in range(12):
        x = torch.randn(8, 4)
        (model(x) - 2 * x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return gradloc.load_run(path)


MIDDLE = "2.weight"
"""Row units of the second hidden layer, column units of the first."""


def test_a_row_with_a_dead_input_is_found_as_one_without(tmp_path: Path) -> None:
    support = gradloc.find_support(three_layers(tmp_path / "r"))
    for test in support.tests.values():
        test.difference[...] = 1e-6
    support.tests[MIDDLE].difference[:, 0] = 1.0
    for granularity in ("row", "tile", "unit"):
        assert (support.at(granularity).tests[MIDDLE].difference < 1e-5).all()
    assert (support.at("column").tests[MIDDLE].difference[0, 1:] < 1e-5).all()


def test_residual_edges_are_those_of_what_was_chosen(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(x + self.a(x))

    def run_of(name: str, frozen: bool, absent: bool) -> gradloc.Run:
        torch.manual_seed(0)
        model = Two()
        model.a.requires_grad_(not frozen)
        optimizer = torch.optim.SGD((model.b if absent else model).parameters(), lr=0.1)
        gradloc.wrap(optimizer, model, run=tmp_path / name, every=1, flush_every=2)
        for _ in range(4):
            model(torch.randn(4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        return gradloc.load_run(tmp_path / name)

    whole = run_of("whole", frozen=False, absent=False)
    assert list(gradloc.find_support(whole, groups="residual").tests) == ["a", "b"]
    assert list(gradloc.find_support(whole, groups="residual", include="a.*").tests) == ["a"]
    masks = gradloc.find_masks(whole, density=0.5, groups="residual", include=["a.*", "b.0.weight"])
    assert set(masks) == {"a.0.weight", "a.2.weight", "b.0.weight"}
    assert gradloc.explain(whole, masks, "a.0.weight", (0, 0), groups="residual")["decided_with"] == ["a.2.weight"]
    for run in (run_of("frozen", True, False), run_of("absent", False, True)):
        assert set(gradloc.find_masks(run, density=0.5, groups="residual")) == {"b.0.weight", "b.2.weight"}
    with pytest.raises(errors.ConfigError, match="of no chain"):
        gradloc.find_masks(whole, density=0.5, groups="residual", include=["a.0.weight"])
    layouts = {p.name: p.layout for p in whole.info.parameters}
    twice = [DependencyGroup("g", {name: layouts[name]}) for name in ("a.0.weight", "b.0.weight")]
    with pytest.raises(errors.ConfigError, match="'g' names more than one"):
        gradloc.find_masks(whole, density=0.5, groups=twice)
    like_another = [DependencyGroup("a.2.weight", {"a.0.weight": layouts["a.0.weight"]})]
    with pytest.raises(errors.ConfigError, match=r"'a\.2\.weight' names more than one"):
        gradloc.find_support(whole, groups=like_another)


def test_what_belongs_to_two_units_is_explained_as_it_is_masked(tmp_path: Path) -> None:
    support = gradloc.find_support(three_layers(tmp_path / "r"))
    for name, test in support.tests.items():
        test.difference[...], test.statistic[...] = 0.5, 1.0
        test.equivalence[...] = 1e-12 if name == "0.weight" else 0.5
    support.tests["0.weight"].difference[0] = 1e-12  # first hidden layer: unit 0 supported
    support.tests["4.weight"].difference[:, 0] = 1e-12  # second hidden layer: unit 0 supported
    support.tests["4.weight"].equivalence[:, 5] = support.tests[MIDDLE].equivalence[5] = 1e-12  # and unit 5 negligible
    units = support.at("unit")
    aggressive, conservative = units.masks(policy="aggressive"), units.masks(policy="conservative")
    seen = set()
    for place in np.ndindex(6, 6):
        said = units.explain(MIDDLE, place)
        assert (said["outcome"] == "supported") == aggressive.array(MIDDLE)[place]
        assert (said["outcome"] != "unsupported") == conservative.array(MIDDLE)[place]
        assert len(said["tests"]) == 2
        assert any(all(said[key] == value for key, value in one.items()) for one in said["tests"])
        seen.add((said["outcome"], tuple(one["outcome"] for one in said["tests"])))
    assert ("undecided", ("supported", "undecided")) in seen
    assert ("supported", ("supported", "supported")) in seen
    assert len(units.explain("0.weight", (0, 0))["tests"]) == 1


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_density_is_the_share_of_weights_where_they_belong_to_two_units(
    tmp_path: Path, scope: str, density: float
) -> None:
    """Within half of the largest unit, of which a layer's scope may round up one in each layer."""
    run = three_layers(tmp_path / "r")
    masks = gradloc.find_masks(run, granularity="unit", density=density, scope=scope)
    weights = sum(masks.array(name).size for name in masks)
    largest = 4 + 1 + 6 + (6 if scope == "layer" else 0)  # a row, its bias and a column
    assert abs(masks.density - density) <= largest / 2 / weights + 1e-9
    budget = gradloc.find_masks(run, granularity="unit", budget=round(density * weights), scope=scope)
    assert budget.density == pytest.approx(masks.density, abs=largest / weights)
    # Whole units stay or go: a weight between two layers stays where both of its units do.
    rows, middle, columns = masks.array("0.weight"), masks.array(MIDDLE), masks.array("4.weight")
    np.testing.assert_array_equal(middle, np.outer(columns.any(0), rows.any(1)))


def test_a_budget_beyond_all_weights_counts_each_weight_once(tmp_path: Path) -> None:
    run = three_layers(tmp_path / "r")
    masks = gradloc.find_masks(run, granularity="unit", density=0.5)
    assert set(masks) == {"0.weight", "0.bias", MIDDLE, "2.bias", "4.weight"}
    weights = sum(masks.array(name).size for name in masks)
    assert gradloc.find_masks(run, granularity="unit", budget=weights).density == 1
    with pytest.raises(errors.ConfigError, match=f"more than the {weights} parameters"):
        gradloc.find_masks(run, granularity="unit", budget=weights + 1)


@pytest.mark.parametrize("asked", [{"density": 0.5}, {"density": 0.5, "scope": "layer"}, {"alpha": 0.05}], ids=str)
def test_masks_of_two_units_are_explained_by_the_one_that_decides(tmp_path: Path, asked: dict) -> None:
    run = three_layers(tmp_path / "r")
    masks = gradloc.find_masks(
        run, granularity="unit", **asked, **({"policy": "aggressive"} if "alpha" in asked else {})
    )
    for place in np.ndindex(6, 6):
        said = gradloc.explain(run, masks, MIDDLE, place)
        kept = masks.array(MIDDLE)[place]
        assert said["kept"] == kept
        if "alpha" in asked:
            assert (said["outcome"] == "supported") == kept
        else:
            assert (said["score"] >= said["threshold"]) == kept
            assert len(said["decisions"]) == 2
            assert all(one["score"] >= one["threshold"] for one in said["decisions"]) == kept


def test_a_null_of_ones_own(recorded) -> None:
    model, _, path = recorded()
    values = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    masks = gradloc.find_masks(path, null=values, density=0.5, include=[UP])
    last = gradloc.load_run(path).weights("last")[UP]
    masks.apply(model)
    after, keep = model.ffn.up.weight.detach(), masks[UP]
    assert (after[~keep] == 0.25).all()
    assert torch.equal(after[keep], torch.from_numpy(last)[keep])
    again = gradloc.MaskSet.load(masks.save(path / "m.safetensors"))
    assert again.null == "given"
    assert gradloc.find_support(path, null=values, include=[UP]).masks(0.1).null == "given"
    with pytest.raises(errors.ModelMismatchError, match="the null's values don't belong"):
        gradloc.find_masks(path, null={UP: torch.zeros(3)}, density=0.5, include=[UP])
    with pytest.raises(errors.NonFiniteError, match="the null's values of"):
        gradloc.find_masks(path, null={UP: torch.full_like(values[UP], torch.nan)}, density=0.5, include=[UP])


def test_groups_that_cannot_be(recorded) -> None:
    model, _, path = recorded()
    with pytest.raises(errors.ConfigError, match="same out and in units"):
        DependencyGroup("x", {"a": plain_layout((3, 4)), "b": plain_layout((4, 3))})
    twice = DependencyGroup("x", {UP: plain_layout(tuple(model.ffn.up.weight.shape))})
    with pytest.raises(errors.ConfigError, match="in more than one group"):
        gradloc.find_masks(path, density=0.5, groups=[twice, twice])
    with pytest.raises(errors.ConfigError, match="not recorded"):
        gradloc.find_support(path, groups=[DependencyGroup("x", {"nowhere": plain_layout((3, 4))})])
    with pytest.raises(errors.ConfigError, match="no statistic that could be added"):
        gradloc.find_support(path, "events", groups=[twice])
    with pytest.raises(errors.ConfigError, match="no residual edges"):
        residual_groups([OperatorChain("c", ("a", "b"), ("relu",), (3, 4, 5))])
    with pytest.raises(errors.ConfigError, match="units that can go"):
        unit_groups([], [], [])
