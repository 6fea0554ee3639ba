"""Imports point down: cli → pipeline → stages → core → errors, and stages don't know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradloc

PACKAGE = Path(__file__).parent.parent / "gradloc"
STAGES = {"record", "store", "analyze", "anneal", "decompose", "route", "reporting"}
TORCH_ALLOWED = {"record", "anneal", "route", "integrations", "pipeline", "cli"}
TORCH_IN_CORE = {"core/activations.py", "core/checkpoint.py", "core/masks.py", "core/places.py", "core/router.py"}
TRAINERS = {"transformers", "lightning", "pytorch_lightning", "accelerate"}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    used = imports_of(path)
    roots = {name.split(".")[0] for name in used}
    rooms = {name.split(".")[1] for name in used if name.startswith("gradloc.")}
    if own == "errors":
        assert not rooms
    elif own == "core":
        assert rooms <= {"core", "errors"}
    elif own in STAGES:
        assert rooms <= {"core", "errors", own}
    elif own == "pipeline":
        assert "cli" not in rooms
    elif own == "integrations":
        assert rooms <= {"core", "errors", "anneal", "record", "pipeline", own}
    if own != "integrations":
        assert "integrations" not in rooms
        assert not roots & TRAINERS
    if own not in TORCH_ALLOWED and own != "__init__" and str(path.relative_to(PACKAGE)) not in TORCH_IN_CORE:
        assert "torch" not in roots
    if own != "store":
        assert "pyarrow" not in roots
    for optional in ("wandb", "tensorboard"):
        if path.name != f"{optional}_sink.py":
            assert optional not in roots


def test_importing_starts_nothing_and_loads_nothing_optional() -> None:
    code = (
        "import threading, sys, torch, gradloc; "
        "print(threading.active_count(), *(m for m in ('pandas', 'pyarrow', 'scipy', 'torch._dynamo', 'wandb', 'tensorboard', 'matplotlib', 'hydra', 'jinja2', 'transformers', 'lightning', 'accelerate') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_a_name_loads_what_it_needs_and_not_every_stage() -> None:
    code = (
        "import sys, torch, gradloc; gradloc.wrap, gradloc.load_run; "
        "print(*(m for m in ('gradloc.api', 'gradloc.anneal', 'scipy.optimize', 'torch._dynamo', 'torch.distributed.tensor', 'matplotlib') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_has_a_home() -> None:
    for name in gradloc.__all__:
        assert getattr(gradloc, name) is getattr(gradloc.api, name)
    assert set(gradloc.__all__) <= set(dir(gradloc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gradloc.nothing
