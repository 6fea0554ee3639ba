"""A run may come from anywhere, and a model may name its parts as it likes."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradloc

ROOT = Path(__file__).parents[1]
HOSTILE = ["../../outside", "<script>alert(1)</script>", "line\nbreak", 'quo"te', "-rf", "s3://bucket"]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for name in HOSTILE:
            self.parts._modules[name] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part(x) for part in self.parts.values())


def test_hostile_names_stay_inside(tmp_path: Path) -> None:
    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(
        optimizer, model, run=tmp_path / "runs" / "r", every=1, flush_every=2, firing_every=1, on_error="raise"
    )
    for _ in range(4):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = gradloc.report(show=False, wandb=False)
    gradloc.recorder_of(optimizer).close()
    page = report.save_html(tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert made == {"runs", "page.html"}
    allowed = re.compile(
        r"runs/r/(run\.json|snapshots/(init|last)\.rank-\d+\.safetensors|shards/rank-\d+/[a-z]+-\d+\.parquet|shards/rank-\d+/writer\.lock)"
    )
    files = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert files
    assert all(allowed.fullmatch(file) for file in files)
    run = gradloc.load_run(tmp_path / "runs" / "r")
    for name in HOSTILE:
        assert run.evidence(f"parts.{name}.0.weight").exposure == 4
        assert run.firings(f"parts.{name}.0").shape[1] == 8


@pytest.mark.parametrize("word", ["pickle", "torch.load", "eval(", "exec(", "shell=True", "yaml.load"])
def test_nothing_is_executed(word: str) -> None:
    """No reader or writer of runs has a way to run what it reads."""
    pattern = re.compile(r"(?<![\w.])" + re.escape(word))
    for path in (ROOT / "gradloc").rglob("*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.S)
        assert not pattern.search(code), path


def test_only_the_command_line_imports_what_a_word_names() -> None:
    """Code by name comes from the user's own words to a command, never from a run, a plan or masks; the package looks up its own."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gradloc").rglob("*.py")
        if "import_module" in path.read_text() or "__import__" in path.read_text()
    }
    assert users == {"gradloc/__init__.py", "gradloc/cli/user_code.py"}


def test_the_environment_stays_out_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a-very-secret-value")
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, firings=False)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    gradloc.recorder_of(optimizer).close()
    for path in (tmp_path / "r").rglob("*"):
        assert not path.is_file() or b"a-very-secret-value" not in path.read_bytes()


WATCH = """
import os, sys

here = os.path.realpath(".")
done = []


def watch(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"):
        done.append((event, repr(arguments[0])))
    place = arguments[0].co_filename if event == "exec" else arguments[1] if event == "import" else None
    if place and os.path.isfile(place) and os.path.realpath(place).startswith(here):
        done.append((event, place))


import gradloc.cli.main
import hydra, matplotlib.pyplot, pyarrow.parquet, safetensors.torch, scipy.stats, torch._dynamo  # which look at the machine as they are loaded

sys.addaudithook(watch)
for words in sys.argv[1:]:
    gradloc.cli.main.main(words.split("|"))
print("DONE", done)
"""


def test_commands_on_anothers_run_execute_nothing_of_it(recorded: Callable[..., Any], tmp_path: Path) -> None:
    """Every reading command, from within the run's directory, which is full of files that a careless program would take for its own."""
    *_, path = recorded(steps=20, firing_tokens=16)
    poison = "import pathlib; pathlib.Path('executed').touch()\n"
    for name in (
        "sitecustomize.py",
        "conftest.py",
        "torch.py",
        "conf.py",
        "hydra_plugins.py",
        "__init__.py",
        "gradloc.py",
        "user.py",
    ):
        (path / name).write_text(poison)
    (path / "masks.yaml").write_text("_target_: os.mkdir\npath: executed\n")
    (path / ".hydra").mkdir()
    (path / ".hydra" / "config.yaml").write_text("_target_: os.mkdir\npath: executed\n")
    (path / "snapshots" / "extra.safetensors").write_bytes(pickle.dumps(_Maker()))
    (path / "shards" / "rank-00000" / "extra.pkl").write_bytes(pickle.dumps(_Maker()))
    info = json.loads((path / "run.json").read_text())
    info["config"] |= {"_target_": "os.mkdir", "firing_modules": ["user:build"], "note": "${oc.env:HOME}"}
    info["optimizer"] = "!!python/object/apply:os.mkdir [executed]"
    (path / "run.json").write_text(json.dumps(info))
    plan = tmp_path / "p.safetensors"
    commands = [
        "report|run=.", "analyze|run=.", "masks|run=.|density=0.5", "masks|run=.", f"decompose|run=.|blocks=2|out={plan}",
        f"verify|plan={plan}|run=.", "compare|runs=[.,.]", "masks|run=.|density=0.3,0.5|-m",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *commands], capture_output=True, text=True, cwd=path, env=environment, timeout=300
    )
    assert done.stdout.rstrip().endswith("DONE []"), done.stdout[-500:] + done.stderr
    assert done.stderr == ""
    assert not (path / "executed").exists()


class _Maker:
    """Were it unpickled, a directory would appear."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)
