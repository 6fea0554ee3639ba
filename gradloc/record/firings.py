"""Which units carry an error signal for which token, sampled inside the backward pass.

A forward hook arms a hook on the activation's input; the backward pass then hands over that tensor's gradient. A tensor
hook is used rather than a module's full backward hook because it leaves in-place activations alone, and because it also
fires for checkpointed modules, whose forward runs twice.

Shape letters: `T` tokens, `S` sampled tokens, `U` units.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradloc.core.activations import ACTIVATIONS
from gradloc.core.hooks import Hook
from gradloc.core.places import as_tokens
from gradloc.core.sites import FiringSite
from gradloc.core.window import FiringSample
from gradloc.core.wrappers import plain_modules
from gradloc.errors import ModelMismatchError
from gradloc.record.config import RecordConfig
from gradloc.record.failures import Guarded
from gradloc.record.tensor_hooks import on_gradient

FIRING_RMS = 2.0
"""Below this multiple of the sample's RMS a unit does not fire, unless its activation gives exact zeros."""
EXACT_ACTIVATIONS = ("relu", "relu2")
EXACT_SHARE = 0.02
"""A sample of an unknown activation with this share of exact zeros is taken as exact."""


def uniform_sample(random: np.random.Generator, count: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """`wanted` of `count` positions and their sort keys, as if every position had drawn a uniform key and the smallest had won.

    Samples of several batches therefore join into a uniform sample of all of them by keeping the smallest keys. Costs no more
    than the sample, however many positions there are.
    """
    taken = min(wanted, count)
    positions = np.sort(random.choice(count, taken, replace=False))
    # Order statistics one after the other: the next smallest of n uniform keys above x is 1 - (1 - x)·u^(1/n).
    left = np.cumprod(random.random(taken) ** (1.0 / (count - np.arange(taken))))
    return positions, random.permutation(1.0 - left)


@dataclass
class _Reservoir:
    """The sample of one site in one step, over its micro-batches."""

    keys: np.ndarray = field(default_factory=lambda: np.zeros(0))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: Tensor | None = None
    batches: int = 0


@dataclass(frozen=True)
class RawSample:
    """Sampled error signals of one site in one step, or `activations`; `ready` tells when they have arrived in host memory."""

    site: FiringSite
    step: int
    positions: np.ndarray
    rows: Tensor
    ready: torch.cuda.Event | None = None
    activations: bool = False


class FiringSampler:
    """Samples tokens of every site, whenever it is armed: each token of the step is equally likely, over all micro-batches,
    and the same tokens are taken at sites that see the same tokens.

    Args:
        model: has the modules that `sites` name.
        sites: what is watched.
        config: `firing_tokens` are sampled per armed step; `seed` decides which.
        guard: what fails in a hook stops sampling instead of training.
        rank: of this process, so that processes sample apart.
        forward: sample activations in the forward pass, where nothing is trained, instead of error signals.

    Raises:
        ModelMismatchError: the model lacks a module.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[FiringSite],
        config: RecordConfig,
        guard: Guarded,
        rank: int = 0,
        forward: bool = False,
    ) -> None:
        self._guard, self._forward, self._stopped = guard, forward, False
        self.tokens = config.firing_tokens
        self.armed_step: int | None = None
        self.seconds = 0.0
        self._missed = 0
        self.sites = tuple(sites)
        self._seed = (config.seed, rank)
        self._reservoirs: dict[FiringSite, _Reservoir] = {}
        self._raw: list[RawSample] = []
        self._digested: list[FiringSample] = []
        self._lock = threading.Lock()
        self._handles: list[RemovableHandle] = []
        self._dims: dict[FiringSite, int] = {}
        modules = plain_modules(model)
        missing = [site.module for site in sites if site.module not in modules]
        if missing:
            raise ModelMismatchError(
                f"the run has firings of {', '.join(missing)}, which this model has no module for. Resume with the model that was recorded, "
                "pass firings=False, or start a new run."
            )
        for site in sites:
            module = modules[site.module]
            if site.kind == "heads":
                self._handles.append(module.register_forward_pre_hook(self._input_hook(site), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(site)))
            self._dims[site] = len(module.kernel_size) if site.kind == "channels" else 0  # type: ignore[arg-type]

    # ---- hooks

    def _output_hook(self, site: FiringSite) -> Hook:
        def watch(module: nn.Module, inputs: object, output: object) -> None:
            # A compiler that traces this finds nothing to trace.
            if torch.compiler.is_compiling() or self.armed_step is None:
                return
            with self._guard():
                self._watch(site, output[0] if isinstance(output, tuple) else output)

        return Hook(watch)

    def _input_hook(self, site: FiringSite) -> Hook:
        def watch(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            if torch.compiler.is_compiling() or self.armed_step is None:
                return
            with self._guard():
                self._watch(site, first_input(inputs, named))

        return Hook(watch)

    def _watch(self, site: FiringSite, values: object) -> None:
        if self._forward and isinstance(values, Tensor) and self.armed_step is not None:
            self._collect(site, self.armed_step, ACTIVATIONS.get(site.activation, _same)(values.detach()))
        elif isinstance(values, Tensor) and values.requires_grad and torch.is_grad_enabled():
            on_gradient(values, partial(self._collect, site, self.armed_step))

    def _collect(self, site: FiringSite, step: int, grad: Tensor) -> None:
        if step != self.armed_step:
            return
        began = perf_counter()
        with self._guard(), torch.no_grad():
            rows = as_tokens(grad.detach(), self._dims[site])
            held = self._reservoirs.setdefault(site, _Reservoir())
            count = rows.shape[0]
            # Sites with as many tokens draw the same ones.
            random = np.random.default_rng([*self._seed, step, held.batches, count])
            positions, keys = uniform_sample(random, count, self.tokens)
            held.batches += 1
            chosen = rows.index_select(0, torch.from_numpy(positions).to(rows.device, non_blocking=True))
            if site.groups:
                chosen = chosen.unflatten(-1, (site.groups, -1)).float().norm(dim=-1)
            keys, positions = np.append(held.keys, keys), np.append(held.positions, positions)
            best = np.sort(np.argsort(keys)[: self.tokens])
            joined = chosen if held.rows is None else torch.cat([held.rows, chosen])
            if len(best) < len(keys):
                joined = joined.index_select(0, torch.from_numpy(best).to(rows.device, non_blocking=True))
            held.keys, held.positions, held.rows = keys[best], positions[best], joined
        self.seconds += perf_counter() - began

    # ---- steps

    def arm(self, step: int) -> None:
        """Samples the forward and backward passes that lead to optimizer step `step`."""
        self.disarm()
        self.armed_step = None if self._stopped else step

    def stop(self) -> None:
        """Ends sampling for good. What the current step has so far isn't all of its tokens, and is forgotten."""
        self._stopped, self._reservoirs, self.armed_step = True, {}, None

    def disarm(self) -> None:
        """Ends the current step's sample."""
        if self.armed_step is not None:
            if not self._reservoirs:
                self._missed += 1
            sites = self._reservoirs
            for site, held in sites.items():
                if held.rows is not None:
                    self._raw.append(RawSample(site, self.armed_step, held.positions, held.rows))
        self._reservoirs = {}
        self.armed_step = None

    def take_seconds(self) -> float:
        """Seconds spent since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def take_missed(self) -> int:
        """Armed steps since the last call in which nothing arrived."""
        missed, self._missed = self._missed, 0
        return missed

    def take(self) -> list[RawSample]:
        """Hands over the raw samples so far, on their way to host memory; `digest` makes them plain values on another thread."""
        taken, self._raw = self._raw, []
        moved = []
        for raw in taken:
            rows, ready = raw.rows, None
            if rows.is_cuda:
                rows = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True).copy_(
                    rows, non_blocking=True
                )
                ready = torch.cuda.Event()
                ready.record()
            moved.append(replace(raw, rows=rows, ready=ready, activations=self._forward))
        return moved

    def digest(self, raw: list[RawSample]) -> None:
        """Keeps of raw samples the units that fired. Waits for the device, so it belongs on the writer's thread."""
        found = [sample for one in raw if (sample := _fired(one)) is not None]
        with self._lock:
            self._digested += found

    def take_samples(self) -> tuple[FiringSample, ...]:
        """Everything that was digested since the last call."""
        with self._lock:
            taken, self._digested = self._digested, []
        return tuple(taken)

    def remove(self) -> None:
        """Takes the hooks off the modules. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def first_input(inputs: tuple[object, ...], named: dict[str, object]) -> object:
    """What a module was called with first, by place or by name."""
    return inputs[0] if inputs else next(iter(named.values()), None)


def _same(values: Tensor) -> Tensor:
    return values


def _fired(raw: RawSample) -> FiringSample | None:
    """Energies of the units that fired, of the tokens that have a signal, in units of their mean; None if there is no finite signal."""
    if raw.ready is not None:
        raw.ready.synchronize()
    squares = raw.rows.float().square().numpy()
    # Padding, masked labels, the last token of a causal model, or all but the last step of an LSTM have no signal, and say nothing of units. But
    # that no unit is active says something.
    live = squares.any(1)
    if not live.any():  # nor does an expert that no token came to
        return None
    known, zeros = raw.site.activation, float((squares[live] == 0).mean())
    counts = live | raw.activations
    squares, positions = squares[counts], raw.positions[counts]
    mean = float(squares.mean())
    if not np.isfinite(mean):
        return None
    energy = squares / mean
    exact = known in EXACT_ACTIVATIONS or (not known and zeros >= EXACT_SHARE)
    tokens, units = np.nonzero(energy if exact else energy > FIRING_RMS**2)
    return FiringSample(
        module=raw.site.module,
        step=raw.step,
        positions=positions.astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(np.bincount(tokens, minlength=len(squares)))]).astype(np.int32),
        units=units.astype(np.int32),
        energy=energy[tokens, units].astype(np.float32),
        width=squares.shape[1],
    )
