"""What goes into a checkpoint's file comes out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradloc import errors
from gradloc.core.checkpoint import load_state, save_state

tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]),
    st.integers(0, 99),
)
plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(state=st.dictionaries(st.text(), values, max_size=3))
def test_states_come_back_whole(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    save_state(path, "annealing", state)
    assert same(load_state(path, "annealing"), state)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "s", "recording", {"step": 3})
    with pytest.raises(errors.ConfigError, match="expected a gradloc annealing file"):
        load_state(tmp_path / "s", "annealing")


def test_tensors_that_are_views_of_another_kind_come_back(tmp_path: Path) -> None:
    z = torch.complex(torch.ones(2), torch.full((2,), 2.0)).conj()
    save_state(tmp_path / "s", "annealing", {"conjugate": z, "negative": z.imag})
    assert same(load_state(tmp_path / "s", "annealing"), {"conjugate": z, "negative": z.imag})


@pytest.mark.parametrize(
    "foreign",
    [np.zeros(3), {1, 2}, b"bytes", print, {(0, 1): 2}, np.datetime64("2020-01-01"), torch.eye(2).to_sparse()],
)
def test_what_would_come_back_otherwise_is_refused(tmp_path: Path, foreign: Any) -> None:
    with pytest.raises(errors.ConfigError, match="can't be kept in a checkpoint"):
        save_state(tmp_path / "s", "annealing", {"deep": [{"in": foreign}]})
    assert not list(tmp_path.iterdir())
