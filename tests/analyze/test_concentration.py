"""One sorting against three."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradloc.analyze.concentration import Concentration
from tests.oracles.concentration import core_set, gini, top_share

amounts = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=40)


@given(amounts, st.data())
def test_one_sorting_gives_what_three_give(values: list[float], data: st.DataObject) -> None:
    amount = np.array(values)
    size = np.array([float(data.draw(st.integers(1, 300))) for _ in values])
    found = Concentration.of(amount, size)
    np.testing.assert_array_equal(found.core, core_set(amount, size))
    np.testing.assert_allclose(
        [found.gini, found.top_share], [gini(amount, size), top_share(amount, size)], rtol=1e-9, atol=1e-12
    )
