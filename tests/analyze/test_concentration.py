"""One sorting against four."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.analyze.concentration import MANY, Concentration, _in_order
from tests.oracles.concentration import core_set, gini, top_share
from tests.oracles.locality import core_size

amounts = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=40)


@given(amounts, st.data())
def test_one_sorting_gives_what_four_give(values: list[float], data: st.DataObject) -> None:
    amount = np.array(values)
    size = np.array([float(data.draw(st.integers(1, 300))) for _ in values])
    found = Concentration.of(amount, size)
    np.testing.assert_array_equal(found.core, core_set(amount, size))
    np.testing.assert_allclose(
        [found.gini, found.top_share], [gini(amount, size), top_share(amount, size)], rtol=1e-9, atol=1e-12
    )
    if amount.sum() > 0:
        cells = list(zip(values, size.astype(int).tolist(), strict=True))
        np.testing.assert_allclose(found.core_size, core_size(cells), rtol=1e-9)
        assert found.core_size <= min(0.5 + 1e-12, size[found.core].sum() / size.sum() + 1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3 * MANY), st.integers(1, 2000))
@settings(deadline=None, max_examples=25)
def test_many_cells_keep_the_order_of_few(seed: int, cells: int, different: int) -> None:
    """Equal densities, which cells without an event have, stay in the order of the cells however many there are."""
    key = np.random.default_rng(seed).integers(0, different, cells) / 7.0
    np.testing.assert_array_equal(_in_order(key), sorted(range(cells), key=lambda at: key[at]))
