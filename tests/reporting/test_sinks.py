"""W&B, TensorBoard and CSV, each read back with a reader of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gradloc
from gradloc.reporting.sinks import MOST_BYTES, file_name
from gradloc.reporting.wandb_sink import open_run
from tests.reporting.wandb_file import file_of, history, records, row_of

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def made(run: gradloc.Run) -> Any:
    return gradloc.report(run, masks=gradloc.find_masks(run, density=0.5), show=False, wandb=False)


@pytest.mark.usefixtures("offline")
def test_wandb_gets_curves_images_tables_and_artifacts(hostile: gradloc.Run, tmp_path: Path) -> None:
    report = made(hostile)
    result = report.log_wandb(True, tmp_path)
    assert result.problem is None
    file = file_of(result.place)
    found = list(records(file))
    logged = [row_of(record) for record in found if record.WhichOneof("record_type") == "history"]
    curves = [row for row in logged if "gradloc/model/gini" in row]
    assert [row["gradloc/step"] for row in curves] == report.data.model_curve["last_step"].tolist() == [4, 8, 12]
    for name, column in (("gradloc/model/gini", "gini"), ("gradloc/model/core_fraction", "core_fraction")):
        np.testing.assert_allclose([row[name] for row in curves], report.data.model_curve[column])
    module = report.data.modules[report.data.modules["module"] == "3.0"].sort_values("window")
    np.testing.assert_allclose([row["gradloc/3.0/energy_share"] for row in curves], module["energy_share"])
    assert curves[0]["gradloc/model/gradient_log2"]["_type"] == "histogram"
    kinds = {key: value["_type"] for row in logged for key, value in row.items() if isinstance(value, dict)}
    assert kinds["gradloc/locality"] == "image-file"
    assert kinds["gradloc/locality_table"] == "table-file"
    assert kinds["gradloc/report"] == "html-file"
    assert all(name.startswith("gradloc/") or name.startswith("_") for row in logged for name in row)
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.WhichOneof("record_type") == "metric"}
    assert metrics["gradloc/*"].step_metric == "gradloc/step"
    # Bytes of a window's row, as they are stored.
    assert max(len(r.SerializeToString()) for r in found if "gradloc/model/gini" in row_of(r)) <= MOST_BYTES
    summary = {
        u.key or "/".join(u.nested_key): json.loads(u.value_json)
        for r in found
        if r.WhichOneof("record_type") == "summary"
        for u in r.summary.update
    }
    assert summary["gradloc/final/gini"] == pytest.approx(report.data.model_curve["gini"].iloc[-1])
    assert summary["gradloc/masks_density"] == pytest.approx(report.data.masks.density)


@pytest.mark.usefixtures("offline")
def test_wandb_takes_any_table_of_the_users_and_all_that_comes_after_it(hostile: gradloc.Run, tmp_path: Path) -> None:
    results = pd.DataFrame(
        {
            "what": ["a", "b", "c"],
            "loss": [1.0, "–", None],
            "n": [None, 3, 4.5],
            "took": pd.to_timedelta([60, None, 1], unit="s"),
            ("a", 1): [True, 2, 3],
        }
    )
    report = gradloc.report(hostile, results=results, show=False, wandb=False)
    result = report.log_wandb(True, tmp_path)
    assert result.problem is None
    found = records(file_of(result.place))
    logged = {key for record in found if record.WhichOneof("record_type") == "history" for key in row_of(record)}
    assert {"gradloc/results_table", "gradloc/report"} <= logged
    assert "gradloc/final/gini" in {
        update.key or "/".join(update.nested_key)
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for update in record.summary.update
    }
    [table] = Path(result.place).rglob("results_table*.json")
    written = json.loads(table.read_text())
    assert written["columns"] == ["what", "loss", "n", "took", "('a', 1)"]
    assert written["data"] == [
        ["a", "1.0", None, "0 days 00:01:00", "True"],
        ["b", "–", 3, None, "2"],
        ["c", None, 4.5, "0 days 00:00:01", "3"],
    ]


@pytest.mark.usefixtures("offline")
def test_a_table_that_cant_be_made_is_told_and_the_curves_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from gradloc.reporting import wandb_sink

    def refuse(self: Any, **settings: Any) -> None:
        raise TypeError("no such table")

    monkeypatch.setattr(wandb.Table, "__init__", refuse)

    def fill(sink: Any) -> None:
        sink.row(1, {"gradloc/model/gini": 0.5}, {})
        sink.table(1, "gradloc/results_table", pd.DataFrame({"loss": [1.0]}))
        sink.page(1, "<p>page</p>")

    result = wandb_sink.log_with(fill, "r", {}, None, tmp_path)
    assert "did not take gradloc/results_table" in result.problem
    assert "no such table" in result.problem
    logged = {key for row in history(file_of(result.place)) for key in row}
    assert {"gradloc/model/gini", "gradloc/report"} <= logged


@pytest.mark.usefixtures("offline")
def test_wandb_artifacts_say_what_they_were_made_from(hostile: gradloc.Run, tmp_path: Path) -> None:
    result = made(hostile).log_wandb(True, tmp_path)
    file = file_of(result.place)
    requests = [
        r.request.log_artifact.artifact
        for r in records(file)
        if r.WhichOneof("record_type") == "request" and r.request.HasField("log_artifact")
    ]
    plain = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    artifacts = {artifact.name: artifact for artifact in [*requests, *plain]}
    run_id = hostile.info.run_id
    assert {f"gradloc-run-{run_id}", f"gradloc-masks-{run_id}"} <= set(artifacts)
    masks = artifacts[f"gradloc-masks-{run_id}"]
    metadata = json.loads(masks.metadata)
    assert masks.type == "masks"
    assert metadata["made_from"] == f"gradloc-run-{run_id}"
    assert metadata["criterion"] == "saliency"
    assert metadata["density"] == 0.5


@pytest.mark.usefixtures("offline")
def test_an_open_wandb_run_is_joined_stays_open_and_gets_each_window_once(hostile: gradloc.Run, tmp_path: Path) -> None:
    import wandb

    with wandb.init(project="mine", dir=str(tmp_path)) as run:
        run.log({"loss": 1.0})
        report = gradloc.report(hostile, show=False)  # None joins an open run
        assert report.wandb is not None
        assert report.wandb.problem is None
        gradloc.report(hostile, show=False)
        run.log({"loss": 0.5})
        file = next(Path(run.dir).parent.glob("*.wandb"))
    rows = history(file)
    assert [row["gradloc/step"] for row in rows if "gradloc/model/gini" in row] == [4, 8, 12]
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]


@pytest.mark.usefixtures("offline")
def test_no_wandb_run_is_made_unless_asked(
    hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert gradloc.report(hostile, show=False).wandb is None
    assert set(tmp_path.rglob("*")) == before


def test_disabled_wandb_is_no_problem(hostile: gradloc.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    result = made(hostile).log_wandb(True, tmp_path)
    assert result.problem is None
    assert "disabled" in result.place
    assert open_run() is None, "it isn't left for others to join"


def test_a_broken_wandb_run_is_told_and_never_raises(hostile: gradloc.Run) -> None:
    class Broken:
        id = "broken"

        def define_metric(self, *names: Any, **settings: Any) -> None:
            raise RuntimeError("the service died")

    report = made(hostile)
    result = report.log_wandb(Broken())
    assert result.place is None
    assert "the service died" in result.problem
    assert any("the service died" in finding.text for finding in report.findings if finding.problem)


def test_tensorboard_reads_what_was_written(hostile: gradloc.Run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = made(hostile)
    result = report.log_tensorboard(tmp_path / "board")
    assert result.problem is None
    read = EventAccumulator(result.place, size_guidance={"images": 0, "histograms": 0})
    read.Reload()
    events = read.Scalars("gradloc/model/gini")
    assert [event.step for event in events] == [4, 8, 12]
    np.testing.assert_allclose([event.value for event in events], report.data.model_curve["gini"], rtol=1e-6)
    assert "gradloc/3.0/energy_share" in read.Tags()["scalars"]
    histogram = read.Histograms("gradloc/model/gradient_log2")[0].histogram_value
    window = report.data.histograms[
        (report.data.histograms["window"] == 0) & (report.data.histograms["log2_bin"] > -1000)
    ]
    assert histogram.num == window["count"].sum()
    assert read.Images("gradloc/locality")[0].width > 600


def test_csv_holds_the_same_values(hostile: gradloc.Run, tmp_path: Path) -> None:
    report = made(hostile)
    place = Path(report.log_csv(tmp_path / "files").place)
    curves = pd.read_csv(place / "curves.csv")
    gini = curves[curves["name"] == "gradloc/model/gini"]
    assert gini["step"].tolist() == [4, 8, 12]
    np.testing.assert_allclose(gini["value"], report.data.model_curve["gini"])
    histograms = pd.read_csv(place / "histograms.csv")
    assert histograms["count"].sum() == report.data.histograms.query("log2_bin > -1000")["count"].sum()
    assert {"report.html", "summary.csv", "images", "artifacts"} <= {item.name for item in place.iterdir()}
    assert (place / "images" / "gradloc-locality.png").read_bytes()[:4] == b"\x89PNG"
    # Names of parameters never choose where a file lies.
    assert all(item.resolve().is_relative_to(place.resolve()) for item in place.rglob("*"))


def test_files_that_cant_be_written_are_told(hostile: gradloc.Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    result = made(hostile).log_csv(tmp_path / "taken" / "deeper")
    assert result.place is None
    assert "CSV" in result.problem


def test_file_names_stay_apart_and_inside() -> None:
    names = ["gradloc/maps/../../x", "gradloc/maps/..-..-x", "a b", "a/b", "..", "", "<script>", "é" * 300]
    made_of = [file_name(name) for name in names]
    assert len(set(made_of)) == len(names)
    assert all("/" not in name and name not in ("", ".", "..") and len(name) < 100 for name in made_of)
