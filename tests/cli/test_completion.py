"""Tab completion, as shells would ask for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from gradloc.analyze.correction import CORRECTIONS
from gradloc.analyze.criteria import CRITERIA
from gradloc.analyze.requests import SCOPES
from gradloc.anneal.schedule import SCHEDULES
from gradloc.cli.commands import COMMANDS
from gradloc.cli.completion import script
from gradloc.core.layout import GRANULARITIES
from gradloc.core.masks import NULLS
from gradloc.decompose.structural import FORMS

BREAKS = "\"'@><=;|&(: \t\n"
"""What ends a word in bash, by default."""


def bash(line: str, here: Path, breaks: str = BREAKS) -> list[str]:
    """What bash would offer at the end of a line."""
    ask = """
source "$1"
COMP_WORDBREAKS=$2 COMP_LINE=$3 COMP_POINT=${#3}
_gradloc
printf '%s\\n' "${COMPREPLY[@]}"
"""
    path = here / "completion.bash"
    path.write_text(script("bash", COMMANDS))
    command = ["bash", "--norc", "-c", ask, "bash", str(path), breaks, line]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    assert done.stderr == ""
    return [offered for offered in done.stdout.split("\n") if offered]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gradloc dec", ["decompose"]),
        ("gradloc re", ["record-plan", "report"]),
        ("gradloc masks den", ["density="]),
        ("gradloc masks run=a criterion=mag", ["magnitude", "magnitude_increase"]),
        ("gradloc masks granularity=2", ["2:4"]),
        ("gradloc masks granularity=2:", ["4"]),
        ("gradloc report wandb=", ["true", "false"]),
        ("gradloc masks preset=un", ["units"]),
        ("gradloc report run=ru", ["runs"]),
        ("gradloc report run=runs/a", ["runs/a", "runs/a b"]),
        ("gradloc report html=runs/a\\ ", ["runs/a b"]),
        ("gradloc completion z", ["zsh"]),
        ("gradloc masks density=", []),
        ("gradloc nonsense x", []),
        ("gradloc masks --m", ["--multirun"]),
    ],
)
def test_bash(line: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a b").mkdir()
    assert sorted(bash(line, tmp_path)) == sorted(offered)


def test_bash_where_words_go_on_behind_an_equals_sign(tmp_path: Path) -> None:
    assert bash("gradloc masks null=i", tmp_path, BREAKS.replace("=", "").replace(":", "")) == ["null=init"]


def test_bash_knows_every_command_and_setting(tmp_path: Path) -> None:
    from dataclasses import fields

    assert set(COMMANDS) <= set(bash("gradloc ", tmp_path))
    for name, command in COMMANDS.items():
        offered = bash(f"gradloc {name} ", tmp_path)
        assert {f"{setting.name}=" for setting in fields(command.settings)} <= set(offered) | {"shell=", "json="}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell: str, tmp_path: Path) -> None:
    made = script(shell, COMMANDS)
    for name, command in COMMANDS.items():
        assert name in made
        assert all(preset in made for preset in command.presets)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} isn't installed here; what the script says was looked at, not run")
    (tmp_path / "script").write_text(made)
    done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_offers_values(tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish isn't installed here")
    (tmp_path / "script").write_text(script("fish", COMMANDS))
    (tmp_path / "runs").mkdir()

    def offered(line: str) -> set[str]:
        ask = f"source script; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return {text.split("\t")[0] for text in done.stdout.splitlines()}

    assert "decompose" in offered("gradloc dec")
    assert offered("gradloc masks null=i") >= {"null=init"}
    assert "run=runs/" in offered("gradloc report run=ru")


def test_choices_are_those_of_the_code() -> None:
    masks = COMMANDS["masks"].choices
    assert set(masks["criterion"]) == set(CRITERIA) - {"wanda"}, "which needs activations"
    assert set(masks["null"]) == set(NULLS) - {"given"}, "which are weights, and need Python"
    assert set(masks["scope"]) == set(SCOPES)
    assert set(masks["correction"]) == set(CORRECTIONS)
    assert set(masks["granularity"]) == {"dependency", "2:4", *GRANULARITIES}
    assert COMMANDS["record-plan"].choices["granularity"] == GRANULARITIES
    assert set(COMMANDS["anneal"].choices["schedule"]) == set(SCHEDULES)
    assert set(COMMANDS["decompose"].choices["form"]) == set(FORMS if isinstance(FORMS, tuple) else get_args(FORMS))


def test_choices_and_outputs_are_settings() -> None:
    for command in COMMANDS.values():
        known = set(command.settings.__dataclass_fields__)
        assert {*command.choices, *command.files, *command.directories, *command.reads, *command.about} <= known
        assert ("overwrite" in known) == bool(command.files)
        assert ("preset" in known) == bool(command.presets)
