"""Single windows and phantoms are read once for all parameters that are read together, and are what reading each alone gives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import gradloc
from gradloc.analyze.reading import Reading
from gradloc.store import shards

SETTINGS = {"flush_every": 4, "phantoms": True, "phantom_every": 1}
ASKED = [
    {"criterion": "events"},
    {"criterion": "events", "calibration": "phantom"},
    {"criterion": "score", "null": "init", "calibration": "phantom"},
    {"criterion": "drift+score", "null": "init"},
]
LINEAR = ["ffn.up.weight", "ffn.down.weight", "head.weight"]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_window_is_opened_once_for_all_parameters(recorded, monkeypatch, asked: dict) -> None:
    *_, path = recorded(steps=20, **SETTINGS)
    run = gradloc.load_run(path)
    opened: Counter[str] = Counter()
    real = shards.opened_shard

    def counted(folder, name, metadata=None):  # type: ignore[no-untyped-def]
        opened[name.rpartition("/")[2]] += metadata is not None
        return real(folder, name, metadata)

    monkeypatch.setattr("gradloc.store.shards.opened_shard", counted)
    monkeypatch.setattr("gradloc.store.cells.opened_shard", counted)
    gradloc.find_support(run, include=LINEAR, **asked)
    cells = [count for name, count in opened.items() if name.startswith("cells-")]
    phantoms = [count for name, count in opened.items() if name.startswith("phantoms-")]
    # Once for all windows together, and once by itself.
    assert cells == [2] * 5 if asked.get("calibration") != "phantom" or asked["criterion"] == "events" else [1] * 5
    assert phantoms == ([1] * 5 if asked.get("calibration") == "phantom" else [])


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("granularity", ["tile", "element"])
def test_batches_of_any_size_give_the_same(recorded, monkeypatch, asked: dict, granularity: str) -> None:
    *_, path = recorded(steps=20, granularity=granularity, **SETTINGS)
    whole = gradloc.find_support(path, include=LINEAR, **asked)
    monkeypatch.setattr("gradloc.analyze.reading.CELLS_OF_WINDOWS", 1)
    monkeypatch.setattr("gradloc.analyze.reading.CELLS_A_SHARD", 0)
    pieces = gradloc.find_support(path, include=LINEAR, **asked)
    assert list(whole.tests) == list(pieces.tests)
    for name, test in whole.tests.items():
        for one, other in zip(test.values, pieces.tests[name].values, strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_read_together_equals_what_is_read_alone(recorded, monkeypatch) -> None:
    """Also where parameters lie in row groups of their own, and where one was not observed."""
    monkeypatch.setattr(shards, "SMALL_GROUP", 8)
    monkeypatch.setattr(shards, "LARGE_GROUP", 16)
    *_, path = recorded(steps=20, granularity="element", **SETTINGS)
    store = gradloc.load_run(path).store
    shard = next(name for name in store.folder.names("shards") if "phantoms-000001" in name)
    assert store._metadata(shard).num_row_groups > len(LINEAR)
    names = tuple(p.name for p in store.info.parameters)
    reading = Reading(store, names, (1, 4), dict)
    assert set(reading.phantoms) == set(LINEAR)
    for name, found in reading.phantoms.items():
        alone = store.phantom(name, (1, 4))
        single = [store.phantom(name, (window, window + 1)) for window in range(1, 4)]
        assert found.exposure == alone.exposure == sum(one.exposure for one in single) == 12
        for what in ("grad_sum", "grad_sumsq", "sum_squares", "events"):
            np.testing.assert_array_equal(getattr(found, what), getattr(alone, what))
            np.testing.assert_allclose(getattr(found, what), sum(getattr(one, what) for one in single), rtol=1e-12)
    for name in names:
        assert reading.rows[name]["window"].tolist() == [1, 2, 3]
        for window, found in zip(range(1, 4), reading.history[name], strict=True):
            alone = store.evidence(name, (window, window + 1))
            np.testing.assert_array_equal(found.grad_sumsq, alone.grad_sumsq)
            np.testing.assert_array_equal(found.events, alone.events)
