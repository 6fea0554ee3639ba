"""Windows written and read back against a plain sum over cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.moment_sums import MomentSums
from gradloc.core.moments import Moments
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.store.folder import LocalFolder
from gradloc.store.schema import Footer
from gradloc.store.shards import read_groups, read_shard, row_groups, write_shard
from gradloc.store.tables import add_rows, cells_table
from tests.oracles.windows import moments_from_rows

RULES = ("gradient>2rms", "changed")


def random_moments(shape: tuple[int, int], seed: int) -> Moments:
    random = np.random.default_rng(seed)
    # Whole numbers are exact in float32, so that what comes back can be compared bit by bit.
    whole = lambda: random.integers(-50, 50, shape).astype(float)  # noqa: E731
    events = random.integers(0, 3, shape) * (random.random(shape) < 0.5)
    last = np.where(events > 0, random.integers(1, 99, shape), -1)
    changed = random.integers(0, 3, shape) * (random.random(shape) < 0.5)
    return Moments(
        whole(), np.abs(whole()), np.abs(whole()), dict(zip(RULES, (events, changed), strict=True)), last, 7, 2
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_a_window_comes_back(rows: int, columns: int, seed: int) -> None:
    """Cells with an event exactly; the others share what is left by their size; totals always."""
    cells = CellGrid(DependencyLayout((rows, columns), (rows, columns), "oi"), "tile")
    moments = random_moments(cells.shape, seed)
    item = ParameterWindow("w", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, (0, 0), (rows, columns))
    table = cells_table(WindowRecord(0, 1, 9, (item,), (), WindowCost(9, 7, 0.0, 0.0)), RULES)
    sums = MomentSums(cells, RULES)
    sums.end_part(add_rows(sums, table, RULES), 7, 2)
    sums.end_window()
    found = sums.moments()
    active = (moments.events[RULES[0]] > 0) | (moments.events[RULES[1]] > 0)
    for name in ("grad_sum", "grad_sumsq", "update_abs_sum"):
        was, now = getattr(moments, name), getattr(found, name)
        np.testing.assert_array_equal(now[active], was[active])
        np.testing.assert_allclose(now.sum(), was.sum(), atol=1e-9)
        if not active.all():
            rest = now[~active] / cells.cell_sizes()[~active]
            np.testing.assert_allclose(rest, rest[0])
    for rule in RULES:
        np.testing.assert_array_equal(found.events[rule], moments.events[rule])
    np.testing.assert_array_equal(found.last_step, np.where(active, moments.last_step, -1))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 10_000), min_size=1, max_size=4), st.integers(1, 9)
)
def test_windows_and_parts_add_up_in_place(rows: int, columns: int, seeds: list[int], cut: int) -> None:
    """In pieces of any size, and with parts of two processes, against cell by cell."""
    cells = CellGrid(DependencyLayout((rows, columns), (rows, columns), "oi"), "tile")
    shapes = [((0, 0), (rows // 2, columns)), ((rows // 2, 0), (rows - rows // 2, columns))]
    sums, expected = MomentSums(cells, RULES), Moments.empty(cells.shape, RULES)
    for index, seed in enumerate(seeds):
        joined = Moments.empty(cells.shape, RULES)
        for rank, (offset, shape) in enumerate(shapes):
            held = cells.held_sizes(offset, shape)
            moments = random_moments(cells.shape, seed + rank)
            for values in (moments.grad_sum, moments.grad_sumsq, moments.update_abs_sum, *moments.events.values()):
                values[held == 0] = 0
            item = ParameterWindow("w", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, offset, shape)
            table = cells_table(WindowRecord(index, 1, 9, (item,), (), WindowCost(9, 7, 0.0, 0.0)), RULES)
            rest: dict[str, float] = {}
            for start in range(0, table.num_rows, cut):
                rest |= add_rows(sums, table.slice(start, cut), RULES)
            sums.end_part(rest, 7 + rank, 2, held)
            joined = joined.join(moments_from_rows(table, cells, RULES, 7 + rank, 2, held))
        sums.end_window()
        expected = expected.merge(joined)
    found = sums.moments()
    for name in ("grad_sum", "grad_sumsq", "update_abs_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-9)
    for rule in RULES:
        np.testing.assert_array_equal(found.events[rule], expected.events[rule])
    np.testing.assert_array_equal(found.last_step, expected.last_step)
    assert (found.exposure, found.update_exposure) == (expected.exposure, expected.update_exposure)


def test_a_parameter_is_read_without_the_others(tmp_path: Path, monkeypatch) -> None:
    """Row groups hold neighbours while small, and one large parameter apart; together they are the table."""
    monkeypatch.setattr("gradloc.store.shards.SMALL_GROUP", 10)
    monkeypatch.setattr("gradloc.store.shards.LARGE_GROUP", 25)
    items = []
    for number, side in enumerate((2, 3, 8, 1, 2, 7, 1)):
        cells = CellGrid(DependencyLayout((side, side), (side, side), "oi"), "element")
        moments = random_moments(cells.shape, number)
        items.append(ParameterWindow(f"p{number}", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, (0, 0), (side, side)))
    table = cells_table(WindowRecord(0, 1, 9, tuple(items), (), WindowCost(9, 7, 0.0, 0.0)), RULES)
    groups = list(row_groups(table))
    assert sum(group.num_rows for group in groups) == table.num_rows
    assert max(group.num_rows for group in groups) <= 25
    assert len(groups) > 3
    (tmp_path / "s").mkdir()
    write_shard(LocalFolder(tmp_path), "s", table, Footer("cells", "r", 0, 0, 1, 9, table.num_rows, 9, 7, 0.0, 0.0))
    whole = read_shard(LocalFolder(tmp_path), "s/cells-000000.parquet").to_pandas()
    for item in items:
        alone = [g.to_pandas() for g in read_groups(LocalFolder(tmp_path), "s/cells-000000.parquet", item.name)]
        rows = [row for frame in alone for row in frame.astype({"parameter": str}).to_dict("records")]
        assert rows == whole[whole["parameter"] == item.name].astype({"parameter": str}).to_dict("records")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3))
def test_merge_is_associative_and_has_a_neutral_element(seeds: list[int]) -> None:
    a, b, c = (random_moments((3, 2), seed) for seed in seeds)
    one, other = a.merge(b).merge(c), a.merge(b.merge(c))
    neutral = Moments.empty((3, 2), RULES).merge(one)
    for name in ("grad_sum", "grad_sumsq", "update_abs_sum", "last_step", "exposure", "update_exposure"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(neutral, name))
    for rule in RULES:
        np.testing.assert_array_equal(one.events[rule], sum(m.events[rule] for m in (a, b, c)))


def test_one_read_of_a_window_equals_one_read_a_parameter(recorded) -> None:
    import gradloc

    *_, path = recorded()
    store = gradloc.load_run(Path(path)).store
    for window in store.windows():
        together = store.window_evidence(window)
        assert set(together) == {p.name for p in store.info.parameters}
        for name, evidence in together.items():
            apart = store.evidence(name, (window, window + 1))
            np.testing.assert_array_equal(evidence.grad_sumsq, apart.grad_sumsq)
            np.testing.assert_array_equal(evidence.events, apart.events)
            assert (evidence.exposure, evidence.update_exposure) == (apart.exposure, apart.update_exposure)
