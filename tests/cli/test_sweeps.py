"""One command with several values: the jobs that words ask for, outputs apart, and the answers side by side."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradloc
from gradloc.cli.commands import COMMANDS
from gradloc.cli.main import main
from gradloc.cli.sweep import file_labels
from gradloc.cli.words import jobs_of
from gradloc.errors import ConfigError
from tests.conftest import make_net, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two runs of one model."""
    here = tmp_path_factory.mktemp("runs")
    for seed, name in ((0, "a"), (1, "b")):
        model, optimizer = make_net(seed)
        gradloc.wrap(optimizer, model, run=here / name, every=1, flush_every=10, firing_every=1, firing_tokens=16)
        train(model, optimizer, 40)
        gradloc.recorder_of(optimizer).close()
    return here


@pytest.fixture
def ask(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(runs)

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        code = main([*words, "json=true"])
        said = capsys.readouterr()
        assert said.err == "", "quiet when piped"
        return code, json.loads(said.out)

    return call


def test_densities_side_by_side(ask: Any) -> None:
    code, answer = ask("masks", "run=runs/a", "density=0.3,0.5,0.7", "out=kept", "-m")
    assert code == 0
    assert [row["density"] for row in answer["table"]] == ["0.3", "0.5", "0.7"]
    assert [row["keeps"] for row in answer["table"]] == pytest.approx([0.3, 0.5, 0.7], abs=0.01)
    assert sorted(path.name for path in Path("kept").iterdir()) == [
        "0.3.safetensors", "0.5.safetensors", "0.7.safetensors", "sweep.json",
    ]  # fmt: skip
    saved = [gradloc.MaskSet.load(row["out"]) for row in answer["table"]]
    for row, masks in zip(answer["table"], saved, strict=True):
        everywhere = saved[0].diff(masks).set_index("parameter").loc["all"]
        assert row["as the first"] == pytest.approx(everywhere["both"] + everywhere["neither"])
    assert json.loads(Path("kept/sweep.json").read_text())["table"] == answer["table"]
    assert answer["compare"] is None
    assert answer["left"] == []


def test_every_combination_in_order(ask: Any) -> None:
    _, answer = ask("masks", "run=runs/a,runs/b", "density=0.2,0.4", "criterion=saliency,magnitude", "-m")
    found = [(row["run"], row["density"], row["criterion"]) for row in answer["table"]]
    assert found == list(itertools.product(["runs/a", "runs/b"], ["0.2", "0.4"], ["saliency", "magnitude"]))
    assert not list(Path().glob("*.safetensors"))


def test_several_runs_get_the_page_that_compares_them(ask: Any) -> None:
    code, answer = ask("masks", "run=runs/a,runs/b", "density=0.5", "out=both", "--multirun")
    assert code == 0
    assert answer["compare"]["findings"]
    assert Path("both/compare.html").read_text().lower().startswith("<!doctype html>")
    assert {path.name for path in Path("both").glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}
    code, answer = ask("report", "run=runs/a,runs/b", "html=pages", "-m")
    assert code == 0
    assert {path.name for path in Path("pages").iterdir()} == {"a.html", "b.html", "compare.html", "sweep.json"}
    code, answer = ask("analyze", "run=runs/a,runs/b", "out=curves", "-m")
    assert {path.name for path in Path("curves").glob("*.csv")} == {"a.csv", "b.csv"}


def test_a_job_that_is_refused_is_named_and_the_others_run(ask: Any) -> None:
    code, answer = ask("masks", "run=runs/a,runs/c,runs/b", "density=0.5", "-m")
    assert code == 2
    assert [job["code"] for job in answer["jobs"]] == [0, 2, 0]
    assert "no run at 'runs/c'" in answer["table"][1]["refused"]
    assert answer["table"][2]["keeps"] == pytest.approx(0.5, abs=0.01)
    assert "can't be compared: no run at" in answer["compare"]["text"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "gradloc: interrupted"),
        (OSError(28, "No space left on device"), "gradloc: masks: [Errno 28] No space left on device. Check the path"),
        (MemoryError("8 GB"), "gradloc: masks: this needs more memory than there is (8 GB)"),
    ],
)
def test_what_ends_a_sweep_leaves_the_summary_so_far(
    ask: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: BaseException, says: str
) -> None:
    whole = COMMANDS["masks"]

    def run(settings: Any) -> Any:
        if settings.density == 0.5:
            raise error
        return whole.run(settings)

    monkeypatch.setitem(COMMANDS, "masks", replace(whole, run=run))
    assert main(["masks", "run=runs/a,runs/c", "density=0.3,0.5", "out=kept", "-m"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(says)
    assert said.out == ""
    summary = json.loads(Path("kept/sweep.json").read_text())
    assert [job["swept"] for job in summary["jobs"]] == [{"run": "runs/a", "density": "0.3"}]
    assert summary["table"][0]["keeps"] == pytest.approx(0.3, abs=0.01)
    assert summary["left"] == [
        {"run": r, "density": d} for r, d in (("runs/a", "0.5"), ("runs/c", "0.3"), ("runs/c", "0.5"))
    ]
    assert sorted(path.name for path in Path("kept").iterdir()) == ["a-0.3.safetensors", "sweep.json"]


def test_a_no_among_the_answers_is_a_no(ask: Any) -> None:
    code, answer = ask("decompose", "run=runs/a", "blocks=2,4", "operators=[chain]", "out=plans", "-m")
    assert code == max(job["code"] for job in answer["jobs"])
    assert [row["found"] for row in answer["table"]] == [2, 4]
    verdicts = [gradloc.BlockPlan.load(row["out"]).verdict for row in answer["table"]]
    assert [row["verdict"] for row in answer["table"]] == verdicts
    assert [job["code"] for job in answer["jobs"]] == [int(verdict == "none") for verdict in verdicts]


def test_the_table_in_the_terminal(ask: Any, capsys: Any) -> None:
    assert main(["masks", "run=runs/a", "density=0.3,0.5", "-m"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0].strip() or heading.split()
    assert heading.split() == ["density", "keeps", "weights", "as", "the", "first"]
    assert [line.split()[0] for line in rows] == ["0.3", "0.5"]


def test_presets_are_what_they_say_and_what_is_given_wins(ask: Any) -> None:
    _, preset = ask("masks", "run=runs/a", "preset=half", "out=p.safetensors")
    _, given = ask("masks", "run=runs/a", "density=0.5", "out=g.safetensors")
    assert preset["thresholds"] == given["thresholds"]
    assert ask("masks", "run=runs/a", "preset=half", "density=0.25")[1]["density"] == pytest.approx(0.25, abs=0.01)
    code, answer = ask("masks", "run=runs/a", "preset=half,units,tested", "-m")
    assert code == 0
    assert [row["preset"] for row in answer["table"]] == ["half", "units", "tested"]


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n, command in COMMANDS.items() for p in command.presets])
def test_every_preset_is_of_settings_that_there_are(name: str, preset: str) -> None:
    [job] = jobs_of(name, COMMANDS[name], ["run=a", f"preset={preset}"])
    for key, value in COMMANDS[name].presets[preset].items():
        assert getattr(job.settings, key) == value


def test_ranges_and_choices() -> None:
    jobs = jobs_of("masks", COMMANDS["masks"], ["run=a", "density=range(0.1,0.5,0.1)", "-m"])
    assert [job.settings.density for job in jobs] == [0.1, 0.2, 0.3, 0.4]
    jobs = jobs_of("decompose", COMMANDS["decompose"], ["run=choice('a b',c)", "blocks=2,auto", "-m"])
    assert [(job.settings.run, job.settings.blocks) for job in jobs] == [
        ("a b", 2), ("a b", "auto"), ("c", 2), ("c", "auto"),
    ]  # fmt: skip


def test_labels_are_apart_and_are_names_of_files() -> None:
    assert file_labels([{"run": "x/a"}, {"run": "y/a"}, {"run": "z/a"}]) == ["a", "a.2", "a.3"]
    assert file_labels([{"include": "[ffn.*]", "alpha": "0.1"}]) == ["_ffn._-0.1"]
    assert file_labels([{"run": ".."}, {"run": "/"}]) == ["job", "_"]


def test_a_home_is_found() -> None:
    [job] = jobs_of("compare", COMMANDS["compare"], ["runs=['~/a',b]", "out=~/x.csv"])
    assert job.settings.runs == [str(Path.home() / "a"), "b"]
    assert job.settings.out == str(Path.home() / "x.csv")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(min_size=1, max_size=12) | st.text(alphabet="ab ,'\"\\=[]{}()~$%#&:/.0e1", min_size=1, max_size=8))
def test_a_path_is_what_was_typed(text: str) -> None:
    """Whatever Hydra's grammar has another use for; only quotes around, lists of values and ${…} mean something."""
    refusals = {
        "has several values": "," in text or "(" in text,
        "is empty": text in ("''", '""'),
        "is not read here": "${" in text,
        "NUL": "\0" in text,
        "needs run=": text.strip("'\"") == "???",
    }
    try:
        [job] = jobs_of("report", COMMANDS["report"], [f"run={text}"])
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
        if text[0] not in "'\"~":
            assert job.settings.run == text
    assert not said or any(meant in said and may for meant, may in refusals.items()), said
