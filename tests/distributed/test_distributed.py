"""Two gloo processes under torchrun: what they record together equals the whole gradients that one process would see."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradloc
from tests.distributed.worker import MODES, STEPS, Block, data, loss_of
from tests.oracles.moments import cell_sums
from tests.processes import launch

ROOT = Path(__file__).parents[2]


def torchrun(
    task: str, folder: Path, check: bool = True, script: str = "worker.py"
) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    # Slow to look after its workers, so that the one that survives another's death can finish.
    command += [
        "--master-port",
        str(port),
        "--monitor-interval",
        "2",
        str(ROOT / "tests/distributed" / script),
        task,
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = launch(command, environment, folder, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    torchrun("modes", folder)
    return folder


def held_by_rank(run: gradloc.Run, name: str) -> list[tuple[slice, ...]]:
    """The block of a parameter that each process recorded, as its shards say."""
    blocks = []
    for rank, table in run.store._rows[0].items():
        for row in table.to_pylist():
            if row["parameter"] == name:
                offset, shape = row["part_offset"], row["part_shape"]
                blocks.append((rank, tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))))
    return [block for _, block in sorted(blocks, key=lambda item: item[0])]


@pytest.mark.parametrize("granularity", ["tile", "element"])
@pytest.mark.parametrize("mode", MODES)
def test_the_joined_evidence_equals_the_whole_gradients(runs: Path, mode: str, granularity: str) -> None:
    run = gradloc.load_run(runs / f"{mode}-{granularity}")
    grads = np.load(runs / f"{mode}-{granularity}.npz")
    assert run.problems == []
    assert {p.name for p in run.info.parameters} == set(grads.files)
    parts = 0
    for name in grads.files:
        evidence = run.evidence(name)
        layout, size = evidence.cells.layout, evidence.cells.cell_shape
        assert evidence.exposure == evidence.update_exposure == STEPS
        blocks = held_by_rank(run, name)
        parts = max(parts, len(blocks))
        covered = np.zeros(layout.shape, int)
        events = np.zeros(layout.shape)
        for block in blocks:
            covered[block] += 1
            for grad in grads[name].astype(np.float64):
                part = grad[block]  # the threshold is the rms of what a process holds
                events[block] += np.abs(part) > 2 * np.sqrt((part**2).mean())
        assert (covered == 1).all(), "every element is recorded by exactly one process"
        np.testing.assert_array_equal(evidence.events, cell_sums(layout.grid(events), *size))
        # Cells without any event are known by their sum only.
        known = (evidence.events > 0) | (evidence.event_counts["changed"] > 0)
        for found, steps in (
            (evidence.grad_sum, grads[name]),
            (evidence.grad_sumsq, grads[name].astype(np.float64) ** 2),
        ):
            expected = cell_sums(layout.grid(steps.sum(0, dtype=np.float64)), *size)
            moved = cell_sums(layout.grid(np.abs(steps).sum(0, dtype=np.float64)), *size)
            # What the store rounds, of each window and process, and what float32 does over the steps.
            rounding = 2.0**-13 * moved + 1e-6 * moved.sum()
            assert (np.abs(found - expected)[known] <= rounding[known]).all()
            assert abs(found.sum() - expected.sum()) <= rounding.sum()
    assert parts == (1 if mode == "ddp" else 2)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "tensor_parallel"])
def test_the_evidence_equals_that_of_a_single_process(runs: Path, tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    model = Block(48 if mode == "tensor_parallel" else 37)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, update_every=1)
    for step in range(STEPS):
        loss_of(model, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    alone, together = gradloc.load_run(tmp_path / "r"), gradloc.load_run(runs / f"{mode}-tile")
    assert together.info.world_size == 2
    for info in alone.info.parameters:
        a, b = alone.evidence(info.name), together.evidence(info.name)
        np.testing.assert_allclose(a.grad_sumsq, b.grad_sumsq, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(a.update_abs_sum, b.update_abs_sum, rtol=1e-3, atol=1e-7)
        for which in ("init", "last"):
            np.testing.assert_allclose(
                alone.weights(which)[info.name], together.weights(which)[info.name], rtol=1e-4, atol=1e-6
            )
    assert together.locality()["exposure"].sum() == alone.locality()["exposure"].sum()


def test_data_parallel_ranks_share_the_parameters_out(runs: Path) -> None:
    run = gradloc.load_run(runs / "ddp-tile")
    names = [{row["parameter"] for row in table.to_pylist()} for table in run.store._rows[0].values()]
    assert not names[0] & names[1]
    sizes = {p.name: int(np.prod(p.layout.shape)) for p in run.info.parameters}
    loads = [sum(sizes[name] for name in held) for held in names]
    assert max(loads) / sum(loads) < 0.6


def test_firings_come_from_every_process(runs: Path) -> None:
    tokens = len(gradloc.load_run(runs / "fsdp2-tile").firings("ffn.0"))
    assert tokens == STEPS * 8 * 8  # every token of both halves of the batch


def test_a_budget_is_kept_in_step(runs: Path) -> None:
    run = gradloc.load_run(runs / "budget")
    assert run.problems == []
    for footers in run.store._footers.values():
        one, other = footers[0], footers[1]
        assert (one.first_step, one.last_step, one.observed_steps) == (
            other.first_step,
            other.last_step,
            other.observed_steps,
        )
    spacings = {footers[0].steps / footers[0].observed_steps for footers in run.store._footers.values()}
    assert len(spacings) > 1, "the spacing follows the cost"


def test_resuming_from_a_distributed_checkpoint(runs: Path) -> None:
    """Windows that the checkpoint never saw are gone, and the rest equals a run without interruption."""
    resumed, whole = gradloc.load_run(runs / "resumed"), gradloc.load_run(runs / "uninterrupted")
    for run in (resumed, whole):
        assert run.problems == []
        assert [(w.first_step, w.last_step) for w in run.store.windows().values()] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    for info in whole.info.parameters:
        a, b = whole.evidence(info.name), resumed.evidence(info.name)
        assert a.exposure == b.exposure == 8
        np.testing.assert_array_equal(a.events, b.events)
        np.testing.assert_allclose(a.grad_sumsq, b.grad_sumsq, rtol=1e-6)


def test_a_report_by_one_process_leaves_the_windows_in_step(runs: Path) -> None:
    run = gradloc.load_run(runs / "look-False")
    assert run.problems == []
    steps = [[(f.first_step, f.last_step) for f in footers.values()] for footers in run.store._footers.values()]
    assert steps == [[(1, 4)] * 2, [(5, 8)] * 2, [(9, 12)] * 2]
    said = (runs / "look.txt").read_text()
    assert "of the 6 steps so far those after step 4 and the present weights are still to come: 2 processes" in said


def test_windows_of_different_steps_are_named(runs: Path) -> None:
    """Flushing is for all processes at once; the first one alone did."""
    problems = gradloc.load_run(runs / "look-True").problems
    assert any("windows [1, 2] are not of the same steps in all processes" in problem for problem in problems)


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    torchrun("die", tmp_path, check=False)
    assert (tmp_path / "survived").exists()
    run = gradloc.load_run(tmp_path / "die")
    assert any("process 1 of 2 is missing in windows" in problem for problem in run.problems)
    assert len(run.store.rank_windows(0)) > len(run.store.rank_windows(1)) >= 1


def test_wrapping_before_the_processes_are_joined_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(gradloc.errors.ConfigError, match="init_process_group"):
        gradloc.wrap(torch.optim.SGD(model.parameters()), model, run=tmp_path / "r")
