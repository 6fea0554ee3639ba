"""``gradloc anneal`` that was interrupted goes on, and ends where it would have ended."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gradloc
from gradloc.cli.annealing import anneal_stage
from gradloc.cli.interrupts import put_off
from gradloc.cli.main import main
from gradloc.core.checkpoint import load_state, save_state
from tests.anneal.test_training_loops import target

STAGE = '''
"""A user's module: batches by their number, dropout by torch's random numbers, a scheduler and a sampler that are kept."""
import os
import random
import signal
import time

import numpy as np
import torch
from tests.conftest import Net

BATCHES = torch.randint(11, (7, 4, 9), generator=torch.Generator().manual_seed(3))
at, signals, bad, wait = 0, {}, (), 0.0

def made(seed=0, **named):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    sampler = torch.Generator().manual_seed(seed)

    def train_step(annealer):
        global at
        at = annealer.steps_taken
        tokens = BATCHES[at % len(BATCHES)]
        tokens = tokens[torch.randint(4, (4,), generator=sampler)]
        logits = model(tokens[:, :-1])
        logits = torch.nn.functional.dropout(logits, 0.1 + 0.1 * random.random() + 0.1 * np.random.rand())
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if annealer.distill:
            loss = loss + annealer.distillation(logits, tokens[:, :-1])
        optimizer.zero_grad()
        loss.backward()
        if at in signals:
            os.kill(os.getpid(), signals.pop(at))
        optimizer.step()
        scheduler.step()
        time.sleep(wait)

    def validate():
        return 9.0 if at + 1 in bad else 1.0

    return model, optimizer, train_step, validate, {"scheduler": scheduler, "sampler": sampler}

def stage():
    return made()

def otherwise():
    """Drawn anew at every start."""
    return made(int(time.time_ns() % 2**31))

def without_gate():
    parts = made()
    return *parts[:3], None, parts[4]

def slow():
    global wait
    wait = 0.05
    return made()

def another():
    model = torch.nn.ModuleDict({"ffn": Net().ffn, "wide": torch.nn.Linear(3, 4)})
    return model, torch.optim.SGD(model.parameters(), lr=0.1), (lambda: None), None
'''
SETTINGS = ("masks=m.safetensors", "steps=24", "validate_every=4", "json=true")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a user's module, masks and a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_stage.py").write_text(STAGE)
    target("masks").save("m.safetensors")
    target("conditional").save("p.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """As a command of its own has them; a worker of the tests sees to SIGTERM itself, which stays its right otherwise."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def module(**named: Any) -> Any:
    """The user's module as a new process would have it."""
    sys.modules.pop("my_stage", None)
    found = importlib.import_module("my_stage")
    vars(found).update(named)
    return found


def run(*words: str, **named: Any) -> int:
    """A command in what could be a process of its own."""
    module(**named)
    return main(["anneal", *words])


def same(one: str, other: str, kind: str = "masks") -> None:
    """All that two stages have written is the same, to the bit."""
    for name in ("model", "plan") if kind == "conditional" else ("model", "masks"):
        a, b = (load_file(f"{folder}/{name}.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert Path(one, "log.jsonl").read_text() == Path(other, "log.jsonl").read_text()
    assert {path.name for path in Path(one).iterdir()} == {path.name for path in Path(other).iterdir()}


@pytest.mark.parametrize(
    ("number", "kind", "words", "named"),
    [
        (signal.SIGINT, "masks", [], {"bad": (16,)}),  # goes back to a state from before the interruption
        (signal.SIGTERM, "masks", ["distill=0.5", "temperature=3"], {"bad": (12,)}),
        (signal.SIGINT, "conditional", ["distill=0.5"], {"bad": (16, 20)}),
    ],
)
def test_it_ends_in_the_same_weights(
    here: Path, capsys: Any, number: int, kind: str, words: list[str], named: dict[str, Any]
) -> None:
    settings = [*SETTINGS[1:], *words, "masks=m.safetensors" if kind == "masks" else "plan=p.safetensors"]
    assert run("stage=my_stage:stage", *settings, "out=whole", **named) == 0
    capsys.readouterr()
    assert run("stage=my_stage:stage", *settings, "out=o", signals={13: number}, **named) == 2
    said = capsys.readouterr().err
    assert "interrupted at step 14: stopped by KeyboardInterrupt; the model is back at its last good state" in said
    assert said.endswith("It is written to o. resume=true goes on from step 14.\n")
    assert {"model.safetensors", "state.safetensors"} <= {path.name for path in Path("o").iterdir()}
    assert run("stage=my_stage:stage", *settings, "out=o", "resume=true", **named) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["resumed_from"] == 14
    assert answer["exact"]
    same("whole", "o", kind)


def test_a_step_that_hangs_is_interrupted_by_a_second_signal(here: Path, capsys: Any) -> None:
    """It goes on from the last look."""
    assert run("stage=my_stage:stage", *SETTINGS, "out=whole", bad=(8,)) == 0
    my_stage = module(bad=(8,))
    begun = my_stage.made

    def hanging() -> Any:
        model, optimizer, train_step, *rest = begun()

        def step(annealer: Any) -> None:
            train_step(annealer)
            if annealer.steps_taken == 13:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)

        return model, optimizer, step, *rest

    my_stage.stage = hanging
    assert main(["anneal", "stage=my_stage:stage", *SETTINGS, "out=o"]) == 2
    assert "resume=true goes on from step 12." in capsys.readouterr().err
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", "resume=true", bad=(8,)) == 0
    same("whole", "o")


def test_a_process_that_is_interrupted_from_outside(here: Path) -> None:
    words = [*SETTINGS[:1], "steps=60", "validate_every=5"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(gradloc.__file__).parent.parent), str(here)])}
    process = subprocess.Popen(
        [sys.executable, "-m", "gradloc.cli.main", "anneal", "stage=my_stage:slow", *words, "out=o"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = Path("o/log.jsonl")
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "resume=true goes on from step" in said
    assert run("stage=my_stage:stage", *words, "out=o", "resume=true") == 0
    assert run("stage=my_stage:stage", *words, "out=whole") == 0
    same("whole", "o")


def test_a_teacher_is_the_model_that_the_stage_began_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that the user's function makes when it is called again."""
    words = ["stage=my_stage:otherwise", *SETTINGS, "distill=1", "out=o"]
    assert run(*words, signals={5: signal.SIGINT}) == 2
    begun = load_state(Path("o/teacher.safetensors"), "teacher")
    teachers = []
    before = gradloc.Annealer.distillation

    def spied(annealer: Any, *arguments: Any) -> torch.Tensor:
        teachers.append(annealer._teacher)
        return before(annealer, *arguments)

    monkeypatch.setattr(gradloc.Annealer, "distillation", spied)
    assert run(*words, "resume=true") == 0
    assert len(teachers) == 24 - 6
    assert all(torch.equal(weight, begun[name]) for name, weight in teachers[-1].named_parameters())
    assert not Path("o/teacher.safetensors").exists()


def test_a_stage_without_a_gate_goes_on(here: Path) -> None:
    words = ["stage=my_stage:without_gate", *SETTINGS]
    assert run(*words, "out=whole") == 0
    assert run(*words, "out=o", signals={9: signal.SIGTERM}) == 2
    assert run(*words, "out=o", "resume=true") == 0
    same("whole", "o")


def test_a_stage_of_no_other_settings_than_an_annealers_own(here: Path) -> None:
    """Settings that aren't given are those of an annealer, and a step may take its annealer in whatever way."""
    my_stage = module()
    model, optimizer, step, *rest = my_stage.made()

    def by_place(annealer: Any, /) -> None:
        step(annealer)

    assert anneal_stage((model, optimizer, by_place, *rest), target("masks"), "o", steps=4)["completed"]
    assert not Path("o/teacher.safetensors").exists()


def test_resuming_where_nothing_is_begins(here: Path, capsys: Any) -> None:
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", "resume=true") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["resumed_from"] is None
    assert answer["completed"]


def test_a_stage_that_was_killed_before_it_was_saved_begins(here: Path, capsys: Any) -> None:
    assert run("stage=my_stage:stage", *SETTINGS, "out=whole") == 0
    Path("o").mkdir()
    for name in ("log.jsonl", "teacher.safetensors", ".state.safetensors.1.tmp"):
        Path("o", name).write_text("cut o")
    assert run("stage=my_stage:stage", *SETTINGS, "out=o") == 2  # it might be something else
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", "resume=true") == 0
    same("whole", "o")


def test_what_a_kill_left_of_a_save_is_gone_when_the_stage_is_over(here: Path) -> None:
    assert run("stage=my_stage:stage", *SETTINGS, "out=whole") == 0
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", signals={9: signal.SIGTERM}) == 2
    Path("o/.state.safetensors.1.tmp").write_text("cut o")
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", "resume=true") == 0
    same("whole", "o")


def test_what_cannot_go_on_is_refused_with_all_reasons(here: Path, capsys: Any) -> None:
    run("stage=my_stage:stage", *SETTINGS, "out=o", signals={9: signal.SIGINT})
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert run(*words, "out=o") == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return str(said)

    before = {path.name: path.read_bytes() for path in Path("o").iterdir()}
    assert "out='o' holds an interrupted stage; add resume=true to go on with it, or" in refused(
        "stage=my_stage:stage", *SETTINGS
    )
    said = refused("stage=my_stage:stage", "plan=p.safetensors", "steps=25", "budget=0.2", "resume=true")
    assert "steps: 24 there, 25 here; budget: 0.01 there, 0.2 here; validate_every: 4 there, null here" in said
    assert "masks: with digest " in said
    assert "plan: none there, with digest" in said
    said = refused("stage=my_stage:another", *SETTINGS, "resume=true")
    assert "validate: a function there, None here; optimizer: AdamW of 11 parameters there, SGD of" in said
    assert "kept: sampler, scheduler there, nothing here" in said
    assert "parameter wide.weight: none there, float32 of shape (4, 3) here" in said
    assert {path.name: path.read_bytes() for path in Path("o").iterdir()} == before
    damaged = bytearray(before["state.safetensors"])
    damaged[-1] ^= 1
    Path("o/state.safetensors").write_bytes(damaged)
    assert "its bytes aren't those that were written" in refused("stage=my_stage:stage", *SETTINGS, "resume=true")
    save_state(Path("o/state.safetensors"), "recording", {})
    assert "expected a gradloc annealing stage file" in refused("stage=my_stage:stage", *SETTINGS, "resume=true")


def test_a_finished_stage_is_not_resumed(here: Path, capsys: Any) -> None:
    assert run("stage=my_stage:stage", *SETTINGS, "out=o") == 0
    assert run("stage=my_stage:stage", *SETTINGS, "out=o", "resume=true") == 2
    assert (
        "out='o' holds something, but no interrupted stage; name the directory of one, or a new one."
        in capsys.readouterr().err
    )


def test_what_cannot_be_saved_is_said_and_ends_nothing(here: Path, capsys: Any) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"place": Path()}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    my_stage = module()
    my_stage.stage = lambda: (*my_stage.made()[:4], {"odd": Odd()})
    with pytest.warns(RuntimeWarning, match=r"the stage goes on, but can't be resumed: a \w+Path can't be kept"):
        assert main(["anneal", "stage=my_stage:stage", *SETTINGS, "out=o"]) == 0
    assert json.loads(capsys.readouterr().out)["completed"]


@pytest.mark.parametrize(
    ("step", "kept", "words", "message"),
    [
        (lambda: None, {}, ["distill=1"], r"distill=1.0 needs a train_step\(annealer\) that adds"),
        (lambda annealer: None, {}, ["distill=1"], r"distill=1.0, but train_step\(annealer\) didn't ask for"),
        (lambda annealer: None, {}, ["distill=-1"], r"distill=-1.0 must be 0 or more"),
        (lambda annealer: annealer.distillation(torch.ones(1, 2)), {}, [], r"there is no teacher: pass distill="),
        (lambda batch, rate, size=1: None, {}, [], r"train_step asks for batch, rate; it takes nothing, or annealer"),
        (lambda: None, {"a": 1, "b": []}, [], r"'a' of the fifth value is a int, which has no .*'b' of the fifth"),
        (lambda: None, [1], [], r"the fifth value is a list, not a dict"),
    ],
)
def test_wrong_stages_get_one_line(
    here: Path, capsys: Any, step: Any, kept: Any, words: list[str], message: str
) -> None:
    my_stage = module()
    my_stage.stage = lambda: (*my_stage.made()[:2], step, None, kept)
    assert main(["anneal", "stage=my_stage:stage", *SETTINGS, *words]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_signals_are_put_off_where_nobody_else_handles_them() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with put_off() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [signal.SIGTERM]
            assert not interrupts.asked
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the last good state is being written
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: put_off().__enter__().asked).result() is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
