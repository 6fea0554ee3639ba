"""Windows written and read back against a plain sum over cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.moment_sums import RESIDUAL, Held, MomentSums, Stretch
from gradloc.core.moments import Moments
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.errors import DamagedShardError
from gradloc.store.aggregate import Aggregation, ShardPart
from gradloc.store.cells import CellRows
from gradloc.store.folder import LocalFolder
from gradloc.store.schema import Footer
from gradloc.store.shards import read_shard, row_groups, write_shard
from gradloc.store.tables import cells_table, rounded
from tests.oracles.cells import part_sums
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


def held_of(item: ParameterWindow, table: pa.Table, exposure: int) -> Held:
    """What the windows table says of the only parameter of a table of cells."""
    residual = bool(table.num_rows and table["cell_row"][-1].as_py() == RESIDUAL)
    return Held(exposure, 2, item.part_offset, item.part_shape, 0, table.num_rows - residual, residual)


def add(sums: MomentSums, table: pa.Table, held: Held, cut: int = 1 << 20, placed: bool = False) -> None:
    """Adds a table of one parameter in pieces of `cut` rows."""
    sums.begin_part({"w": held})
    for start in range(0, table.num_rows, cut):
        piece = table.slice(start, cut)
        residual = held.residual and start + piece.num_rows > held.rows
        stretch = Stretch("w", 0, piece.num_rows - residual, residual, start if placed else None)
        CellRows((stretch,), piece).add_to(sums, RULES)
    sums.end_part()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_a_window_comes_back(rows: int, columns: int, seed: int) -> None:
    """Cells with an event exactly; the others share what is left by their size; totals always."""
    cells = CellGrid(DependencyLayout((rows, columns), (rows, columns), "oi"), "tile")
    moments = random_moments(cells.shape, seed)
    item = ParameterWindow("w", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, (0, 0), (rows, columns))
    table = cells_table(WindowRecord(0, 1, 9, (item,), (), WindowCost(9, 7, 0.0, 0.0)), RULES)
    sums = MomentSums({"w": cells}, RULES)
    add(sums, table, held_of(item, table, 7))
    sums.end_window()
    found = sums.moments("w")
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
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 10_000), min_size=1, max_size=12), st.integers(1, 9)
)
def test_windows_and_parts_add_up_in_place(rows: int, columns: int, seeds: list[int], cut: int) -> None:
    """In pieces of any size, and with parts of two processes or of one, against cell by cell."""
    cells = CellGrid(DependencyLayout((rows, columns), (rows, columns), "oi"), "tile")
    halves = [((0, 0), (rows // 2, columns)), ((rows // 2, 0), (rows - rows // 2, columns))]
    sums, expected = MomentSums({"w": cells}, RULES), Moments.empty(cells.shape, RULES)
    for index, seed in enumerate(seeds):
        joined = Moments.empty(cells.shape, RULES)
        for rank, (offset, shape) in enumerate(halves if seed % 3 else [((0, 0), (rows, columns))]):
            here = part_sums(np.ones(shape), cells, offset)
            moments = random_moments(cells.shape, seed + rank)
            for values in (moments.grad_sum, moments.grad_sumsq, moments.update_abs_sum, *moments.events.values()):
                values[here == 0] = 0
            item = ParameterWindow("w", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, offset, shape)
            table = cells_table(WindowRecord(index, 1, 9, (item,), (), WindowCost(9, 7, 0.0, 0.0)), RULES)
            held = held_of(item, table, 7 + rank)
            add(sums, table, held, cut, placed=not held.residual and seed % 2 == 0)
            joined = joined.join(moments_from_rows(table, cells, RULES, 7 + rank, 2, here))
        sums.end_window()
        expected = expected.merge(joined)
    assert_same(sums.moments("w"), expected)


def assert_same(found: Moments, expected: Moments) -> None:
    for name in ("grad_sum", "grad_sumsq", "update_abs_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-9)
    for rule in RULES:
        np.testing.assert_array_equal(found.events[rule], expected.events[rule])
    np.testing.assert_array_equal(found.last_step, expected.last_step)
    assert (found.exposure, found.update_exposure) == (expected.exposure, expected.update_exposure)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_held_sizes_equal_counting(rows: int, columns: int, data: st.DataObject) -> None:
    """Of any block, for layouts with and without a shortcut."""
    shape = (rows, columns)
    layout = data.draw(st.sampled_from([DependencyLayout(shape, shape, "oi"), DependencyLayout(shape, shape, "io")]))
    cells = CellGrid(layout, data.draw(st.sampled_from(["tile", "element", "row", "column"])))
    offset = tuple(data.draw(st.integers(0, size)) for size in shape)
    block = tuple(data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, offset, strict=True))
    top, sizes = cells.held_sizes(offset, block)
    whole = np.zeros(cells.shape, np.int64)
    whole[top : top + len(sizes)] = sizes
    np.testing.assert_array_equal(whole, part_sums(np.ones(block), cells, offset))


def many_parameters(sides: Sequence[int], seed: int, dense: Sequence[bool]) -> tuple[WindowRecord, dict[str, CellGrid]]:
    items, grids = [], {}
    for number, (side, every) in enumerate(zip(sides, dense, strict=True)):
        cells = CellGrid(DependencyLayout((side, side), (side, side), "oi"), "element")
        moments = random_moments(cells.shape, seed + number)
        if every:
            moments.events[RULES[1]][:] = 1
        items.append(ParameterWindow(f"p{number}", moments, {}, 0.0, 0.0, 0.0, 0, 0.0, 0.0, (0, 0), (side, side)))
        grids[f"p{number}"] = cells
    return WindowRecord(0, 1, 9, tuple(items), (), WindowCost(9, 7, 0.0, 0.0)), grids


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=9), st.integers(0, 999), st.data())
def test_parameters_are_read_without_the_others(tmp_path_factory, shapes, seed: int, data: st.DataObject) -> None:
    """Row groups hold neighbours while small, and one large parameter apart; any choice of parameters equals row by row."""
    folder = LocalFolder(tmp_path_factory.mktemp("run"))
    sides, dense = zip(*shapes, strict=True)
    record, grids = many_parameters(sides, seed, dense)
    table = cells_table(record, RULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradloc.store.shards.SMALL_GROUP", 10)
        patch.setattr("gradloc.store.shards.LARGE_GROUP", 25)
        patch.setattr("gradloc.store.cells.AT_ONCE", data.draw(st.sampled_from([1, 30, 1000])))
        groups = list(row_groups(table))
        assert sum(group.num_rows for group in groups) == table.num_rows
        assert max((group.num_rows for group in groups), default=0) <= 25
        folder.make("s")
        write_shard(folder, "s", table, Footer("cells", "r", 0, 0, 1, 9, table.num_rows, 9, 7, 0.0, 0.0))
        names = read_shard(folder, "s/cells-000000.parquet")["parameter"].to_numpy()
        observed = {}
        for item in record.parameters:
            own = np.flatnonzero(names == item.name)
            part = table.take(own)
            residual = bool(part.num_rows and part["cell_row"][-1].as_py() == RESIDUAL)
            observed[item.name] = Held(7, 2, (0, 0), item.part_shape, int(own[0]), len(own) - residual, residual)
        wanted = data.draw(st.lists(st.sampled_from(list(grids)), unique=True, min_size=1))
        aggregation = Aggregation(folder, grids, RULES, lambda shard: pq.read_metadata(folder.open(shard)))
        part = ShardPart(0, "s/cells-000000.parquet", observed)
        found = dict(aggregation.moments(wanted, [part, part]))
        assert set(found) == set(wanted)
        for name in wanted:
            once = moments_from_rows(table.filter(pa.array(names == name)), grids[name], RULES, 7, 2)
            assert_same(found[name], once.join(once))


def test_rows_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    record, grids = many_parameters([3], 0, [True])
    folder, table = LocalFolder(tmp_path), cells_table(record, RULES)
    folder.make("s")
    write_shard(folder, "s", table, Footer("cells", "r", 0, 0, 1, 9, table.num_rows, 9, 7, 0.0, 0.0))
    aggregation = Aggregation(folder, grids, RULES, lambda shard: pq.read_metadata(folder.open(shard)))
    part = ShardPart(0, "s/cells-000000.parquet", {"p0": Held(7, 2, (0, 0), (3, 3), 0, 8, False)})
    with pytest.raises(DamagedShardError, match="has 9 rows where its windows shard counts 8"):
        list(aggregation.moments(["p0"], [part]))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
def test_rounding_is_to_the_nearest(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    found = rounded(exact)
    normal = np.abs(exact) > 1e-37
    assert (np.abs(found - exact)[normal] <= 2.0**-14 * np.abs(exact)[normal]).all()
    np.testing.assert_array_equal(rounded(found), found)
    np.testing.assert_array_equal(found.view(np.uint32) & 0x3FF, 0)


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
        together = {evidence.name: evidence for evidence in store.evidences(None, (window, window + 1))}
        assert set(together) == {p.name for p in store.info.parameters}
        for name, evidence in together.items():
            apart = store.evidence(name, (window, window + 1))
            np.testing.assert_array_equal(evidence.grad_sumsq, apart.grad_sumsq)
            np.testing.assert_array_equal(evidence.events, apart.events)
            assert (evidence.exposure, evidence.update_exposure) == (apart.exposure, apart.update_exposure)


def test_rolled_up_sums_answer_the_same_and_only_new_shards_are_read(recorded, tmp_path: Path, monkeypatch) -> None:
    import gradloc

    *_, path = recorded()
    plain = gradloc.load_run(path)
    expected = {evidence.name: evidence.moments for evidence in plain.evidences()}
    windows = len(plain.store.windows())
    # As if the last window had come later.
    later = tmp_path / "later"
    later.mkdir()
    rank = path / "shards" / "rank-00000"
    moved = sorted(rank.glob(f"*-{windows - 1:06d}.parquet"))
    assert len(moved) == 3
    for shard in moved:
        shard.rename(later / shard.name)
    assert gradloc.load_run(path).roll_up() == windows - 1
    assert gradloc.load_run(path).roll_up() == 0
    for shard in later.iterdir():
        shard.rename(rank / shard.name)
    run, read = gradloc.load_run(path), []
    real = Aggregation.moments

    def watched(self, names, parts, start=None):  # type: ignore[no-untyped-def]
        read.extend(part.window for part in parts)
        return real(self, names, parts, start)

    monkeypatch.setattr(Aggregation, "moments", watched)
    for name, moments in expected.items():
        found = run.evidence(name).moments
        assert_moments(found, moments)
        early = run.evidence(name, (0, 1)).moments
        assert_moments(early, plain.evidence(name, (0, 1)).moments)
    assert read.count(windows - 1) == len(expected)
    assert windows - 2 not in read[: len(expected)]
    assert run.roll_up() == 1
    read.clear()
    assert {evidence.name for evidence in run.evidences()} == set(expected)
    assert read == []


def test_rolled_up_sums_of_windows_that_are_gone_count_for_nothing(recorded) -> None:
    import gradloc

    *_, path = recorded()
    gradloc.load_run(path).roll_up()
    windows = len(gradloc.load_run(path).store.windows())
    for shard in (path / "shards" / "rank-00000").glob(f"*-{windows - 1:06d}.parquet"):
        shard.unlink()
    run = gradloc.load_run(path)
    name = run.info.parameters[0].name
    assert run.evidence(name).exposure == sum(run.evidence(name, (w, w + 1)).exposure for w in range(windows - 1))
    assert run.roll_up() == windows - 1


def test_damaged_rolled_up_sums_are_named_and_not_used(recorded) -> None:
    import gradloc

    *_, path = recorded()
    run = gradloc.load_run(path)
    name = run.info.parameters[0].name
    expected = run.evidence(name).exposure
    run.roll_up()
    next((path / "sums").iterdir()).write_bytes(b"PAR1")
    again = gradloc.load_run(path)
    assert "rolled-up sums were not used" in "".join(again.problems)
    assert again.evidence(name).exposure == expected
    assert again.roll_up() > 0
    assert gradloc.load_run(path).problems == []


def assert_moments(found: Moments, expected: Moments) -> None:
    for name in ("grad_sum", "grad_sumsq", "update_abs_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-15)
    for rule, counts in expected.events.items():
        np.testing.assert_array_equal(found.events[rule], counts)
    np.testing.assert_array_equal(found.last_step, expected.last_step)
    assert (found.exposure, found.update_exposure) == (expected.exposure, expected.update_exposure)
