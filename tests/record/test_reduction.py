"""Fast sums over cells against one element at a time, for whole parameters and for blocks of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradloc.core.events import EventRule
from gradloc.core.layout import GRANULARITIES, CellGrid, DependencyLayout
from gradloc.core.run_info import ParameterInfo
from gradloc.record import reduction
from gradloc.record.accumulate import CellBank, Slot
from gradloc.record.reduction import BlockReduction, IndexReduction, Part, reduction_for
from tests.oracles.cells import part_sums

CPU = torch.device("cpu")
LAYOUTS = st.one_of(
    st.integers(1, 70).map(lambda o: DependencyLayout((o,), (o,), "o")),
    st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda s: DependencyLayout(s, s, "oi")),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)).map(lambda s: DependencyLayout(s, s, "oic")),
    st.tuples(st.integers(1, 10), st.integers(1, 10)).map(
        lambda s: DependencyLayout((4 * s[0], s[1]), (4, s[0], s[1]), "coi")
    ),
    st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda s: DependencyLayout(s, s, "io")),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)).map(lambda s: DependencyLayout(s, s, "ioc")),
    st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 9)).map(lambda s: DependencyLayout(s, s, "ico")),
)


@st.composite
def parts(draw: st.DrawFn) -> tuple[DependencyLayout, Part]:
    layout = draw(LAYOUTS)
    offset, shape = [], []
    for size in layout.shape:
        first = draw(st.integers(0, size - 1))
        offset.append(first)
        shape.append(draw(st.integers(1, size - first)))
    if draw(st.booleans()):
        return layout, Part.whole(layout.shape)
    return layout, Part(tuple(offset), tuple(shape))


@settings(deadline=None, max_examples=150)
@given(parts(), st.sampled_from(GRANULARITIES), st.sampled_from([64, 1 << 18]), st.integers(0, 99))
def test_sums_and_counts_equal_the_oracle(
    choice: tuple[DependencyLayout, Part], granularity: str, chunk: int, seed: int
) -> None:
    layout, part = choice
    cells = CellGrid(layout, granularity)
    values = np.random.default_rng(seed).integers(-9, 9, part.shape)
    before = reduction.CHUNK["cpu"]
    reduction.CHUNK["cpu"] = chunk
    try:
        made = reduction_for(cells, part, CPU)
    finally:
        reduction.CHUNK["cpu"] = before
    tensor = torch.from_numpy(values).float()
    for fast, slow in (
        (lambda v, c: made.sum(v, c), values),
        (lambda v, c: made.count(v > 3, c), values > 3),
    ):
        whole = np.zeros(cells.shape)
        (row, column), (rows, columns) = made.origin, made.shape
        split = made.split(tensor)
        for piece in made.chunks:
            place = whole.T if made.turned else whole
            block = place[row : row + rows, column : column + columns][piece.rows]
            block += fast(split[piece.elements], piece).numpy()
        np.testing.assert_array_equal(whole, part_sums(slow.astype(float), cells, part.offset))


def test_plain_layouts_take_the_fast_way() -> None:
    plain = CellGrid(DependencyLayout((64, 32, 3), (64, 32, 3), "oic"), "tile")
    gates = CellGrid(DependencyLayout((64, 32), (4, 16, 32), "coi"), "tile")
    assert isinstance(reduction_for(plain, Part.whole((64, 32, 3)), CPU), BlockReduction)
    assert isinstance(reduction_for(gates, Part.whole((64, 32)), CPU), IndexReduction)
    turned = CellGrid(DependencyLayout((64, 32), (64, 32), "io"), "tile")
    assert isinstance(reduction_for(turned, Part.whole((64, 32)), CPU), BlockReduction)


def make_bank(shapes: list[tuple[int, ...]], granularity: str, rules: tuple[EventRule, ...]) -> CellBank:
    slots = []
    for number, shape in enumerate(shapes):
        turned = shape == (20, 48)
        layout = DependencyLayout(shape, shape, "io" if turned else "oic"[: len(shape)])
        info = ParameterInfo(f"p{number}", layout, "float32", "")
        slots.append(
            Slot(info, torch.nn.Parameter(torch.zeros(shape)), CellGrid(layout, granularity), Part.whole(shape))
        )
    return CellBank(slots, rules, CPU, steps=10)


@pytest.mark.parametrize("granularity", ["tile", "row", "column"])
def test_the_compiled_reading_equals_the_plain_one(granularity: str) -> None:
    """With a vector, ragged edges, channels, in units first, a NaN gradient in one parameter, and a step that the optimizer skipped."""
    rules = (EventRule.parse("gradient>1rms"), EventRule.parse("changed"), EventRule.parse("gradient!=0"))
    shapes = [(16, 32), (33, 20), (50,), (8, 6, 3), (20, 48)]
    plain, compiled = make_bank(shapes, granularity, rules), make_bank(shapes, granularity, rules)
    assert compiled.compile()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        grads = [torch.randn(shape, generator=generator).round(decimals=1) for shape in shapes]
        if step == 2:
            grads[1][0, 0] = torch.nan
        for bank in (plain, compiled):
            for slot in bank.slots:
                slot.parameter.grad = grads[int(slot.info.name[1:])].clone()
            bank.observe_gradients(step, torch.ones(()) if step == 4 else None)
    for one, other in zip(plain.slots, compiled.slots, strict=True):
        a, b = plain.sums.moments(one), compiled.sums.moments(other)
        assert one.info.name == other.info.name
        assert a.exposure == b.exposure == (3 if one.info.name == "p1" else 4)
        np.testing.assert_allclose(a.grad_sum, b.grad_sum, atol=1e-4)
        np.testing.assert_allclose(a.grad_sumsq, b.grad_sumsq, rtol=1e-5)
        np.testing.assert_array_equal(a.last_step, b.last_step)
        for rule in rules:
            np.testing.assert_array_equal(a.events[rule.name], b.events[rule.name])


def test_element_cells_are_not_compiled() -> None:
    assert not make_bank([(4, 4)], "element", (EventRule.parse("gradient>2rms"),)).compile()
