"""A stage slows down where its gate objects, goes faster again, and always comes to an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradloc
from gradloc.anneal.pace import CHANCES, MOST_HALVINGS, RECOVERY, Pace
from tests.anneal.test_training_loops import target
from tests.conftest import make_net, train


@given(st.lists(st.booleans(), max_size=400))
def test_whatever_looks_say_the_rollbacks_are_bounded(looks: list[bool]) -> None:
    pace, rollbacks = Pace(1.0), 0
    for good in looks:
        before = pace.now
        if good:
            pace.passed()
        else:
            pace.failed()
            rollbacks += 1
        if pace.exhausted:
            break
        assert pace.now in ((before, 2 * before) if good else (before / 2,))
        assert 2.0**-MOST_HALVINGS <= pace.now <= 1.0
        taken_up = Pace(1.0)
        taken_up.load_state_dict(pace.state_dict())
        assert taken_up == pace
    assert rollbacks <= CHANCES * (MOST_HALVINGS + 1)


@given(st.lists(st.integers(0, 2 * RECOVERY), min_size=CHANCES * (MOST_HALVINGS + 1)))
def test_a_gate_that_objects_again_and_again_exhausts_every_pace(passes: list[int]) -> None:
    """However many looks are good in between."""
    pace, rollbacks = Pace(0.1), 0
    for count in passes:
        for _ in range(count):
            pace.passed()
        pace.failed()
        rollbacks += 1
        if pace.exhausted:
            break
    assert pace.exhausted
    assert rollbacks > MOST_HALVINGS


def test_after_good_looks_a_stage_is_as_fast_as_before() -> None:
    model, optimizer = make_net()
    losses = iter([1.0, 9.0, *[1.0] * 50])  # the look before the stage, the first one, all others
    annealer = gradloc.Annealer(
        model, optimizer, target("masks"), schedule="linear", steps=10, settle=0.0, validate=losses.__next__, validate_every=1
    )  # fmt: skip
    while not annealer.done:
        train(model, optimizer, 1, seed=annealer.steps_taken)
        annealer.step()
    factors = [entry["factor"] for entry in annealer.log]
    assert factors == pytest.approx([1, 0.9, 0.95, 0.9, 0.85, *[0.85 - 0.1 * n for n in range(1, 9)], 0.0])
    assert annealer.outcome == "completed"


def test_a_pace_that_failed_twice_is_left() -> None:
    pace = Pace(1.0)
    for _ in range(2):
        pace.failed()
        for _ in range(RECOVERY):
            pace.passed()
    assert pace.now == 0.5
    for _ in range(10 * RECOVERY):
        pace.passed()
    assert pace.now == 0.5
