"""Curves, histograms and images for TensorBoard. The only file that knows it.

TensorBoard has no place for tables, pages and files; those stay on the page and in the CSV sink.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import pandas as pd

from gradloc.errors import ConfigError
from gradloc.reporting.sinks import Histogram


class TensorBoardSink:
    """Writes one event file.

    Args:
        directory: where ``tensorboard --logdir`` looks.

    Raises:
        ConfigError: the package isn't installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard's files need its package, which isn't installed: pip install 'gradloc[tensorboard]'."
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2
        self.folder = Path(directory)
        self._writer = EventFileWriter(str(self.folder))

    def row(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        found = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        found += [self._summary.Summary.Value(tag=n, histo=self._histo(*h)) for n, h in histograms.items()]
        self._add(step, found)

    def _histo(self, counts: np.ndarray, edges: np.ndarray) -> Any:
        middle = (edges[:-1] + edges[1:]) / 2
        return self._summary.HistogramProto(
            min=edges[0], max=edges[-1], num=int(counts.sum()), sum=float((counts * middle).sum()),
            sum_squares=float((counts * middle**2).sum()), bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
        )  # fmt: skip

    def image(self, step: int, name: str, png: bytes, caption: str) -> None:
        width, height = struct.unpack(">II", png[16:24])  # PNG's header
        image = self._summary.Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(step, [self._summary.Summary.Value(tag=name, image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time(), summary=self._summary.Summary(value=values)))

    def table(self, step: int, name: str, frame: pd.DataFrame) -> None: ...

    def page(self, step: int, html: str) -> None: ...

    def artifact(
        self, name: str, kind: str, file: Path, metadata: Mapping[str, Any], made_from: str | None
    ) -> None: ...

    def summary(self, values: Mapping[str, float]) -> None: ...

    def close(self) -> str:
        self._writer.close()
        return str(self.folder)
