"""Locality curves in Weights & Biases. The only file that knows it; a failure here never reaches the training."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from gradloc.reporting.data import ReportData
from gradloc.reporting.sinks import STEP, Histogram, SinkResult, send

PROJECT = "gradloc"
INIT_SECONDS = 30
"""How long a run of its own may take to be started before it is given up."""
_SENT: dict[tuple[str, str], int] = {}
"""The last window that a W&B run got from a gradloc run, so that reporting again adds only what is new."""


class WandbSink:
    """A W&B run as a sink. Curves run against ``gradloc/step``, the optimizer step, so that they never disturb the user's own step.

    Args:
        run: a `wandb.Run`.
        own: whether to finish it.
    """

    def __init__(self, run: Any, own: bool = False) -> None:
        self.run, self.own = run, own
        run.define_metric(STEP)
        run.define_metric("gradloc/*", step_metric=STEP)

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        import wandb

        made = {name: wandb.Histogram(np_histogram=(c.tolist(), e.tolist())) for name, (c, e) in histograms.items()}
        self.run.log({STEP: step, **values, **made})

    def image(self, step: int, name: str, png: bytes, caption: str) -> None:
        import wandb
        from PIL import Image

        self.run.log({STEP: step, name: wandb.Image(Image.open(io.BytesIO(png)), caption=caption)})

    def table(self, step: int, name: str, frame: pd.DataFrame) -> None:
        import wandb

        self.run.log({STEP: step, name: wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))})

    def page(self, step: int, html: str) -> None:
        import wandb

        self.run.log({STEP: step, "gradloc/report": wandb.Html(html, inject=False)})

    def artifact(self, name: str, kind: str, file: Path, metadata: Mapping[str, Any], made_from: str | None) -> None:
        """Online, what it was made from becomes an input of the run, which is how W&B draws lineage; it is in the metadata as well."""
        import wandb

        made = wandb.Artifact(name, type=kind, metadata={**metadata, **({"made_from": made_from} if made_from else {})})
        made.add_file(str(file))
        if made_from is None and not self.run.offline and not self.run.disabled:
            self.run.use_artifact(made)
        else:
            self.run.log_artifact(made)

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def close(self) -> str:
        if self.run.disabled:
            return "W&B is disabled"
        place = str(Path(self.run.dir).parent) if self.run.offline else str(self.run.url)
        if self.own:
            self.run.finish()
        return place


def open_run() -> Any | None:
    """The W&B run that the user has open, without importing wandb for it."""
    import sys

    module = sys.modules.get("wandb")
    return getattr(module, "run", None) if module is not None else None


def log_run(data: ReportData, run: Any | None = None, directory: str | Path | None = None) -> SinkResult:
    """Logs what `gradloc.reporting.sinks` sends: curves, histograms, images, tables, the page, masks and plans.

    Curves are named ``gradloc/model/…`` and ``gradloc/<module>/…`` (the most telling modules). A row, which is a window, has at most
    `gradloc.reporting.sinks.MOST_BYTES`; images, tables and the page are logged once a report. Reporting again to the same W&B run
    adds later windows only.

    Args:
        data: what to log.
        run, directory: see `log_with`.

    Returns:
        Where it went. What fails is returned as a sentence, never raised.
    """

    def fill(sink: WandbSink) -> None:
        known = (str(sink.run.id), data.info.run_id)
        send(data, sink, _SENT.get(known, -1))
        _SENT[known] = int(data.model_curve["window"].max())

    return log_with(fill, Path(data.location).name, {"gradloc": data.info.config}, run, directory)


def log_with(
    fill: Callable[[WandbSink], None],
    name: str,
    config: Mapping[str, Any],
    run: Any | None = None,
    directory: str | Path | None = None,
) -> SinkResult:
    """Fills a W&B run, and finishes it if it is its own.

    Args:
        fill: logs to the sink it is given.
        name, config: of a run of its own, which is offline unless the user is logged in.
        run: the W&B run to log to; None joins the one that is open, or starts one.
        directory: where a run of its own keeps its files.

    Returns:
        Where it went. What fails is returned as a sentence, never raised.
    """
    try:
        target = run or open_run()
        sink = WandbSink(target or _start(name, config, directory), own=target is None)
        try:
            fill(sink)
        except Exception:
            if sink.own:
                sink.run.finish(exit_code=1)
            raise
        return SinkResult(sink.close())
    except Exception as error:
        return SinkResult(None, f"W&B curves were not written: {error}")


def _start(name: str, config: Mapping[str, Any], directory: str | Path | None) -> Any:
    import wandb

    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=INIT_SECONDS
    )
    return wandb.init(
        project=PROJECT,
        name=name,
        mode=expected_mode(),
        dir=None if directory is None else str(directory),
        config=dict(config),
        settings=settings,
        reinit="create_new",
    )


def expected_mode() -> str:
    """The mode a run of its own would have: as WANDB_MODE says, else online with a key. Asks nobody on the network."""
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


def logged_in() -> bool:
    """Whether there is a key, in the environment or kept by ``wandb login``. Asks nobody on the network."""
    return bool(os.environ.get("WANDB_API_KEY") or _stored_key())


def _stored_key() -> str | None:
    import netrc

    try:
        found = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
