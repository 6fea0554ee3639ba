"""Rolled-up sums while others make them too: no reader adds a window twice, and none loses one."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradloc


def go_on(path: Path, resume: bool) -> None:
    """Five windows of a small training."""
    torch.manual_seed(int(resume))
    model = nn.Sequential(nn.Linear(33, 70), nn.ReLU(), nn.Linear(70, 33))
    optimizer = torch.optim.Adam(model.parameters())
    gradloc.wrap(optimizer, model, run=path, every=1, flush_every=4, resume=resume, granularity="element")
    for _ in range(20):
        x = torch.randn(8, 33)
        (model(x) - 2 * x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def truth(run: gradloc.Run) -> dict[str, np.ndarray]:
    """Window by window, which no rolled-up sums serve."""
    windows = range(len(run.store.windows()))
    return {name: sum(run.evidence(name, (w, w + 1)).grad_sumsq for w in windows) for name in NAMES}


def check(run: gradloc.Run, expected: dict[str, np.ndarray]) -> None:
    for evidence in run.evidences():
        np.testing.assert_allclose(evidence.grad_sumsq, expected[evidence.name], rtol=1e-12)
    for name in NAMES:
        np.testing.assert_allclose(run.evidence(name).grad_sumsq, expected[name], rtol=1e-12)
        assert run.evidence(name).exposure == 4 * len(run.store.windows())


@pytest.fixture
def half_rolled(tmp_path: Path) -> Path:
    """Ten windows, five of them rolled up."""
    go_on(tmp_path / "run", resume=False)
    assert gradloc.load_run(tmp_path / "run").roll_up() == 5
    go_on(tmp_path / "run", resume=True)
    return tmp_path / "run"


def test_a_reader_that_was_opened_before_others_rolled_up(half_rolled: Path) -> None:
    early, expected = gradloc.load_run(half_rolled), truth(gradloc.load_run(half_rolled))
    check(early, expected)
    assert gradloc.load_run(half_rolled).roll_up() == 5
    assert len(list((half_rolled / "sums").iterdir())) == 1
    check(early, expected)
    early = gradloc.load_run(half_rolled)
    check(early, expected)
    assert early.roll_up() == 0
    assert early.problems == []


def test_it_leaves_right_sums_when_it_rolls_up_itself(half_rolled: Path) -> None:
    early, expected = gradloc.load_run(half_rolled), truth(gradloc.load_run(half_rolled))
    gradloc.load_run(half_rolled).roll_up()
    assert early.roll_up() == 5
    check(early, expected)
    check(gradloc.load_run(half_rolled), expected)
    assert gradloc.load_run(half_rolled).roll_up() == 0


def test_sums_that_go_while_they_are_read(half_rolled: Path, monkeypatch) -> None:
    """Between one parameter and the next."""
    monkeypatch.setattr("gradloc.store.aggregate.TOGETHER", 1)
    run, expected = gradloc.load_run(half_rolled), truth(gradloc.load_run(half_rolled))
    found = {}
    for evidence in run.evidences():
        found[evidence.name] = evidence.grad_sumsq
        for file in (half_rolled / "sums").iterdir():
            file.unlink()
    assert set(found) == set(NAMES)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)
    assert run.problems == []


def test_sums_of_the_same_name_that_say_otherwise(half_rolled: Path) -> None:
    run, expected = gradloc.load_run(half_rolled), truth(gradloc.load_run(half_rolled))
    (planned,) = (half_rolled / "sums").iterdir()
    gradloc.load_run(half_rolled).roll_up()
    (other,) = (half_rolled / "sums").iterdir()
    other.rename(planned)
    check(run, expected)


def test_a_damaged_page_is_named_and_the_shards_are_read(half_rolled: Path) -> None:
    expected = truth(gradloc.load_run(half_rolled))
    (file,) = (half_rolled / "sums").iterdir()
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 3, len(content) // 2):
        content[place] ^= 0xFF
    file.write_bytes(content)
    run = gradloc.load_run(half_rolled)
    check(run, expected)
    assert sum("rolled-up sums were not used" in problem for problem in run.problems) == 1
    assert run.roll_up() == 10
    again = gradloc.load_run(half_rolled)
    check(again, expected)
    assert again.problems == []


def test_sums_of_fewer_windows_do_not_take_the_place_of_more(half_rolled: Path) -> None:
    """A reader that leaves a damaged window out makes sums of its own."""
    expected = truth(gradloc.load_run(half_rolled))
    gradloc.load_run(half_rolled).roll_up()
    shard = half_rolled / "shards" / "rank-00000" / "cells-000003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes(100) + whole[300:])
    partial = gradloc.load_run(half_rolled, skip_damaged=True)
    assert partial.roll_up() == 9
    assert partial.evidence("0.weight").exposure == 36
    shard.write_bytes(whole)
    run = gradloc.load_run(half_rolled)
    assert run.roll_up() == 0
    check(run, expected)


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_several_roll_up_at_once(half_rolled: Path, how: str) -> None:
    expected = truth(gradloc.load_run(half_rolled))
    if how == "threads":
        failed: list[BaseException] = []

        def work() -> None:
            try:
                run = gradloc.load_run(half_rolled)
                run.roll_up()
                check(run, expected)
            except BaseException as error:
                failed.append(error)

        for _ in range(3):
            for file in (half_rolled / "sums").iterdir():
                file.unlink()
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert failed == []
    else:
        code = f"import gradloc; gradloc.load_run({str(half_rolled)!r}).roll_up()"
        started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
        for process in started:
            assert process.communicate(timeout=120)[1] == b""
            assert process.returncode == 0
    assert [file.suffix for file in (half_rolled / "sums").iterdir()] == [".parquet"]
    run = gradloc.load_run(half_rolled)
    assert run.roll_up() == 0
    assert run.problems == []
    check(run, expected)
