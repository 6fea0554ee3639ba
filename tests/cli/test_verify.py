"""``gradloc verify`` in a process of its own, which has loaded nothing that the command doesn't load itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from gradloc.cli.main import main
from gradloc.core.operators import KINDS
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.route.find import find_operators
from tests.route.operator_cases import CASES, draw_labels


@pytest.fixture
def every_kind(tmp_path: Path) -> list[str]:
    """Files of a plan with an operator of each kind, and of the weights: the words for verify."""
    cases = {case.kind: case for case in reversed(CASES.values())}
    model = nn.ModuleDict({kind: case.make(4, True) for kind, case in cases.items()}).float()
    found, _ = find_operators(model)
    chains = tuple(ChainPlan(c, tuple(draw_labels(c.widths, 2, 0, equal=True)), 2) for c in found)
    assert {chain.chain.kind for chain in chains} == set(KINDS)
    plan = BlockPlan("structural", chains, "none").save(tmp_path / "p.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    return [f"plan={plan}", f"weights={tmp_path}/w.safetensors"]


def test_a_fresh_process_verifies_operators_of_every_kind(every_kind: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "gradloc", "verify", *every_kind], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("passed")
    assert {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("ok")} == set(KINDS)


def test_what_a_plan_cuts_is_said_and_nothing_of_it_where_that_is_zero(every_kind: list[str], capsys: Any) -> None:
    plan, weights = (Path(word.partition("=")[2]) for word in every_kind)
    assert main(["verify", *every_kind]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("passed: the blocks compute what the plan promises. But it cuts weights that are not zero")
    masks = BlockPlan.load(plan).masks
    values = load_file(weights)
    lost = {
        name: float(1 - (values[name] * masks[name]).square().sum() / values[name].square().sum()) for name in masks
    }
    for name, share in lost.items():
        said = next(line for line in lines if line.startswith(f"     {name}: ") and "squared weights" in line)
        assert float(said.split(": ")[1].split(" %")[0]) == pytest.approx(100 * share, rel=0.01)
    BlockPlan.load(plan).with_annealed(True).save(
        plan
    )  # a stage took that to zero, so that these weights aren't the stage's
    assert main(["verify", *every_kind]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("failed")
    assert sum(line.startswith("FAIL") and "where the stage left none" in line for line in lines) == len(KINDS)
    save_file({name: value * masks[name] if name in masks else value for name, value in values.items()}, weights)
    assert main(["verify", *every_kind]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "passed"
    assert not any("lie outside" in line for line in lines)
