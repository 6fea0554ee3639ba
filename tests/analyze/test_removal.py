"""What tests say of removing, against the masks and explanations that the same tests give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gradloc
from gradloc.analyze.removal import removed_by_error_rate, telling_reasons


@pytest.fixture
def support(recorded: Callable[..., tuple[object, object, object]]) -> gradloc.Support:
    *_, path = recorded(20)
    return gradloc.find_support(path)


def test_shares_are_those_of_the_outcomes(support: gradloc.Support) -> None:
    found = removed_by_error_rate(support, (0.01, 0.2)).set_index(["alpha", "policy"])
    for alpha in (0.01, 0.2):
        table = support.table(alpha)
        weights = table["hypotheses"] / table["hypotheses"].sum()
        gone = float((table["unsupported"] * weights).sum())
        undecided = float((table["undecided"] * weights).sum())
        assert found.loc[(alpha, "conservative"), "removed"] == pytest.approx(gone)
        assert found.loc[(alpha, "aggressive"), "removed"] == pytest.approx(gone + undecided)


def test_reasons_are_what_explain_says(support: gradloc.Support) -> None:
    reasons = telling_reasons(support)
    assert len(reasons) > 0
    for row in reasons.to_dict("records"):
        if (
            support.tests[row["parameter"]].members[row["parameter"]].granularity != "element"
            and len(support.tests[row["parameter"]].members[row["parameter"]].layout.shape) != 2
        ):
            continue
        told = support.explain(row["parameter"], row["index"])
        assert told["outcome"] == row["outcome"]
        np.testing.assert_allclose(
            [told["p_difference"], told["p_equivalence"], told["statistic"]],
            [row["p_difference"], row["p_equivalence"], row["statistic"]],
        )
