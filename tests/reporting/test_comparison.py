"""Several runs side by side, against the frames that they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gradloc
from gradloc.errors import ConfigError
from tests.conftest import make_net, train
from tests.reporting.page_checker import checked
from tests.reporting.wandb_file import file_of, history


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of AdamW, and SGD."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for label, seed in (("adam", 0), ("adam <b>2</b>", 1), ("sgd", 0)):
        model, optimizer = make_net(seed)
        if label == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found[label] = folder / f"run{len(found)}"
        gradloc.wrap(optimizer, model, run=found[label], every=1, flush_every=3, firings=False)
        train(model, optimizer, 15, seed)
        gradloc.recorder_of(optimizer).close()
    return found


def test_frames_say_what_the_curves_say(three: dict[str, Path]) -> None:
    made = gradloc.report_comparison(three, show=False)
    means = made.to_frame().set_index(["run", "measure"])
    curve = gradloc.load_run(three["sgd"]).locality(level="model")
    late = curve.sort_values("window").tail(2)
    assert len(curve) == 5
    assert means.loc[("sgd", "gini"), "mean"] == pytest.approx(late["gini"].mean())
    assert means.loc[("sgd", "gini"), "error"] == pytest.approx(curve["gini_error"].iloc[0] / np.sqrt(2))
    pairs = made.pairs()
    assert set(pairs["other_run"]) == {"adam <b>2</b>", "sgd"}
    alone = gradloc.compare_runs(three["adam"], three["sgd"])
    np.testing.assert_allclose(pairs[pairs["other_run"] == "sgd"]["difference"], alone["difference"])
    assert made.settings()["setting"].tolist() == ["optimizer"]


def test_the_page_is_whole_and_escapes_labels(three: dict[str, Path], tmp_path: Path) -> None:
    made = gradloc.report_comparison(three, show=False)
    page = made.save_html(tmp_path / "compare.html").read_text()
    checked(page)
    assert "<b>" not in page
    assert ">nan<" not in page.lower()
    assert "adam <b>2</b> against adam" in str(made)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_wandb_gets_a_curve_per_run(three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = gradloc.report_comparison([three["adam"], three["sgd"]], show=False)
    assert made.data.labels == ("run0", "run2")
    result = made.log_wandb(directory=tmp_path)
    assert result.problem is None
    rows = history(file_of(result.place))
    sgd = gradloc.load_run(three["sgd"]).locality(level="model")
    np.testing.assert_allclose(
        [r["gradloc/compare/run2/gini"] for r in rows if "gradloc/compare/run2/gini" in r], sgd["gini"]
    )
    assert any("gradloc/compare_differences" in row for row in rows)


def test_one_run_is_no_comparison(three: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="at least two; got 1"):
        gradloc.report_comparison([three["adam"]])
