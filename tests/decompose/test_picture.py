"""Gathered graphs against plain sums over all dependencies."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.core.operators import OperatorChain
from gradloc.core.plan import HUB, ChainPlan
from gradloc.decompose.picture import picture


def kept_plainly(evidence: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> float:
    """Evidence of dependencies with both ends in one block, one after another; the hub is in every block."""
    total = 0.0
    for o in range(evidence.shape[0]):
        for i in range(evidence.shape[1]):
            a, b = outputs[o], inputs[i]
            inside = (a == b and a >= 0) or (a == HUB and b >= 0) or (b == HUB and a >= 0) or (a == b == HUB)
            total += evidence[o, i] if inside else 0.0
    return total


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_unit_is_drawn_once_and_nothing_kept_is_lost(data: st.DataObject) -> None:
    widths = tuple(data.draw(st.integers(2, 40)) for _ in range(3))
    blocks = data.draw(st.integers(1, min(4, *widths)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    low = data.draw(st.sampled_from([0, -1]))
    labels = tuple(random.integers(low, blocks, width) for width in widths)
    hub = labels[0].copy()
    hub[random.random(widths[0]) < data.draw(st.sampled_from([0.0, 0.3]))] = HUB
    plan = ChainPlan(OperatorChain("ffn", ("up", "down"), ("relu",), widths), (hub, *labels[1:]), blocks)
    evidence = [random.random((widths[1], widths[0])), random.random((widths[2], widths[1]))]
    drawn = picture(plan, evidence, most=data.draw(st.integers(1, 12)))
    for graph in (drawn.before, drawn.after):
        assert [int(layer.units.sum()) for layer in graph.layers] == list(widths)
        assert all((layer.units > 0).all() for layer in graph.layers)
    np.testing.assert_allclose(drawn.before.total, sum(found.sum() for found in evidence))
    plain = kept_plainly(evidence[0], labels[1], hub) + kept_plainly(evidence[1], labels[2], labels[1])
    np.testing.assert_allclose(drawn.after.total, plain)
    for layer, own in zip(drawn.after.layers, (hub, *labels[1:]), strict=True):
        counted = {int(b): int(layer.units[layer.blocks == b].sum()) for b in np.unique(layer.blocks)}
        assert counted == {int(b): int((own == b).sum()) for b in np.unique(own)}


def test_a_conditional_plan_keeps_everything() -> None:
    hub = np.full(4, HUB)
    plan = ChainPlan(
        OperatorChain("ffn", ("up", "down"), ("relu",), (4, 6, 4)), (hub, np.arange(6) % 3, hub), 3, active=1
    )
    assert picture(plan, [np.ones((6, 4)), np.ones((4, 6))]).kept == 1.0
