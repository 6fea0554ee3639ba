"""Records firings where nothing is trained: which units are active for which token, from forward passes alone."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gradloc.core.hooks import Hook
from gradloc.core.ports import RunWriter
from gradloc.core.run_info import RunInfo
from gradloc.core.window import WindowCost, WindowRecord
from gradloc.core.wrappers import inner_model
from gradloc.record.config import RecordConfig
from gradloc.record.failures import Failures, reason
from gradloc.record.firings import FiringSampler


class ForwardRecorder:
    """Samples tokens of a model's forward passes. Each call of the model counts as a step.

    Args:
        model: the model; hooks are attached to it until `close`.
        config: `every`, `flush_every`, `firing_tokens`, `seed` and `on_error` are used.
        writer: where windows go.
        info: the run's description with the sites that are watched.
    """

    def __init__(self, model: nn.Module, config: RecordConfig, writer: RunWriter, info: RunInfo) -> None:
        self._writer, self._every, self._flush_every = writer, config.every or 1, config.flush_every
        inner = inner_model(model)
        self._failures = Failures(raising=config.on_error == "raise")
        self.problems = self._failures.problems
        self.failed = False
        self._sampler = FiringSampler(
            inner, info.sites, config, partial(self._failures.guard, self._fail), forward=True
        )
        self._step, self._window, self._first = writer.last_step, writer.next_window, writer.last_step + 1
        self._observed = 0
        self._began = perf_counter()
        self._closed = False
        self._hooks = [
            inner.register_forward_pre_hook(Hook(self._before)),
            inner.register_forward_hook(Hook(self._after)),
        ]

    def _fail(self, error: Exception) -> None:
        """Stops recording, says so once, and lets the model go on."""
        self.failed = True
        self._sampler.stop()
        self._failures.tell(f"recording stopped at step {self._step}: {reason(error)}. The model goes on", error)

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or self.failed:
            return
        self._step += 1
        if (self._step - 1) % self._every == 0:
            self._sampler.arm(self._step)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._sampler.armed_step is None:
            return
        self._sampler.disarm()
        self._observed += 1
        if self._observed >= self._flush_every:
            with self._failures.guard(self._fail):
                self.flush()

    def flush(self) -> None:
        """Writes what was sampled so far.

        Raises:
            StoreError: the run can't be written.
        """
        if not self._observed:
            return
        self._sampler.digest(self._sampler.take())
        steps, now = self._step - self._first + 1, perf_counter()
        cost = WindowCost(steps, self._observed, self._sampler.take_seconds(), now - self._began)
        samples = self._sampler.take_samples()
        self._writer.write_window(WindowRecord(self._window, self._first, self._step, (), samples, cost))
        self._window, self._first, self._observed, self._began = self._window + 1, self._step + 1, 0, now

    def close(self) -> None:
        """Flushes and takes the hooks off. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.failed:
                self.flush()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._sampler.remove()
            self._writer.close()

    def __enter__(self) -> ForwardRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
