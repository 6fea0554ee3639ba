"""W&B online: the real client against a server on this machine, checked by what the server got."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

import gradloc
from gradloc.reporting import sinks, wandb_sink
from gradloc.reporting.sinks import SinkResult
from tests.reporting.wandb_file import file_of, history
from tests.reporting.wandb_server import ENTITY, KEY, Server

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.skipif(
        "finish_timeout" not in wandb.Settings.model_fields,
        reason="the server speaks what clients from 0.28 on ask, and older ones can't be told how long a run may take to end",
    ),
]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that wandb is set to, of which it forgets everything afterwards; nothing else can be reached by name or by settings."""
    wandb.teardown()  # it reads the environment once
    server = Server()
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    yield server
    server.fault = None
    wandb.teardown()
    server.kill()


@pytest.fixture
def online(host: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """As `host`, with a key for it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "online")
    return host


def made(run: gradloc.Run) -> Any:
    return gradloc.report(run, masks=gradloc.find_masks(run, density=0.5), show=False, wandb=False)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.monotonic()
    return call(), time.monotonic() - begin


def curves(server: Server, run: str) -> list[dict[str, Any]]:
    return [row for row in server.rows(run) if "gradloc/model/gini" in row]


def test_a_run_of_its_own_arrives_whole(online: Server, hostile: gradloc.Run, tmp_path: Path) -> None:
    report = made(hostile)
    result = report.log_wandb(True, tmp_path)
    assert result.problem is None
    ((run, upserted),) = online.runs.items()
    assert result.place == f"{online.url}/{ENTITY}/gradloc/runs/{run}"
    assert online.keys >= {KEY}
    assert online.unknown == []
    assert online.finished == {run: 0}
    assert (upserted["project"], upserted["displayName"]) == ("gradloc", "r")
    config = json.loads(upserted["config"])
    known = json.loads(json.dumps(report.data.info.config))
    assert config["gradloc"]["value"] == {
        name: value for name, value in known.items() if value != {}
    }  # wandb leaves them out

    # Curves, against gradloc's own step.
    assert any(metric.get("2") == "gradloc/*" for metric in config["_wandb"]["value"]["m"])
    rows = curves(online, run)
    assert [row["gradloc/step"] for row in rows] == [4, 8, 12]
    for name in ("gini", "core_fraction", "grad_rms"):
        np.testing.assert_allclose([row[f"gradloc/model/{name}"] for row in rows], report.data.model_curve[name])
    module = report.data.modules[report.data.modules["module"] == "3.0"].sort_values("window")
    np.testing.assert_allclose([row["gradloc/3.0/energy_share"] for row in rows], module["energy_share"])
    histograms = report.data.histograms.query("log2_bin > -1000").groupby("window")["count"].sum()
    assert [sum(row["gradloc/model/gradient_log2"]["values"]) for row in rows] == histograms.tolist()

    # Images, tables and the page: what a row names was uploaded.
    media = {
        name: value
        for row in online.rows(run)
        for name, value in row.items()
        if isinstance(value, dict) and "path" in value
    }
    assert {"gradloc/locality", "gradloc/locality_table", "gradloc/weights_table", "gradloc/report"} <= set(media)
    for value in media.values():
        assert hashlib.sha256(online.files[run, value["path"]]).hexdigest() == value["sha256"]
    table = json.loads(online.files[run, media["gradloc/locality_table"]["path"]])
    names = table["columns"].index("name") if "name" in table["columns"] else 0
    assert [row[names] for row in table["data"]] == report.data.last_window.iloc[:, names].tolist()
    assert hostile.info.run_id in online.files[run, media["gradloc/report"]["path"]].decode()

    # Lineage: the evidence is an input of the run, the masks are an output.
    used = [online.artifacts[one] for one in online.used[run]]
    outputs = {online.artifacts[one].kind: online.artifacts[one] for one in online.made[run]}
    assert [(one.name, one.kind) for one in used] == [(f"gradloc-run-{hostile.info.run_id}", "gradloc-run")]
    assert json.loads(used[0].files["run.json"])["run_id"] == hostile.info.run_id
    assert outputs["masks"].name == f"gradloc-masks-{hostile.info.run_id}"
    assert outputs["masks"].metadata["made_from"] == used[0].name
    assert set(outputs) == {"masks", "run_table"}
    assert all(one.committed for one in online.artifacts.values())
    (tmp_path / "back.safetensors").write_bytes(outputs["masks"].files["masks.safetensors"])
    assert gradloc.MaskSet.load(tmp_path / "back.safetensors").density == report.data.masks.density

    summary = online.summary(run)
    assert summary["gradloc/final/gini"] == pytest.approx(report.data.model_curve["gini"].iloc[-1])
    assert summary["gradloc/masks_density"] == pytest.approx(report.data.masks.density)


def test_an_open_run_is_joined_and_stays_open(
    online: Server, hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "MOST_MAPS", 0)  # they are drawn for a while
    with wandb.init(project="mine", dir=str(tmp_path)) as run:
        run.log({"loss": 1.0})
        report = gradloc.report(hostile, show=False)  # None joins an open run
        assert report.wandb == SinkResult(f"{online.url}/{ENTITY}/mine/runs/{run.id}")
        assert online.finished == {}
        assert wandb.run is run
        gradloc.report(hostile, show=False)
        run.log({"loss": 0.5})
    assert list(online.runs) == [run.id]
    assert online.finished == {run.id: 0}
    assert [row["gradloc/step"] for row in curves(online, run.id)] == [4, 8, 12], "each window once"
    assert [row["loss"] for row in online.rows(run.id) if "loss" in row] == [1.0, 0.5]
    assert {online.artifacts[one].kind for one in online.used[run.id]} == {"gradloc-run"}


@pytest.mark.parametrize("fault", [401, 403, 500, "hangs", "is not there"])
def test_a_server_that_starts_no_run_is_told_in_time(
    fault: int | str, online: Server, hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "INIT_SECONDS", 2)
    report = gradloc.report(hostile, show=False, wandb=False)
    if fault == "is not there":
        online.kill()
    else:
        online.fault = 0 if fault == "hangs" else fault
    result, seconds = timed(lambda: report.log_wandb(True, tmp_path))
    assert result.place is None
    assert online.url in result.problem
    assert "WANDB_MODE=offline" in result.problem
    assert "\n" not in result.problem
    assert fault not in (401, 403) or f"fault {fault}" in result.problem
    assert seconds < 15
    assert any(finding.text == result.problem for finding in report.findings if finding.problem)


def fill(sink: wandb_sink.WandbSink) -> None:
    """A little of everything, without drawing."""
    file = Path(sink.run.dir) / "masks"
    file.write_text("masks")
    sink.row(1, {"gradloc/model/gini": 0.5}, {})
    sink.artifact("evidence", "gradloc-run", file, {}, None)
    sink.artifact("masks", "masks", file, {}, "evidence")
    sink.row(2, {"gradloc/model/gini": 0.75}, {})


@pytest.mark.parametrize("fault", [500, "hangs", "is killed"])
def test_a_server_that_fails_on_the_way_is_told_in_time_and_nothing_is_lost(
    fault: int | str, online: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "UPLOAD_SECONDS", 1)
    if fault == "is killed":
        online.killed_by = "CreateArtifact"
    else:
        online.faults_from["CreateArtifact"] = 0 if fault == "hangs" else fault
    result, seconds = timed(lambda: wandb_sink.log_with(fill, "r", {}, None, tmp_path))
    assert result.place is None
    assert "wandb sync" in result.problem
    assert seconds < 20
    kept = next(tmp_path.glob("wandb/run-*"))
    assert str(kept) in result.problem
    assert [row["gradloc/step"] for row in history(file_of(kept)) if "gradloc/step" in row] == [1, 2]


def test_an_artifact_that_is_refused_is_told_beside_the_curves(online: Server, tmp_path: Path) -> None:
    online.refused = {"CreateArtifact"}
    result = wandb_sink.log_with(fill, "r", {}, None, tmp_path)
    ((run, code),) = online.finished.items()
    assert code == 0
    assert result.place == f"{online.url}/{ENTITY}/gradloc/runs/{run}"
    assert "evidence" in result.problem
    assert "CreateArtifact is refused" in result.problem
    assert [row["gradloc/step"] for row in curves(online, run)] == [1, 2]
    assert online.seen.count("CreateArtifact") == 1


def test_a_joined_run_is_not_held_by_a_server_that_hangs(
    online: Server, hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "UPLOAD_SECONDS", 1)
    with wandb.init(project="mine", dir=str(tmp_path)) as run:
        online.faults_from["CreateArtifact"] = 503
        result, seconds = timed(lambda: wandb_sink.log_with(fill, "r", {}))
        assert seconds < 10
        assert result.place == run.url
        assert "no answer from the server within 1 s" in result.problem
        run.log({"loss": 0.5})
        online.faults_from.clear()
        online.fault = None  # it is back: the user's run goes on and loses nothing
    rows = online.rows(run.id)
    assert [row["gradloc/step"] for row in rows if "gradloc/step" in row] == [1, 2]
    assert [row["loss"] for row in rows if "loss" in row] == [0.5]
    assert online.finished == {run.id: 0}


def test_a_process_whose_server_is_gone_ends(online: Server, tmp_path: Path) -> None:
    online.faults_from["POST file_stream"] = 500
    code = (
        "from gradloc.reporting import wandb_sink; from tests.reporting.test_wandb_online import fill\n"
        "wandb_sink.UPLOAD_SECONDS = 1\n"
        f"print(wandb_sink.log_with(fill, 'r', {{}}, None, {str(tmp_path)!r}))"
    )
    root = str(Path(gradloc.__file__).parents[1])
    ended, seconds = timed(
        lambda: subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": root},
        )
    )
    assert ended.returncode == 0, ended.stderr
    assert "wandb sync" in ended.stdout
    assert seconds < 60


def write_netrc(path: Path, *machines: str) -> None:
    path.write_text("".join(f"machine {name}\n  login user\n  password {KEY}\n" for name in machines))


def test_a_key_that_is_stored_for_the_server_makes_it_online(host: Server, tmp_path: Path) -> None:
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (False, "offline")
    write_netrc(tmp_path / "netrc", "api.wandb.ai")
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (False, "offline")
    address = host.url.removeprefix("http://")
    write_netrc(
        tmp_path / "netrc", "api.wandb.ai", address, address.partition(":")[0]
    )  # older wandb leaves out the port
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (True, "online")
    result = wandb_sink.log_with(fill, "r", {}, None, tmp_path)
    assert result.problem is None
    assert result.place.startswith(host.url)
    assert host.keys >= {KEY}


@pytest.mark.parametrize("where", ["here", "config"])
def test_settings_of_wandb_are_respected(
    where: str, host: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``wandb offline`` and ``wandb login --host`` write such files."""
    monkeypatch.delenv("WANDB_BASE_URL")
    write_netrc(tmp_path / "netrc", "api.wandb.ai")
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (True, "online")
    settings = tmp_path / ("wandb" if where == "here" else "config") / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (False, "offline")
    write_netrc(tmp_path / "netrc", "wandb.example.org")
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (True, "online")
    settings.write_text("[default]\nbase_url = https://wandb.example.org\nmode = offline\n")
    assert (wandb_sink.logged_in(), wandb_sink.expected_mode()) == (True, "offline")
