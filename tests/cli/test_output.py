"""What reaches a terminal, a pipe and a page: progress where somebody looks, nothing but the answer elsewhere, names as text."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import gradloc
from gradloc.cli.commands import COMMANDS
from gradloc.cli.main import main
from gradloc.cli.progress import bar, bars

NASTY = "\x1b[2Jclear\u202e<script>alert(1)</script>\n" + "x" * 500


def test_a_bar_says_rate_and_time_left() -> None:
    console = Console(force_terminal=True, width=120, record=True)
    with bar("counting [red]windows[/red]", console) as tell:
        for done in range(1, 6):
            tell(done, 10)
    said = console.export_text()
    assert "counting [red]windows[/red]" in said
    assert "5/10" in said
    assert "/s" in said or "s each" in said


def test_bars_within_bars_share_a_display() -> None:
    console = Console(force_terminal=True, width=120, record=True)
    with bars(console), bar("outer") as outer, bar("inner") as inner:
        inner(1, 2)
        outer(1, 3)
    assert "inner" in console.export_text()


def test_nothing_is_drawn_unless_somebody_looks(capsys: Any) -> None:
    with bar("counting") as tell:
        tell(1, 2)
    assert capsys.readouterr() == ("", "")


def test_verify_names_the_operator_that_it_is_at(recorded: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, _, path = recorded(steps=20)
    plan = gradloc.plan_blocks(model, path, blocks=2, operators=["chain", "attention"]).save(tmp_path / "p.safetensors")
    told: list[tuple[float, float, str]] = []

    @contextmanager
    def heard(text: str) -> Iterator[Any]:
        yield lambda done, total, note="": told.append((done, total, note))

    monkeypatch.setattr("gradloc.cli.stages.bar", heard)
    assert main(["verify", f"plan={plan}", f"run={path}"]) == 0
    assert told == [(0, 1, ", now ffn"), (1, 1, "")]


def test_small_sizes_and_a_model_without_a_name(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A model that is one feed-forward network by itself, whose plan has no 0.0 MB and no line that begins with a colon."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run="r", every=1)
    for _ in range(6):
        model(torch.randn(20, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    gradloc.plan_blocks(model, "r", blocks=2).save("p.safetensors")
    assert main(["verify", "plan=p.safetensors", "run=r"]) == 0
    said = capsys.readouterr().out
    assert "ok   the model itself: " in said
    assert " :" not in said
    assert " kB, dense" in said
    Path("small.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(8, 8)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["record-plan", "model=small:build"]) == 0
    assert "0.0 MB" not in capsys.readouterr().out


def run_in_shell(words: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradloc", *words]
    return subprocess.run(command, text=True, timeout=300, **settings)


def test_pipes_get_the_answer_and_terminals_the_progress(recorded: Any) -> None:
    *_, path = recorded(steps=20)
    words = ["masks", f"run={path}", "density=0.5"]
    piped = run_in_shell(words, capture_output=True)
    assert piped.returncode == 0
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout
    ours, theirs = pty.openpty()
    watched = run_in_shell(words, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert watched.stdout == piped.stdout
    assert "finding masks" in drawn


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_answers_fit_the_terminal(columns: int, recorded: Any) -> None:
    *_, path = recorded(steps=20)
    commands = [["--help"], ["masks", "--help"], ["anneal", "--help"], ["report", f"run={path}"]]
    lines = in_a_terminal(commands, columns)
    written = [line for line in lines if not line.startswith(("Sweep", "Example", "gradloc", "key=a,b", "page"))]
    assert max(map(len, written)) <= columns, max(written, key=len)
    assert max(map(len, lines)) > columns // 2


def in_a_terminal(commands: list[list[str]], columns: int) -> list[str]:
    """What commands write to a terminal of so many columns, one after another in one process."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    bare = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    program = f"import sys; from gradloc.cli.main import main; sys.exit(max(map(main, {commands!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=theirs, stderr=subprocess.PIPE, env=bare, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
        while piece := os.read(ours, 1 << 16):
            said += piece
    os.close(ours)
    return said.decode().splitlines()


@pytest.mark.parametrize("more", [[], ["json=true"]], ids=["text", "json"])
def test_every_reading_command_is_quiet_when_piped(more: list[str], recorded: Any, tmp_path: Path, capsys: Any) -> None:
    *_, path = recorded(steps=20, firing_tokens=16)
    out = tmp_path / ("json" if more else "text")
    for words in (
        ["report", f"run={path}"],
        ["analyze", f"run={path}", "roll_up=true"],
        ["compare", f"runs=[{path},{path}]"],
        ["masks", f"run={path}", "density=0.5"],
        ["decompose", f"run={path}", "blocks=2", "operators=[chain]", f"out={out}.safetensors"],
        ["verify", f"run={path}", f"plan={out}.safetensors"],
        ["doctor", f"path={tmp_path}"],
        ["completion", "bash"],
    ):
        assert main([*words, *more]) in (0, 1), words
        said = capsys.readouterr()
        assert said.err == ""
        assert "\x1b" not in said.out
        assert "\r" not in said.out
        assert said.out
        if more:
            assert isinstance(json.loads(said.out), dict)


def test_who_stops_reading_is_not_told_off(recorded: Any) -> None:
    *_, path = recorded(steps=20)
    command = f"{sys.executable} -m gradloc analyze run={path} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_the_demo_goes_on_when_nobody_reads() -> None:
    """Its page is written after minutes of work, and exit code 1 would say that the answer is no."""
    program = (
        "import sys; from gradloc.cli.demo.run import LastingConsole; out = LastingConsole(); "
        "[out.print('line') for _ in range(20000)]; sys.stderr.write('the end')"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}" | head -1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "the end")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_with_another_encoding(encoding: str) -> None:
    done = run_in_shell(["--help"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")


def test_help_has_an_example_and_every_setting(capsys: Any) -> None:
    for name, command in COMMANDS.items():
        for words in ([name, "--help"], ["help", name]):
            assert main(words) == 0
            said = capsys.readouterr().out
            assert f"Example: {command.example}" in said
            assert all(f"  {setting}=" in said for setting in command.settings.__dataclass_fields__)
            assert command.example.split()[:2] == ["gradloc", name]
    assert main([]) == 2
    assert all(f"  {name} " in capsys.readouterr().out for name in [next(iter(COMMANDS))])


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A run of a model whose parts have names that would clear the screen, run a script, and fill a page."""
    model = nn.ModuleDict()
    model._modules[NASTY] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    place = tmp_path / os.fsdecode(b"r\xe4\x1b[31m")
    gradloc.wrap(optimizer, model, run=place, every=1, flush_every=10, firing_every=1, on_error="raise")
    for _ in range(20):
        model._modules[NASTY](torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return place


def test_names_are_shown_and_not_obeyed(nasty: Path, tmp_path: Path, capsys: Any) -> None:
    info = json.loads((nasty / "run.json").read_text())
    info["notes"] = [NASTY]
    info["optimizer"] = NASTY
    (nasty / "run.json").write_text(json.dumps(info))
    plan = tmp_path / "p.safetensors"
    for words in (
        ["report", f"run={nasty}", f"html={tmp_path}/page.html"],
        ["analyze", f"run={nasty}"],
        ["masks", f"run={nasty}", "density=0.5"],
        ["decompose", f"run={nasty}", "blocks=2", f"out={plan}"],
        ["verify", f"run={nasty}", f"plan={plan}"],
        ["compare", f"runs=['{nasty}','{nasty}']", f"html={tmp_path}/compare.html"],
        ["masks", f"run={nasty}", "include=[nothing]"],
    ):
        main(words)
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert all(c.isprintable() or c == "\n" for c in text), words
            assert all(ord(c) < 0x202A or ord(c) > 0x202E for c in text)
            text.encode()
        assert "Traceback" not in said.err
    for page in ("page.html", "compare.html"):
        text = (tmp_path / page).read_text()
        assert "<script>alert(1)" not in text
    gradloc.report(nasty, show=False).show()
    assert "\x1b" not in capsys.readouterr().out
