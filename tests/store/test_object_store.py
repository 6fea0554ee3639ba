"""Runs on an S3-compatible store, a real server on this machine, which is also stopped, killed and brought back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

import gradloc
from gradloc.record import writer
from tests.conftest import make_net, train
from tests.object_server import SECRET, Server


def test_a_run_in_the_store_equals_one_on_disk(server: Server, tmp_path: Path) -> None:
    for place in (server.uri("equal"), tmp_path / "r"):
        model, optimizer = make_net()
        gradloc.wrap(optimizer, model, run=place, every=1, flush_every=4, firing_every=1)
        train(model, optimizer, 10)
        gradloc.recorder_of(optimizer).close()
    remote, local = gradloc.load_run(server.uri("equal")), gradloc.load_run(tmp_path / "r")
    assert remote.problems == local.problems == []
    for info in local.info.parameters:
        np.testing.assert_array_equal(remote.evidence(info.name).grad_sumsq, local.evidence(info.name).grad_sumsq)
        np.testing.assert_array_equal(remote.weights()[info.name], local.weights()[info.name])
    np.testing.assert_array_equal(remote.firings("ffn.up"), local.firings("ffn.up"))
    assert gradloc.report(server.uri("equal"), show=False, wandb=False).data.final_step == 10


def test_credentials_are_neither_stored_nor_shown(server: Server) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=server.uri("secret"), every=1, flush_every=2)
    train(model, optimizer, 3)
    gradloc.recorder_of(optimizer).close()
    filesystem, path = fs.FileSystem.from_uri(server.uri("secret"))
    files = [f for f in filesystem.get_file_info(fs.FileSelector(path, recursive=True)) if f.type is fs.FileType.File]
    assert len(files) >= 7
    for file in files:
        assert SECRET.encode() not in filesystem.open_input_file(file.path).read()
    shown = repr(gradloc.load_run(server.uri("secret")))
    assert SECRET not in shown
    assert "s3://test/secret" in shown
    with pytest.raises(gradloc.errors.RunNotFoundError) as caught:
        gradloc.load_run(server.uri("nowhere"))
    assert SECRET not in str(caught.value)


def test_a_writer_that_has_not_closed_is_known_in_its_process_only(server: Server) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=server.uri("open"), every=1, flush_every=2)
    train(model, optimizer, 3)
    gradloc.recorder_of(optimizer).flush()
    assert gradloc.load_run(server.uri("open")).problems == []
    elsewhere = f"import gradloc; print(gradloc.load_run({server.uri('open')!r}).problems)"
    said = subprocess.run([sys.executable, "-c", elsewhere], capture_output=True, text=True, check=True).stdout
    assert "recording was not closed: its process is still at work, or was killed" in said
    gradloc.recorder_of(optimizer).close()
    assert gradloc.load_run(server.uri("open")).problems == []


def test_the_last_writer_takes_over_and_the_first_stops(server: Server) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=server.uri("two"), every=1, flush_every=2)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).flush()
    other, second = make_net()
    with pytest.raises(gradloc.errors.RunExistsError):
        gradloc.wrap(second, other, run=server.uri("two"))
    gradloc.wrap(second, other, run=server.uri("two"), every=1, flush_every=2, resume=True)
    with pytest.warns(RuntimeWarning, match="another process has taken over"):
        train(model, optimizer, 2)
        gradloc.recorder_of(optimizer).close()
    train(other, second, 2)
    gradloc.recorder_of(second).close()
    run = gradloc.load_run(server.uri("two"))
    assert [(w.first_step, w.last_step) for w in run.store.windows().values()] == [(1, 2), (3, 4)]


def test_a_slow_store_loses_nothing(server: Server) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=server.uri("slow"), every=1, flush_every=2)
    train(model, optimizer, 2)
    server.process.send_signal(signal.SIGSTOP)
    train(model, optimizer, 4)
    time.sleep(1.0)
    server.process.send_signal(signal.SIGCONT)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).close()
    run = gradloc.load_run(server.uri("slow"))
    assert run.problems == []
    assert run.evidence("head.weight").exposure == 8


def test_a_store_that_dies_costs_windows_not_training(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording goes on when it is back, and the run says what is missing."""
    monkeypatch.setattr(writer, "RETRY_SECONDS", ())  # Arrow tries again by itself, for six seconds
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=server.uri("dies"), every=1, flush_every=2)
    recorder = gradloc.recorder_of(optimizer)
    train(model, optimizer, 2)
    recorder._thread.drain()
    server.kill()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 2)
        recorder._thread.drain()
        train(model, optimizer, 1)
    assert len([w for w in caught if "window 1 (steps 3 to 4) could not be written" in str(w.message)]) == 1
    server.start()
    train(model, optimizer, 3)
    recorder.close()
    run = gradloc.load_run(server.uri("dies"))
    assert sorted(run.store.windows()) == [0, 2, 3]
    assert any("windows [1] are missing" in problem for problem in run.problems)
    assert any("window 1 (steps 3 to 4) could not be written" in problem for problem in run.problems)
    assert run.evidence("head.weight").exposure == 6
