"""The recorder: hooks on optimizers that observe their steps and flush what they saw."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradloc.core.hooks import Hook
from gradloc.core.ports import RunWriter
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.window import LEAST_PHANTOM_TOKENS, FiringSample, ParameterWindow, WindowCost, WindowRecord
from gradloc.core.wrappers import inner_model, torch_optimizer
from gradloc.errors import AlreadyWrappedError, RunExistsError, UnsupportedError
from gradloc.record.accumulate import CellBank, Slot
from gradloc.record.config import RecordConfig
from gradloc.record.failures import Failures, reason
from gradloc.record.firings import FiringSampler
from gradloc.record.parameters import (
    GroupSettings,
    group_settings,
    held_parts,
    named_parameters,
    parameter_infos,
    shortened,
)
from gradloc.record.phantoms import PhantomSampler, digest
from gradloc.record.processes import World
from gradloc.record.schedule import BudgetSchedule, FixedSchedule, Schedule, SharedBudgetSchedule
from gradloc.record.state import observe_state
from gradloc.record.stopwatch import Stopwatch
from gradloc.record.sums import WindowSums
from gradloc.record.writer import Lost, WriterThread

# The recorder is held by its hooks, and so lives as long as its optimizers.
_RECORDERS: weakref.WeakKeyDictionary[Optimizer, Recorder] = weakref.WeakKeyDictionary()
UNBOUNDED = 1 << 20
"""Observations that a window's counters must hold where their number isn't known: micro-batches."""


def find_recorder(optimizer: Any) -> Recorder | None:
    """The recorder of an optimizer, or None."""
    return _RECORDERS.get(torch_optimizer(optimizer))


class Recorder:
    """Observes the steps of one optimizer, or of several that train one model, without changing them.

    Gradients are read in the step's post-hook: after unscaling, clipping and accumulation, and also after a closure that
    runs backward inside `step`. Weights are read before and after for the parameters whose update is measured in turn.

    With several optimizers, a step is over when all of them have stepped, or one of them steps again.

    Args:
        optimizers: torch optimizers.
        model: gives the parameters their names.
        config: see `RecordConfig`.
        writer: where windows go.
        info: the run's description; its parameters must be the optimizers'.
        world: the processes that train together.

    Raises:
        AlreadyWrappedError: an optimizer has a recorder.
        UnsupportedError: a parameter or module can't be recorded.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: nn.Module,
        config: RecordConfig,
        writer: RunWriter,
        info: RunInfo,
        world: World | None = None,
    ) -> None:
        self._optimizers = list(optimizers)
        if any(optimizer in _RECORDERS for optimizer in self._optimizers):
            raise AlreadyWrappedError(
                "this optimizer already has a recorder; close that one first: gradloc.recorder_of(optimizer).close()"
            )
        self.config, self.info, self.world = config, info, world or World()
        self._failures = Failures(raising=config.on_error == "raise")
        self.problems = self._failures.problems
        self._unsaid: deque[str] = deque()
        self._said: set[str] = set()
        self._unwritten: list[str] = []
        self._process = os.getpid()
        self._model, self._writer, self._thread = inner_model(model), writer, WriterThread()
        self._rules = config.rules
        self._schedule = self._make_schedule()
        self._window, self._step = writer.next_window, writer.last_step
        self._known: dict[int, int] = {}  # which optimizer a parameter was found in, by their ids
        self._trained: dict[int, set[int]] = {}
        self._frozen: list[tuple[CellBank, Slot]] = []
        self._banks: dict[int, list[CellBank]] = {id(optimizer): [] for optimizer in self._optimizers}
        self._slots: dict[int, tuple[CellBank, Slot]] = {}
        self._probes: dict[int, Tensor] = {}
        self._total_observed = self._memory = 0
        self._stepped: set[int] = set()
        self._observing = self._due = False
        self._measured: list[tuple[CellBank, list[Slot]]] = []
        self.closed = self.failed = False
        self.last_observation_seconds = 0.0
        self._hooks: list[RemovableHandle] = []
        self._sampler: FiringSampler | None = None
        self._phantoms: PhantomSampler | None = None
        self._restart_window()
        try:
            self._attach()
        except BaseException:
            self._detach()
            self._thread.close()
            raise

    def _attach(self) -> None:
        self._adopt_parameters(first=True)
        devices = {slot.parameter.device for _, slot in self._slots.values()}
        self._watch = Stopwatch(max(devices, key=lambda device: device.type == "cuda", default=torch.device("cpu")))
        if self.config.firings:
            guard = partial(self._guard_part, "firings")
            self._sampler = FiringSampler(self._model, self.info.sites, self.config, guard, self.world.rank)
        self._phantoms = self._make_phantoms()
        if self.config.snapshots and self._step == 0 and not self._writer.holds_snapshot("init"):
            self._writer.write_snapshot("init", self._weights(), self._offsets())
        for optimizer in self._optimizers:
            # Compiled training code calls the hooks as they are; tracing them would freeze their decisions.
            self._hooks += [
                optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
                optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
            ]
            _RECORDERS[optimizer] = self
        self._last_end = perf_counter()
        self._look_ahead()

    def _make_schedule(self) -> Schedule:
        if self.config.source == "optimizer_state":
            return FixedSchedule(self.config.flush_every, last=True)
        if self.config.every:
            return FixedSchedule(self.config.every)
        if self.world.size > 1:
            return SharedBudgetSchedule(self.config.overhead, self.world, self.info.run_id)
        return BudgetSchedule(self.config.overhead)

    def _make_phantoms(self) -> PhantomSampler | None:
        if not self.config.phantoms:
            return None
        if self.world.size > 1:
            raise UnsupportedError(
                "phantoms=True pairs the activations and errors of one process; with several, a gradient is the mean over all of them"
            )
        slots = [slot for _, slot in self._slots.values()]
        guard = partial(self._guard_part, "phantoms")
        sampler = PhantomSampler(self._model, slots, self._rules[0], self.config.seed, guard)
        if not sampler.names:
            sampler.remove()
            raise UnsupportedError(
                "phantoms=True needs a recorded weight of a torch.nn.Linear that no other module shares"
            )
        return sampler

    # ---- attaching

    def _adopt_parameters(self, first: bool) -> None:
        """Takes in parameters of the optimizers that aren't known yet."""
        named = named_parameters(self._optimizers, self._model)
        owners = {
            id(parameter): id(optimizer)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        fresh = {name: p for name, p in named.items() if self._known.get(id(p)) != owners[id(p)]}
        self._known |= {id(parameter): owners[id(parameter)] for parameter in fresh.values()}
        known = {parameter.name: parameter for parameter in self.info.parameters}
        if not first:
            fresh = self._retire(fresh, known, owners)
        added = parameter_infos({name: p for name, p in fresh.items() if name not in known}, self._model)
        known |= {parameter.name: parameter for parameter in added}
        parts = held_parts(fresh, self.world)
        for optimizer in self._optimizers:
            slots = [
                Slot(known[name], fresh[name], self.info.cells(known[name]), part)
                for name, part in parts.items()
                if owners[id(fresh[name])] == id(optimizer) and fresh[name].numel()
            ]
            for device in {slot.parameter.device for slot in slots}:
                self._add_bank(optimizer, [slot for slot in slots if slot.parameter.device == device], device)
        if not first and self._phantoms:
            self._phantoms.watch(self._model, [slot for _, slot in self._slots.values() if slot.info.name in parts])
        if added:
            self.info = self.info.with_parameters(*added)
            if not first:
                self._writer.update_info(self.info)

    def _retire(
        self, fresh: Mapping[str, Tensor], known: Mapping[str, ParameterInfo], trained: Container[int]
    ) -> dict[str, Tensor]:
        """Lets go of the slots whose names or parameters new ones take; gives the new ones that can be recorded."""
        by_name = {slot.info.name: slot for _, slot in self._slots.values()}
        owned = {id(parameter) for parameter in self._model.parameters()}
        kept, left, reshaped, taken = {}, [], [], []
        for name, parameter in fresh.items():
            _, old = self._slots.get(id(parameter), (None, by_name.get(name)))
            if name in known and known[name].layout.shape != tuple(parameter.shape):
                reshaped.append(name)
            elif old and old.parameter is not parameter and id(old.parameter) in trained and id(parameter) not in owned:
                taken.append(name)  # by its place in the optimizer it has another one's name
            else:
                kept[name] = parameter
                if old:
                    del self._slots[id(old.parameter)]
                    left.append(old.info.name)
        for names, what in (
            (left, "were replaced or moved to another optimizer; what this window had seen of them before is left out"),
            (reshaped, "were replaced by parameters of another shape, which aren't recorded; record them as a new run"),
            (
                taken,
                "were added to the optimizer under names that others have, and aren't recorded; wrap a model that holds them",
            ),
        ):
            if names:
                self.remark(f"since step {self._step} {shortened(names)} {what}")
        return kept

    def _add_bank(self, optimizer: Optimizer, slots: list[Slot], device: torch.device) -> None:
        backward = self.config.source == "backward"
        steps = UNBOUNDED if backward else self.config.flush_every
        bank = CellBank(slots, self._rules, device, steps, pack=self.config.source == "gradient")
        self._banks[id(optimizer)].append(bank)
        if self.config.compile and self.config.source == "gradient" and not bank.compile():
            raise UnsupportedError(
                "compile=True can't read element cells, or layouts whose units aren't in order; leave it out"
            )
        self._slots |= {id(slot.parameter): (bank, slot) for slot in bank.slots}
        self._probes |= {id(slot.parameter): slot.probe() for slot in bank.slots}
        if backward:
            self._frozen += [(bank, slot) for slot in bank.slots]
            self._hook_trained()

    def _hook_trained(self) -> None:
        """Hooks of ``source="backward"`` on the parameters that had none and are trained; frozen ones can't have any."""
        for bank, slot in self._frozen:
            if not slot.parameter.requires_grad:
                continue
            if hasattr(slot.parameter, "placements"):
                raise UnsupportedError(
                    f"{slot.info.name} is sharded: its gradient is reduced outside of autograd, so source='backward' "
                    "can't see it. Use source='gradient'."
                )
            self._hooks.append(slot.parameter.register_hook(Hook(partial(self._on_micro_batch, bank, slot))))
        self._frozen = [(bank, slot) for bank, slot in self._frozen if not slot.parameter.requires_grad]

    # ---- hooks

    def _on_micro_batch(self, bank: CellBank, slot: Slot, grad: Tensor) -> None:
        if not self._due or self.closed or self.failed or not slot.trained:
            return
        with self._guard(), self._watch, torch.no_grad():
            bank.sums.begin_step(self._next_step)
            bank.observe_gradient(slot, grad.detach().to_dense() if grad.is_sparse else grad.detach(), None)

    @property
    def _next_step(self) -> int:
        """The step that a backward pass belongs to now: the one that follows it, or the one whose closure runs it."""
        return self._step + (not self._stepped)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.closed or self.failed:
            return
        with self._guard():
            self._begin_step(optimizer)

    def _begin_step(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._stepped:
            self._end_step()
        if not self._stepped:
            self._step += 1
            self._observing = self._due
        self._stepped.add(id(optimizer))
        if self.failed or not self._observing:
            return
        with self._watch:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(
                    "optimizer.step is being captured in a CUDA graph, whose replays run no Python; capture forward and "
                    "backward only"
                )
            self._adopt_late(optimizer)
            turns = self.config.update_turns
            turn = self._total_observed % turns
            self._measured = [(bank, bank.slots[turn::turns]) for bank in self._banks[id(optimizer)]]
            for bank, slots in self._measured:
                bank.remember(slots)

    def _adopt_late(self, optimizer: Optimizer) -> None:
        """Follows what became of an optimizer's parameters since its last observed step: new, gone, or frozen no more."""
        self._hook_trained()
        if self._phantoms:
            self._phantoms.follow()
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if trained == self._trained.get(id(optimizer)):
            return
        if any(self._known.get(key) != id(optimizer) for key in trained):
            self._adopt_parameters(first=False)
        for bank in self._banks[id(optimizer)]:
            for slot in bank.slots:
                slot.trained = id(slot.parameter) in trained
        self._trained[id(optimizer)] = trained

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.closed or self.failed:
            return
        with self._guard():
            if self._observing:
                with self._watch:
                    self._observe(optimizer)
            if len(self._stepped) == len(self._optimizers):
                self._end_step()

    def _observe(self, optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        decays = {parameter: settings.decay for parameter, settings in group_settings([optimizer]).items()}
        with torch.no_grad():
            for bank in self._banks[id(optimizer)]:
                if self.config.source == "gradient":
                    bank.observe_gradients(self._step, skipped)
                    if self._phantoms is not None:
                        self._phantoms.observe(bank, skipped)
                elif self.config.source == "optimizer_state":
                    observe_state(bank, optimizer, self._step)
            for bank, slots in self._measured:
                bank.observe_updates(slots, decays)
        self._measured = []

    def _end_step(self) -> None:
        """All optimizers have stepped: keeps the accounts, flushes a full window, and decides about the next step."""
        self._stepped.clear()
        if self._observing:
            self._observed += 1
            self._total_observed += 1
        self._note_losses()
        if self.failed:
            return
        self._say_problems()
        if self._sampler:
            self._sampler.disarm()  # what it took belongs to this window
            self._watch.add(self._sampler.take_seconds())
        if self._phantoms:
            self._phantoms.arm(False)
            # What it did inside the step's own watch is small beside what it did in the backward pass.
            self._watch.add(self._phantoms.take_seconds())
        self._account(self._observing)
        if self._observed >= (1 if self.config.source == "optimizer_state" else self.config.flush_every):
            with self._watch:
                self._flush()
            self._account(False)
        self._look_ahead()

    def _account(self, observed: bool) -> None:
        now = perf_counter()
        spent, elapsed = self._watch.take(), now - self._last_end
        self._last_end = now
        if observed:
            self.last_observation_seconds = spent
        self._recording_seconds += spent
        self._elapsed_seconds += elapsed
        self._schedule.spent(spent, elapsed, observed)

    def _look_ahead(self) -> None:
        """Decides whether the next step is observed, in time for the hooks of its backward passes."""
        self._due = self._schedule.due(self._step + 1)
        if self._sampler and not self.failed:
            sampled = self._due and self._total_observed % self.config.firing_every == 0
            self._sampler.arm(self._step + 1) if sampled else self._sampler.disarm()
        if self._phantoms and not self.failed:
            self._phantoms.arm(self._due and self._total_observed % self.config.phantom_every == 0)

    # ---- windows

    def _restart_window(self) -> None:
        self._window_first_step = self._step + 1
        self._observed = 0
        self._recording_seconds = self._elapsed_seconds = 0.0

    def _flush(self) -> None:
        """Hands the current window to the writer's thread."""
        if self._observed == 0:
            return
        settings = group_settings(self._optimizers)
        sums = []
        for bank in (bank for banks in self._banks.values() for bank in banks):
            taken = bank.take()
            taken.norms = torch.stack(torch._foreach_norm([slot.weight() for slot in bank.slots])).float()
            probes = [slot.probe() for slot in bank.slots]
            before = [self._probes[id(slot.parameter)] for slot in bank.slots]
            moved = [(b - a).abs_().mean() for a, b in zip(before, probes, strict=True)]
            taken.displacements = torch.stack(moved).float()
            self._probes |= {id(slot.parameter): probe for slot, probe in zip(bank.slots, probes, strict=True)}
            taken.to_host()
            sums.append(([slot for slot in bank.slots if self._slots.get(id(slot.parameter)) == (bank, slot)], taken))
        raw, missed = (self._sampler.take(), self._sampler.take_missed()) if self._sampler else ([], 0)
        phantoms, armed, short = None, 0, 0
        if self._phantoms:
            phantoms, (armed, short) = self._phantoms.take(), self._phantoms.take_steps()
        steps = self._step - self._window_first_step + 1
        cost = WindowCost(steps, self._observed, self._recording_seconds, self._elapsed_seconds)
        index, first, last, sampler = self._window, self._window_first_step, self._step, self._sampler
        self._window += 1
        self._restart_window()
        self._schedule.window_ended(index, last)

        def write() -> None:
            for _, taken in sums:
                taken.wait()
            parameters = tuple(
                _parameter_window(slot, taken, settings.get(id(slot.parameter), GroupSettings()), cost)
                for slots, taken in sums
                for slot in slots
            )
            problems = tuple(
                f"{p.name}: {p.nonfinite_steps} of {p.moments.exposure + p.nonfinite_steps} observed steps between {first} "
                f"and {last} had NaN or infinite gradients and were left out"
                for p in parameters
                if p.nonfinite_steps
            )
            firings: tuple[FiringSample, ...] = ()
            if sampler is not None:
                sampler.digest(raw)
                firings = sampler.take_samples()
            lost = tuple(self._unwritten)
            if sampler is not None and sampler.sites and not firings and missed:
                problems += (
                    f"firings: no firings arrived between steps {first} and {last}, though {missed} steps were to be sampled. Watched modules "
                    "give none where nothing before them is trained, under no_grad, for a PackedSequence, and where the loss doesn't depend "
                    "on them; torch.compile leaves out the hooks, whether a model was compiled before gradloc.wrap or after it",
                )
            paired = None if phantoms is None else digest(phantoms)
            if short:
                problems += (
                    f"phantoms: {short} of {armed} sampled steps between {first} and {last} don't count, as a backward pass had fewer "
                    f"than {LEAST_PHANTOM_TOKENS} tokens, which can't be paired at random",
                )
            elif paired == () and armed:
                problems += (
                    f"phantoms: none arrived between steps {first} and {last}, though {armed} steps were to be sampled; a model "
                    "that is compiled runs no hooks",
                )
            self._writer.write_window(
                WindowRecord(index, first, last, parameters, firings, cost, problems + lost, paired)
            )
            del self._unwritten[: len(lost)]
            self._unsaid.extend(problems)

        self._thread.submit(f"window {index} (steps {first} to {last})", write)

    def flush(self) -> None:
        """Writes everything seen so far, and the current weights; returns when it is on disk. After recording stopped, nothing more.

        It ends a window. With several processes all of them must call it at the same step, or their windows would no longer be of
        the same steps.

        Raises:
            GradlocError: with ``on_error="raise"``, if writing failed.
        """
        if self.closed or os.getpid() != self._process:
            return
        with self._guard():
            if not self.failed:
                self._flush()
            if self.config.snapshots and not self.failed:
                weights, offsets = self._weights(), self._offsets()
                self._thread.submit("the snapshot", lambda: self._writer.write_snapshot("last", weights, offsets))
        self.drain()

    def drain(self) -> None:
        """Returns when all windows that have ended are on disk.

        Raises:
            GradlocError: with ``on_error="raise"``, if writing failed.
        """
        if self.closed or os.getpid() != self._process:
            return
        self._thread.drain()
        self._say_problems()
        self._note_losses()

    def remark(self, problem: str) -> None:
        """Warns of what is not as the user may think, and keeps it for the report."""
        self._unwritten.append(problem)
        self.problems.append(problem)
        warnings.warn(f"gradloc: {problem}.", RuntimeWarning, stacklevel=3)

    @property
    def step(self) -> int:
        """Optimizer steps of the run so far, those before a resume among them; pass it as ``resume=`` with a checkpoint."""
        return self._step

    def memory_bytes(self) -> int:
        """Memory that recording keeps beside the model, in bytes."""
        return sum(bank.memory_bytes() for banks in self._banks.values() for bank in banks) or self._memory

    def close(self) -> None:
        """Flushes, takes the hooks off and ends the writer. Safe to call twice, and a no-op in a forked process."""
        if self.closed or os.getpid() != self._process:
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
        for sampler in (self._sampler, self._phantoms):
            if sampler:
                sampler.remove()
        for optimizer in self._optimizers:
            _RECORDERS.pop(optimizer, None)

    def _let_go(self) -> None:
        """A closed recorder must not keep a model in memory."""
        self._memory = self.memory_bytes()
        self._banks, self._slots, self._probes = {}, {}, {}
        self._measured, self._frozen, self._optimizers = [], [], []
        self._sampler = self._phantoms = self._model = None  # type: ignore[assignment]

    def _weights(self) -> dict[str, Any]:
        """What this process holds of the weights, as NumPy copies; half precision widens to float32, which holds it exactly."""
        found = {}
        for _, slot in self._slots.values():
            weight = slot.weight()
            weight = weight.float() if weight.element_size() < 4 else weight
            found[slot.info.name] = np.array(weight.cpu().numpy(), order="C")
        return found

    def _offsets(self) -> dict[str, tuple[int, ...]]:
        return {slot.info.name: slot.part.offset for _, slot in self._slots.values()}

    # ---- failure

    def _guard(self) -> AbstractContextManager[None]:
        """What fails in it ends recording instead of training."""
        return self._failures.guard(self._fail)

    def _guard_part(self, what: Literal["firings", "phantoms"]) -> AbstractContextManager[None]:
        """What fails in it ends the recording of `what`, and nothing else."""
        return self._failures.guard(partial(self._fail_part, what))

    def _fail_part(self, what: Literal["firings", "phantoms"], error: Exception) -> None:
        sampler = self._sampler if what == "firings" else self._phantoms
        if sampler is not None:
            sampler.stop()
        message = f"{what} are not recorded any more, since step {self._next_step}: {reason(error)}. Training and other recording go on"
        self._unwritten.append(message)
        self._tell(message, error)

    def _fail(self, error: BaseException) -> None:
        """Stops recording, says so once, and lets training go on."""
        self.failed = True
        for _, slot in self._slots.values():
            slot.before = None
        if self._sampler:
            self._sampler.disarm()
        if self._phantoms:
            self._phantoms.arm(False)
        self._tell(
            f"recording stopped at step {self._step}: {reason(error)}. Training goes on; the {self._observed} observed steps since "
            "the last window were not written.",
            error,
        )

    def _note_losses(self) -> None:
        """Passes on what the writer's thread had to give up. Recording goes on: the store may come back."""
        while self._thread.lost:
            lost: Lost = self._thread.lost.pop(0)
            if isinstance(lost.error, RunExistsError):
                if not self.failed:
                    self._fail(lost.error)
                continue
            message = f"{lost.what} could not be written and is lost: {lost.error}"
            self._unwritten.append(message)
            self._tell(message, lost.error, once="could not be written")

    def _tell(self, message: str, error: BaseException, once: str = "") -> None:
        self.failed = self.failed or self._failures.raising
        self._failures.tell(message, error, once)

    def _say_problems(self) -> None:
        """Passes on what the writer's thread found: one warning a parameter, from the training thread."""
        if not self._unsaid:
            return
        with self._watch:
            while self._unsaid:
                problem = self._unsaid.popleft()
                self.problems.append(problem)
                about = problem.split(":")[0]
                if about not in self._said:
                    self._said.add(about)
                    warnings.warn(f"gradloc: {problem}", RuntimeWarning, stacklevel=4)


def _parameter_window(slot: Slot, sums: WindowSums, settings: GroupSettings, cost: WindowCost) -> ParameterWindow:
    moments = sums.moments(slot)
    measured = moments.update_exposure
    # Not every step moves every parameter: experts, heads and the optimizers of a GAN take turns. Micro-batches may be more than steps.
    steps = cost.steps * min(1.0, moments.exposure / cost.observed_steps)
    return ParameterWindow(
        name=slot.info.name,
        moments=moments,
        histogram=sums.histogram_counts(slot),
        displacement=float(sums.displacements[slot.index]),
        path=float(moments.update_abs_sum.sum()) / slot.elements / measured * steps if measured else float("nan"),
        weight_norm=float(sums.norms[slot.index]),
        nonfinite_steps=sums.nonfinite_steps(slot),
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        momentum=settings.momentum,
        part_offset=slot.part.offset,
        part_shape=slot.part.shape,
        flowing=int(sums.flowing[slot.index]),
        absorbed=int(sums.absorbed[slot.index]),
    )
