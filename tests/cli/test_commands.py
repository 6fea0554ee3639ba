"""Commands as a stranger runs them: answers, exit codes, and one line for what is wrong."""

from __future__ import annotations

import json

import pytest

import gradloc
from gradloc.cli.main import main


def test_the_stages_from_the_shell(recorded, capsys, tmp_path) -> None:
    *_, path = recorded(steps=60, firing_tokens=16)

    def ask(*words: str) -> tuple[int, dict]:
        code = main([*words, "json=true"])
        return code, json.loads(capsys.readouterr().out)

    code, answer = ask("report", f"run={path}")
    assert code == 0
    assert (path / "report.html").exists()
    assert answer["findings"]
    code, answer = ask("analyze", f"run={path}", f"out={tmp_path}/curves.csv")
    assert code == 0
    assert len(answer["locality"]) == len((tmp_path / "curves.csv").read_text().splitlines()) - 1
    code, answer = ask("masks", f"run={path}", "density=0.3", "include=[ffn.*]", f"out={tmp_path}/m.safetensors")
    assert code == 0
    assert answer["density"] == pytest.approx(0.3, abs=0.01)
    code, answer = ask("masks", f"run={path}", "alpha=0.05")
    assert "does not mean not needed" in answer["doubt"]
    assert main(["masks", f"run={path}", "alpha=0.05"]) == 0
    printed = capsys.readouterr()
    assert "careful: what these masks take back" in printed.out
    assert not printed.err
    code, answer = ask("decompose", f"run={path}", "blocks=2", f"out={tmp_path}/p.safetensors")
    assert code == (answer["verdict"] == "none")
    skipped = answer["skipped"]
    assert {"tokens", "head"} <= set(skipped)
    main(["decompose", f"run={path}", "blocks=2"])
    printed = capsys.readouterr().out
    assert all(f"{name} stays dense: {why}\n" in printed for name, why in skipped.items())
    code, answer = ask("verify", f"run={path}", f"plan={tmp_path}/p.safetensors")
    assert code == 0
    assert answer["passed"]
    assert ask("doctor")[1]["gradloc"]


def test_search_writes_a_plan_of_the_runs_weights_and_prints_every_candidate(
    recorded, capsys, tmp_path, monkeypatch
) -> None:
    model, _, path = recorded(steps=60)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from tests.conftest import make_net\n\n\ndef build():\n    return make_net(7)[0]\n"
    )
    words = ["search", f"run={path}", "model=mine:build", "keep=0.5", "shuffles=1", "include=[ffn]", "tokens=[4]"]
    assert main([*words, "out=p.safetensors", "json=true"]) == 0
    answer = json.loads(capsys.readouterr().out)
    plan = gradloc.BlockPlan.load(tmp_path / "p.safetensors")
    expected = gradloc.search_blocks(model, path, keep=0.5, shuffles=1, include=["ffn"], tokens=[4])
    assert [row["kept"] for row in answer["candidates"]] == pytest.approx(expected.table["kept"].tolist())
    assert sum(row["chosen"] for row in answer["candidates"]) == 1
    assert answer["verdict"] == plan.verdict == expected.plan.verdict
    assert set(answer["chosen"]) == {"ffn"}
    assert "conv" in answer["skipped"]
    assert main(["verify", f"run={path}", "plan=p.safetensors"]) == 0
    capsys.readouterr()
    assert main(words) == 0
    _, heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["operator", "candidate", "weights", "kept", "latency", "speed-up", "chosen"]
    assert [line.split()[1] for line in lines[: len(answer["candidates"])]] == [
        row["candidate"].split()[0] for row in answer["candidates"]
    ]
    assert any("keeps" in line and "as fast as dense" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["msks"], "did you mean masks"),
        (["masks"], "needs run="),
        (["masks", "run=nowhere"], "no run at 'nowhere'"),
        (["masks", "nowhere"], "key=value"),
        (["masks", "run=x", "densty=1"], "did you mean density"),
        (["masks", "run=x", "density=much"], "must be a number or null"),
        (["verify", "run=x", "plan=y"], "not a readable plan"),
        (["report", "run=/dev/null"], "no run at"),
        (["decompose", "run=x", "seed=1.5"], "must be a whole number"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_two(words: list[str], message: str, capsys) -> None:
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) <= 1


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["masks", "--help"], ["demo", "--help"]])
def test_help(words: list[str], capsys) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out
