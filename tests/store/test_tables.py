"""Windows written and read back against a plain sum over cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.moments import Moments
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.store.tables import cells_table, moments_from_cells

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
    found = moments_from_cells(table, cells, RULES, 7, 2)
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
