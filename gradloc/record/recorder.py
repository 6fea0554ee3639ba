"""The recorder: hooks on an optimizer that observe its steps and flush what they saw."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradloc.core.plan import OperatorChain
from gradloc.core.ports import RunWriter
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import ParameterWindow, WindowCost, WindowRecord
from gradloc.errors import AlreadyWrappedError, GradlocError, UnsupportedError
from gradloc.record.accumulate import CellBank, Slot, WindowSums
from gradloc.record.config import RecordConfig
from gradloc.record.firings import FiringSampler
from gradloc.record.parameters import named_parameters, parameter_info
from gradloc.record.schedule import BudgetSchedule, FixedSchedule
from gradloc.record.writer import WriterThread

# The recorder is held by its hooks, and so lives as long as its optimizer.
_RECORDERS: weakref.WeakKeyDictionary[Optimizer, Recorder] = weakref.WeakKeyDictionary()


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside `optimizer`, which may be a wrapper such as Accelerate's or Opacus's.

    Raises:
        UnsupportedError: it isn't a torch optimizer.
    """
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None) or getattr(inner, "original_optimizer", None)) is not None:
        inner = wrapped
    if not isinstance(inner, Optimizer):
        kind = type(optimizer)
        raise UnsupportedError(
            f"optimizer is a {kind.__module__}.{kind.__qualname__}; gradloc hooks into torch.optim.Optimizer. "
            "Pass the torch optimizer itself."
        )
    return inner


def find_recorder(optimizer: Any) -> Recorder | None:
    """The recorder of an optimizer, or None."""
    return _RECORDERS.get(torch_optimizer(optimizer))


class Recorder:
    """Observes an optimizer's steps without changing them.

    Gradients are read in the step's post-hook: after unscaling, clipping and accumulation, and also after a closure that
    runs backward inside `step`. Weights are read before and after for the parameters whose update is measured in turn.

    Args:
        optimizer: a torch optimizer, or a wrapper around one.
        model: gives the parameters their names.
        config: see `RecordConfig`.
        writer: where windows go.
        info: the run's description; its parameters must be the optimizer's.
        chains: operator chains whose hidden units' firings are sampled.

    Raises:
        AlreadyWrappedError: the optimizer has a recorder.
        UnsupportedError: not a torch optimizer.
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        config: RecordConfig,
        writer: RunWriter,
        info: RunInfo,
        chains: Sequence[OperatorChain] = (),
    ) -> None:
        self._optimizer = torch_optimizer(optimizer)
        if self._optimizer in _RECORDERS:
            raise AlreadyWrappedError(
                "this optimizer already has a recorder; close that one first: gradloc.recorder_of(optimizer).close()"
            )
        self.config, self.info = config, info
        self.problems: list[str] = []
        self._unsaid: list[str] = []
        self._model, self._writer, self._thread = model, writer, WriterThread()
        self._rules = config.rules
        self._schedule = FixedSchedule(config.every) if config.every else BudgetSchedule(config.overhead)
        self._window, self._step = writer.next_window, writer.last_step
        self._banks: list[CellBank] = []
        self._slots: dict[int, tuple[CellBank, Slot]] = {}
        self._probes: dict[str, Tensor] = {}
        self._total_observed = 0
        self._memory = 0
        self._spent = 0.0
        self._observing = False
        self._measured: list[tuple[CellBank, Slot]] = []
        self.closed = self.failed = False
        self._hooks: list[RemovableHandle] = []
        self._restart_window()
        self._adopt_parameters(first=True)
        self._sampler = self._make_sampler(chains) if config.firings else None
        if config.snapshots and self._window == 0:
            writer.write_snapshot("init", self._weights())
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        _RECORDERS[self._optimizer] = self
        self._last_end = perf_counter()
        if self._sampler:
            self._sampler.arm(self._step + 1)

    # ---- attaching

    def _make_sampler(self, chains: Sequence[OperatorChain]) -> FiringSampler:
        operators = [
            (operator, self._model.get_submodule(operator), activation)
            for chain in chains
            for operator, activation in zip(chain.operators, chain.activations, strict=False)
        ]
        return FiringSampler(operators, self.config.firing_tokens, self.config.seed)

    def _adopt_parameters(self, first: bool) -> None:
        """Takes in parameters of the optimizer that aren't recorded yet."""
        named = named_parameters(self._optimizer, self._model)
        known = {parameter.name: parameter for parameter in self.info.parameters}
        fresh = {name: parameter for name, parameter in named.items() if id(parameter) not in self._slots}
        added = [parameter_info(name, p, self._model) for name, p in fresh.items() if name not in known]
        known |= {parameter.name: parameter for parameter in added}
        for device in {parameter.device for parameter in fresh.values()}:
            items = [(known[n], p, self.info.cells(known[n])) for n, p in fresh.items() if p.device == device]
            bank = CellBank(items, self._rules, device)
            self._banks.append(bank)
            self._slots |= {id(slot.parameter): (bank, slot) for slot in bank.slots}
            self._probes |= {slot.info.name: slot.probe() for slot in bank.slots}
        if added:
            self.info = self.info.with_parameters(*added)
            if not first:
                self._writer.update_info(self.info)

    # ---- hooks

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        began = perf_counter()
        if self.closed or self.failed:
            return
        self._step += 1
        self._observing = self._schedule.due(self._step)
        if not self._observing:
            return
        with self._guard():
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if count != len(self._slots):
                self._adopt_parameters(first=False)
            turns = self.config.update_every
            turn = self._total_observed % turns
            self._measured = [item for index, item in enumerate(self._slots.values()) if index % turns == turn]
            for _, slot in self._measured:
                slot.before = slot.parameter.detach().clone()
        self._spent += perf_counter() - began

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.closed or self.failed:
            return
        began = perf_counter()
        observed = self._observing
        if observed:
            with self._guard():
                self._observe(optimizer)
        if self._thread.failure is not None:
            self._fail(self._thread.failure)
        self._say_problems()
        flushing = self._observed >= self.config.flush_every
        now = perf_counter()
        spent = self._spent_in_step(now - began)
        self._schedule.spent(spent, now - self._last_end, observed)
        self._recording_seconds += spent
        self._elapsed_seconds += now - self._last_end
        self._last_end = now
        if flushing:
            with self._guard():
                self._flush()
            self._recording_seconds += perf_counter() - now
            self._schedule.spent(perf_counter() - now, 0.0, observed=False)
        if self._sampler and not self.failed:
            due = self._total_observed % self.config.firing_every == 0 and self._schedule.due(self._step + 1)
            self._sampler.arm(self._step + 1) if due else self._sampler.disarm()

    def _spent_in_step(self, after: float) -> float:
        spent = self._spent + after + (self._sampler.take_seconds() if self._sampler else 0.0)
        self._spent = 0.0
        return spent

    def _observe(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        decays = _decay_factors(optimizer) if self._measured else {}
        with torch.no_grad():
            for bank in self._banks:
                bank.observe_gradients(self._step, skipped)
            for bank, slot in self._measured:
                bank.observe_update(slot, decays.get(id(slot.parameter), 1.0))
                bank.observe_histogram(slot)
        self._measured = []
        self._observed += 1
        self._total_observed += 1

    # ---- windows

    def _restart_window(self) -> None:
        self._window_first_step = self._step + 1
        self._observed = 0
        self._recording_seconds = self._elapsed_seconds = 0.0

    def _flush(self) -> None:
        """Hands the current window to the writer's thread."""
        if self._observed == 0:
            return
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        pairs = list(self._slots.values())
        norms = torch._foreach_norm([slot.parameter.detach() for _, slot in pairs])
        sums = {id(bank): bank.take() for bank in self._banks}
        taken: list[tuple[Slot, WindowSums, Tensor, Tensor, Tensor, float, float]] = []
        for (bank, slot), norm in zip(pairs, norms, strict=True):
            group = groups.get(id(slot.parameter), {})
            probe = slot.probe()
            before, self._probes[slot.info.name] = self._probes[slot.info.name], probe
            rate, decay = float(group.get("lr", 0.0)), float(group.get("weight_decay", 0.0))
            taken.append((slot, sums[id(bank)], before, probe, norm, rate, decay))
        raw = self._sampler.take() if self._sampler else []
        steps = self._step - self._window_first_step + 1
        cost = WindowCost(steps, self._observed, self._recording_seconds, self._elapsed_seconds)
        index, first, last = self._window, self._window_first_step, self._step
        self._window += 1
        self._restart_window()

        def write() -> None:
            for window_sums in sums.values():
                window_sums.to_host()
            parameters = tuple(_parameter_window(*item, steps=steps) for item in taken)
            problems = tuple(
                f"{p.name}: {p.nonfinite_steps} of {p.moments.exposure + p.nonfinite_steps} observed steps between {first} "
                f"and {last} had NaN or infinite gradients and were left out"
                for p in parameters
                if p.nonfinite_steps
            )
            firings = self._sampler.firing_samples(raw) if self._sampler else ()
            self._writer.write_window(WindowRecord(index, first, last, parameters, firings, cost, problems))
            self._unsaid.extend(problems)

        self._thread.submit(write)

    def flush(self) -> None:
        """Writes everything seen so far, and the current weights; returns when it is on disk.

        Raises:
            GradlocError: with ``on_error="raise"``, if writing failed.
        """
        if self.closed:
            return
        with self._guard():
            self._flush()
            if self.config.snapshots:
                weights = self._weights()
                self._thread.submit(lambda: self._writer.write_snapshot("last", weights))
        self._thread.drain()
        self._say_problems()
        if self._thread.failure is not None and not self.failed:
            self._fail(self._thread.failure)

    def memory_bytes(self) -> int:
        """Memory that recording keeps beside the model, in bytes."""
        return sum(bank.memory_bytes() for bank in self._banks) or self._memory

    def close(self) -> None:
        """Flushes, takes the hooks off and ends the writer. Safe to call twice."""
        if self.closed:
            return
        try:
            if not self.failed:
                self.flush()
        finally:
            self.closed = True
            self._detach()
            self._thread.close()
            self._writer.close()
            self._let_go()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._sampler:
            self._sampler.remove()
        _RECORDERS.pop(self._optimizer, None)

    def _let_go(self) -> None:
        """A closed recorder must not keep a model in memory."""
        self._memory = self.memory_bytes()
        self._banks, self._slots, self._probes, self._measured = [], {}, {}, []
        self._sampler = self._model = self._optimizer = None  # type: ignore[assignment]

    def _weights(self) -> dict[str, Any]:
        """The weights as NumPy copies; half precision widens to float32, which holds it exactly."""
        found = {}
        for _, slot in self._slots.values():
            weight = slot.parameter.detach()
            weight = weight.float() if weight.element_size() < 4 else weight
            found[slot.info.name] = weight.cpu().numpy().copy()
        return found

    # ---- failure

    def _guard(self) -> _Guard:
        return _Guard(self)

    def _fail(self, error: BaseException) -> None:
        """Stops recording, says so once, and lets training go on."""
        self.failed = True
        for _, slot in self._slots.values():
            slot.before = None
        if self._sampler:
            self._sampler.disarm()
        message = (
            f"recording stopped at step {self._step}: {error}. Training goes on; "
            f"{self._thread.dropped} window(s) and the {self._observed} observed steps since were not written."
        )
        self.problems.append(message)
        if self.config.on_error == "raise":
            raise error if isinstance(error, GradlocError) else GradlocError(message) from error
        warnings.warn(f"gradloc: {message}", RuntimeWarning, stacklevel=3)

    def _say_problems(self) -> None:
        """Passes on what the writer's thread found: one warning a parameter, from the training thread."""
        while self._unsaid:
            problem = self._unsaid.pop(0)
            about = problem.split(":")[0]
            said = any(about == other.split(":")[0] for other in self.problems)
            self.problems.append(problem)
            if not said:
                warnings.warn(f"gradloc: {problem}", RuntimeWarning, stacklevel=4)


class _Guard:
    """A context in which an exception stops recording instead of training."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._recorder._fail(error)
        return True


def _decay_factors(optimizer: Optimizer) -> dict[int, float]:
    """What decoupled weight decay alone multiplies each parameter with, where the optimizer decays that way."""
    return {
        id(parameter): 1.0 - float(group["lr"]) * float(group["weight_decay"])
        for group in optimizer.param_groups
        if group.get("decoupled_weight_decay")
        for parameter in group["params"]
    }


def _parameter_window(
    slot: Slot,
    sums: WindowSums,
    before: Tensor,
    after: Tensor,
    norm: Tensor,
    rate: float,
    decay: float,
    *,
    steps: int,
) -> ParameterWindow:
    moments = sums.moments(slot)
    elements = slot.parameter.numel()
    measured = moments.update_exposure
    return ParameterWindow(
        name=slot.info.name,
        moments=moments,
        histogram=sums.histogram_counts(slot),
        displacement=float((after - before).abs().mean()),
        path=float(moments.update_abs_sum.sum()) / elements / measured * steps if measured else float("nan"),
        weight_norm=float(norm),
        nonfinite_steps=int(sums.left_out[slot.index]),
        learning_rate=rate,
        weight_decay=decay,
    )


def new_parameters(optimizer: Any, model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Descriptions of everything the optimizer trains, for a new run.

    Raises:
        UnsupportedError: not a torch optimizer, or parameters that can't be recorded.
    """
    named = named_parameters(torch_optimizer(optimizer), model)
    return tuple(parameter_info(name, parameter, model) for name, parameter in named.items())
