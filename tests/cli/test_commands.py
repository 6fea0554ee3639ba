"""Commands as a stranger runs them: answers, exit codes, and one line for what is wrong."""

from __future__ import annotations

import json

import pytest

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
    code, answer = ask("verify", f"run={path}", f"plan={tmp_path}/p.safetensors")
    assert code == 0
    assert answer["passed"]
    assert ask("doctor")[1]["gradloc"]


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
