"""``gradloc doctor`` finds what is wrong, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradloc.cli import doctor
from gradloc.cli.main import main
from tests.object_server import Server


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in anywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


def ask(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", *words, "json=true"])
    said = capsys.readouterr()
    assert said.err == ""
    return code, json.loads(said.out)


def test_a_machine_that_is_well(capsys: Any, tmp_path: Path) -> None:
    code, found = ask(capsys, "path=runs/new")
    assert code == 0
    assert found["healthy"]
    assert found["problems"] == []
    assert found["path"]["written_and_read"]
    assert found["path"]["free_bytes"] > 0
    assert {"python", "torch", "numpy", "pandas", "pyarrow", "hydra-core", "wandb"} <= set(found["versions"])
    assert found["devices"][0]["threads"] >= 1
    assert 0 < found["recording"]["step_microseconds"] < found["recording"]["observed_step_microseconds"] < 1e6
    assert found["wandb"] == {"mode": "offline", "logged_in": False}
    assert set(found["extras"]) == set(doctor.EXTRAS)
    assert list(tmp_path.iterdir()) == [], "nothing is left, and the directory isn't made"
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is well"
    assert all(line.startswith("ok ") for line in lines[:-1])


def test_a_path_that_cant_be_written(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, found = ask(capsys, f"path={tmp_path}/file/runs")
    assert code == 1
    assert [(p["name"], p["remedy"]) for p in found["problems"]] == [
        ("path", "name another with path=, and give it to wrap(run=…)")
    ]
    assert main(["doctor", f"path={tmp_path}/file/runs"]) == 1
    said = capsys.readouterr().out
    assert "FAIL path " in said
    assert "file is not a directory: name another" in said
    assert said.endswith("1 thing to mend\n")


def test_shards_that_come_back_changed(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradloc.store import reader

    whole = reader.RunDirectory.evidence

    def halved(*arguments: Any, **settings: Any) -> Any:
        found = whole(*arguments, **settings)
        found.grad_sum[...] /= 2
        return found

    monkeypatch.setattr(reader.RunDirectory, "evidence", halved)
    code, found = ask(capsys)
    assert code == 1
    assert "a sum of gradients came back as 96.0, not 192" in found["problems"][0]["found"]


def test_a_disk_that_is_nearly_full(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    code, found = ask(capsys)
    assert code == 1
    assert found["problems"][0]["name"] == "disk"
    assert "make room" in found["problems"][0]["remedy"]


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [("online", "wandb login"), ("dryrun-ish", "must be online, offline or disabled"), ("disabled", None)],
)
def test_the_mode_of_wandb(mode: str, remedy: str | None, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    code, found = ask(capsys)
    assert code == int(remedy is not None)
    assert found["wandb"]["mode"] == mode
    assert all(remedy is not None and remedy in problem["remedy"] for problem in found["problems"])


def test_a_key_makes_it_online_and_stays_out(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    _, found = ask(capsys)
    assert found["wandb"] == {"mode": "online", "logged_in": True}
    assert "a-very-secret-value" not in json.dumps(found)


def test_packages_that_are_missing_or_too_old(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["numpy>=1.26", "pandas>=99", "not-there>=1", "ray>=2 ; extra == 'ray'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    code, found = ask(capsys)
    assert code == 1
    assert {p["name"]: p["remedy"] for p in found["problems"]} == {
        "pandas": "pip install 'pandas>=99'", "not-there": "pip install 'not-there>=1'",
    }  # fmt: skip


def test_an_object_store(capsys: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradloc.store.folder import open_folder

    code, found = ask(capsys, f"path={server.uri('doctor')}")
    assert code == 0
    assert found["path"]["written_and_read"]
    assert open_folder(server.uri("doctor")).names() == []


def test_a_store_that_doesnt_answer(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, found = ask(capsys, "path=s3://bucket/a?endpoint_override=127.0.0.1:1&scheme=http")
    assert code == 1
    assert found["problems"][0]["remedy"] == "check the address and the credentials with path="
