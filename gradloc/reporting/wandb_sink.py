"""Locality curves in Weights & Biases. The only file that knows it; a failure here never reaches the training."""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pandas as pd

from gradloc.reporting.data import ReportData
from gradloc.reporting.sinks import STEP, Histogram, SinkResult, send

PROJECT = "gradloc"
INIT_SECONDS = 30
"""How long a run of its own may take to be started before it is given up."""
UPLOAD_SECONDS = 120
"""How long a run of its own may upload after its last row, and how long is waited for one table or artifact of any run. wandb itself
has no limit for either: it would wait for a server that is gone."""
RETRIES = 5
"""Of a request of a run of its own; their pauses double from 2 s, so that a minute without a network is survived."""
TAKEN = ("integer", "floating", "mixed-integer-float", "boolean", "string", "datetime", "date", "empty")
"""What the values of a table's column may be, as pandas calls it."""
_SENT: dict[tuple[str, str], int] = {}
"""The last window that a W&B run got from a gradloc run, so that reporting again adds only what is new."""


class WandbSink:
    """A W&B run as a sink. Curves run against ``gradloc/step``, the optimizer step, so that they never disturb the user's own step.

    Args:
        run: a `wandb.Run`.
        own: whether to finish it.

    Attributes:
        problem: the first table or artifact that the server didn't take. The others are not tried then, as each would be waited for.
    """

    def __init__(self, run: Any, own: bool = False) -> None:
        self.run, self.own = run, own
        self.problem: str | None = None
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

        self._ask_for(name, lambda: self.run.log({STEP: step, name: wandb.Table(dataframe=_as_taken(frame))}))

    def page(self, step: int, html: str) -> None:
        import wandb

        self.run.log({STEP: step, "gradloc/report": wandb.Html(html, inject=False)})

    def artifact(self, name: str, kind: str, file: Path, metadata: Mapping[str, Any], made_from: str | None) -> None:
        """Online, what it was made from becomes an input of the run, which is how W&B draws lineage; it is in the metadata as well."""
        import wandb

        made = wandb.Artifact(name, type=kind, metadata={**metadata, **({"made_from": made_from} if made_from else {})})
        made.add_file(str(file))
        is_input = made_from is None and not self.run.offline and not self.run.disabled
        self._ask_for(name, lambda: (self.run.use_artifact if is_input else self.run.log_artifact)(made))

    def _ask_for(self, name: str, call: Callable[[], Any]) -> None:
        """What wandb does only after the server has answered."""
        if self.problem is not None:
            return
        try:
            _within(UPLOAD_SECONDS, call)
        except Exception as error:
            self.problem = f"W&B did not take {name}, and no table or artifact after it was tried: {_sentence(error)}"

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def close(self) -> str:
        place = "W&B is disabled"
        if not self.run.disabled:
            place = str(Path(self.run.dir).parent) if self.run.offline else str(self.run.url)
        if self.own:  # a disabled one as well, which would stay open for whatever asks for the open run
            self.run.finish()
        return place


def _as_taken(frame: pd.DataFrame) -> pd.DataFrame:
    """A table that W&B takes whatever a user's holds: names of columns, and values of several types or of one it can't write, are text."""

    def column(values: pd.Series) -> pd.Series:
        cells = values.astype(object)
        taken = pd.api.types.infer_dtype(cells, skipna=True) in TAKEN
        return (cells if taken else cells.map(str).astype(object)).where(values.notna(), None)

    return frame.apply(column).set_axis([str(name) for name in frame.columns], axis=1)


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Waits for a call no longer than that. One that is left behind ends with the process."""
    outcome: Future[None] = Future()

    def work() -> None:
        try:
            call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=work, name="gradloc-wandb", daemon=True).start()
    try:
        outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer from the server within {seconds:g} s") from None


def _sentence(error: Exception) -> str:
    """What a message says first; the rest of wandb's is advice for who calls wandb."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


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
    own = None
    try:
        target = run or open_run()
        own = None if target is not None else _start(name, config, directory)
        sink = WandbSink(target or own, own=own is not None)
        try:
            fill(sink)
        except Exception:
            if own is not None:
                with contextlib.suppress(Exception):
                    own.finish(exit_code=1)
            raise
        return SinkResult(sink.close(), sink.problem)
    except Exception as error:
        return SinkResult(None, f"W&B curves were not written: {_sentence(error)}{_kept(own)}")


def _kept(own: Any | None) -> str:
    """Where a run of its own is that wasn't sent."""
    if own is None or own.disabled:
        return ""
    folder = Path(own.dir).parent
    return f"; what was logged is in {folder}, and 'wandb sync {folder}' sends it"


def _start(name: str, config: Mapping[str, Any], directory: str | Path | None) -> Any:
    import wandb

    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    # A run that says itself how long it may take to end is better than one that stops trying, as the latter isn't told. Older wandb has
    # the latter only.
    limits: dict[str, Any] = {"x_file_stream_retry_max": RETRIES}
    if "finish_timeout" in wandb.Settings.model_fields:
        limits = {"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True}
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        init_timeout=INIT_SECONDS,
        x_graphql_retry_max=RETRIES,
        x_file_transfer_retry_max=RETRIES,
        **limits,
    )
    mode: Any = expected_mode()
    try:
        return wandb.init(
            project=PROJECT,
            name=name,
            mode=mode,
            dir=None if directory is None else str(directory),
            config=dict(config),
            settings=settings,
            reinit="create_new",
        )
    except Exception as error:
        if mode != "online":
            raise
        server = _setting("base_url") or wandb.Settings().base_url
        raise RuntimeError(
            f"no run could be started at {server} ({_sentence(error)}); WANDB_MODE=offline keeps it in a file for 'wandb sync'"
        ) from error


def expected_mode() -> str:
    """The mode a run of its own would have: as wandb is set to, else online with a key. Asks nobody on the network."""
    return _setting("mode") or ("online" if logged_in() else "offline")


def logged_in() -> bool:
    """Whether there is a key for the server that wandb is set to. Asks nobody on the network."""
    return bool(_setting("api_key") or _setting("identity_token_file") or _stored_key())


def _setting(name: str) -> str | None:
    """As wandb reads it: from the environment, this directory's settings, the user's. Its own reader prints, and keeps what it read."""
    config, here = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"), Path(os.environ.get("WANDB_DIR", "."))
    files = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error):  # wandb will say so
        files.read([Path(config).expanduser() / "settings", here / "wandb" / "settings", here / ".wandb" / "settings"])
    return os.environ.get(f"WANDB_{name.upper()}") or files.get("default", name, fallback=None)


def _stored_key() -> str | None:
    """The key in a netrc file, for the host that wandb would look up there."""
    import wandb

    url = _setting("base_url") or wandb.Settings().base_url
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth
    except ImportError:  # older wandb
        from requests.utils import get_netrc_auth

        found = get_netrc_auth(url)
        return found[1] if found else None
    try:
        return read_netrc_auth(host=url)
    except (ValueError, wandb.errors.Error):
        return None  # no address, or no key, that wandb would take
