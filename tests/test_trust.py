"""A run may come from anywhere, and a model may name its parts as it likes."""

from __future__ import annotations

import re
from pathlib import Path

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
    assert users == {"gradloc/__init__.py", "gradloc/cli/commands.py"}


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
