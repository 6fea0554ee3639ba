"""What can be known of the package without building it; ``make package`` builds, installs and tries it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SECONDS = 0.2
"""What importing gradloc may take beyond torch."""
BESIDE = {"omegaconf"}
"""Hydra's own; the newest that the oldest Hydra doesn't warn of."""
TOOLS = {"build", "ruff", "mypy", "pandas-stubs", "scipy-stubs"}
"""Of the people who change gradloc; only the pinned versions are used."""
EXPORTER = {"onnx", "onnxscript", "onnxruntime"}
"""As new as torch, so that only the pinned versions can be tried."""


def pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {plain(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, str]:
    """Lower bound by name, "" where there is none, of the package and all extras."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {}
    for line in lines:
        name, bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\w.]+))?(?:,<[\w.]+)?", line).groups()
        if name != "gradloc":
            found[plain(name)] = bound or ""
    return found


def test_every_dependency_is_pinned() -> None:
    assert set(requirements()) <= set(pins("constraints.txt"))


def test_lower_bounds_are_those_that_are_tested() -> None:
    """`make lowest` installs constraints-lowest.txt, so a bound that isn't in it is a bound that nobody tried."""
    tried = pins("constraints-lowest.txt")
    assert set(requirements()) - TOOLS - EXPORTER == set(tried) - BESIDE
    for name, bound in requirements().items():
        if name not in TOOLS | EXPORTER | {"torch"}:  # of torch, only the pinned version is at hand for CPUs
            assert re.sub(r"(\.0)+$", "", tried[name]) == re.sub(r"(\.0)+$", "", bound), name
    assert tried["torch"] == pins("constraints.txt")["torch"]


def test_every_file_that_is_no_code_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["gradloc"]
    files = [path.relative_to(ROOT / "gradloc") for path in (ROOT / "gradloc").rglob("*") if path.is_file()]
    others = [str(path) for path in files if path.suffix != ".py" and "__pycache__" not in path.parts]
    assert "py.typed" in others
    assert not [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)]


def test_importing_takes_next_to_nothing_beyond_torch() -> None:
    """Of processor time, which a busy machine doesn't change as much; the median of three fresh processes."""
    code = "import torch, time; began = time.process_time(); import gradloc; print(time.process_time() - began)"
    taken = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)
    ]  # fmt: skip
    assert median(taken) < SECONDS, taken


def test_a_clone_beside_the_script_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """An editable install must win over a directory of the same name, which Python takes for a namespace package."""
    (tmp_path / "gradloc" / "docs").mkdir(parents=True)
    (tmp_path / "train.py").write_text("import gradloc; print(gradloc.wrap.__name__)")
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "wrap", done.stderr
