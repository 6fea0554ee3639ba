r"""Phantom gradients: what a weight's gradient would be if activations and errors had nothing to do with each other.

A linear layer's gradient is $\sum_n \delta_n x_n^\top$ over tokens. Its phantom is $\sum_n \delta_{\pi(n)} x_n^\top$ with the same activations
and errors paired by a random permutation that leaves no token in its place: the same sizes and means, but no dependency between
an input and an output beyond those. Costs as much as the layer's weight gradient in a step that samples, and a copy of the weight
in memory while it lasts.

A pass of few tokens can't be paired anew: one token has no other, and two or three only each other. A step with a pass of fewer
than `LEAST_PHANTOM_TOKENS` has no phantom.

Shape letters: `T` tokens, `O` out units, `I` in units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradloc.core.events import EventRule
from gradloc.core.hooks import Hook
from gradloc.core.window import LEAST_PHANTOM_TOKENS, PhantomWindow
from gradloc.errors import UnsupportedError
from gradloc.record.accumulate import CellBank, Slot
from gradloc.record.failures import Guarded
from gradloc.record.firings import first_input
from gradloc.record.reduction import Chunk
from gradloc.record.tensor_hooks import on_gradient


@dataclass
class _Sums:
    """One weight's phantom moments in the current window, ``[R, K]``, on its device."""

    slot: Slot
    grad_sum: Tensor
    grad_sumsq: Tensor
    sum_squares: Tensor
    events: Tensor
    exposure: Tensor

    @classmethod
    def fresh(cls, slot: Slot) -> _Sums:
        device = slot.parameter.device
        sums = (torch.zeros(slot.reduction.shape, dtype=torch.float32, device=device) for _ in range(4))
        return cls(slot, *sums, torch.zeros((), dtype=torch.int64, device=device))


class PhantomSampler:
    """Pairs activations and errors of linear layers at random, in the steps for which it is armed.

    Args:
        model: its `torch.nn.Linear` modules are watched.
        slots: recorded parameters; those that are the weight of exactly one such module, held whole, are sampled.
        rule: what counts as an event, as for gradients.
        seed: of the permutations. Torch's random state is never touched.
        guard: what fails in a hook stops sampling instead of training.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot], rule: EventRule, seed: int, guard: Guarded) -> None:
        self._rule, self._random = rule, np.random.default_rng([seed, 0x9A17])
        self._guard, self._stopped = guard, False
        self.seconds = 0.0
        self._armed = False
        self._armed_steps = self._short_steps = 0
        self._short: set[str] = set()
        self._paired: dict[str, Tensor] = {}
        self._raw_norm: dict[str, Tensor] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._frozen: list[tuple[nn.Module, Slot]] = []
        self._sums: dict[str, _Sums] = {}
        self.watch(model, slots)

    def watch(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        """Takes in parameters, each in place of an earlier one of its name; frozen ones as soon as they are trained."""
        slot_of = {id(slot.parameter): slot for slot in slots}
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for key, modules in owners.items():
            slot, module = slot_of.get(key), modules[0]
            plain = len(modules) == 1 and _is_linear(module) and module.weight is (slot and slot.parameter)
            if slot is not None and plain and not hasattr(slot.parameter, "placements"):
                self._frozen.append((module, slot))
        self.follow()

    def follow(self) -> None:
        """Watches the weights that were frozen and aren't any more."""
        for module, slot in self._frozen:
            if slot.parameter.requires_grad:
                name = slot.info.name
                for handle in self._handles.get(name, ()):
                    handle.remove()
                self._sums[name] = _Sums.fresh(slot)
                note = Hook(partial(self._note_norm, name))
                self._handles[name] = [
                    module.register_forward_hook(self._forward_hook(name), with_kwargs=True),
                    slot.parameter.register_post_accumulate_grad_hook(note),
                ]
        self._frozen = [(module, slot) for module, slot in self._frozen if not slot.parameter.requires_grad]

    @property
    def names(self) -> list[str]:
        """The weights that are sampled, once they are trained."""
        return [*self._sums, *(slot.info.name for _, slot in self._frozen)]

    # ---- hooks

    def _forward_hook(self, name: str) -> Hook:
        def watch(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object], output: object) -> None:
            if torch.compiler.is_compiling() or not self._armed or not torch.is_grad_enabled():
                return
            with self._guard():
                activations = first_input(inputs, named)
                if isinstance(output, Tensor) and output.requires_grad and isinstance(activations, Tensor):
                    on_gradient(output, partial(self._pair, name, activations.detach()))

        return Hook(watch)

    def _pair(self, name: str, activations: Tensor, errors: Tensor) -> None:
        if not self._armed:
            return
        began = perf_counter()
        with self._guard(), torch.no_grad(), torch.autocast(errors.device.type, enabled=False):
            if name in self._raw_norm and self._sums[name].slot.parameter.grad is None:
                # An earlier pass had left a gradient, which was thrown away before any step used it.
                self._paired.pop(name, None)
                self._raw_norm.pop(name)
                self._short.discard(name)
            x, delta = activations.reshape(-1, activations.shape[-1]), errors.detach().reshape(-1, errors.shape[-1])
            if len(x) != len(delta):
                raise UnsupportedError(
                    f"{name}: its module takes {len(x)} tokens and gives {len(delta)}, so that they can't be paired"
                )
            if len(delta) < LEAST_PHANTOM_TOKENS:
                self._short.add(name)
                return
            order = torch.from_numpy(elsewhere(self._random, len(delta))).to(delta.device, non_blocking=True)
            kind = torch.promote_types(x.dtype, delta.dtype)
            phantom = (delta.index_select(0, order).to(kind).T @ x.to(kind)).float()
            self._paired[name] = self._paired[name] + phantom if name in self._paired else phantom
        self.seconds += perf_counter() - began

    def _note_norm(self, name: str, parameter: Tensor) -> None:
        if self._armed and parameter.grad is not None:
            with self._guard():
                self._raw_norm[name] = parameter.grad.detach().float().norm()

    # ---- steps

    def arm(self, armed: bool) -> None:
        """Whether the passes that lead to the next optimizer step are sampled. Forgets what an earlier step left."""
        self._armed_steps += self._armed
        self._short_steps += bool(self._short)
        self._armed = armed and not self._stopped
        self._paired, self._raw_norm, self._short = {}, {}, set()

    def stop(self) -> None:
        """Ends sampling for good, and forgets the current step; earlier ones stay."""
        self._stopped = True
        self._armed, self._paired, self._raw_norm, self._short = False, {}, {}, set()

    def observe(self, bank: CellBank, skipped: Tensor | None) -> None:
        """Adds the step's phantoms of a bank's parameters, scaled as unscaling and clipping scaled the gradients.

        What isn't finite, and what the optimizer skipped, is left out.
        """
        began = perf_counter()
        with self._guard(), torch.no_grad():
            for slot in bank.slots:
                sums = self._sums.get(slot.info.name)
                if sums is None or sums.slot is not slot:
                    continue
                phantom, raw = (of.pop(slot.info.name, None) for of in (self._paired, self._raw_norm))
                grad = slot.grad()
                if slot.info.name in self._short:
                    continue
                if phantom is not None and raw is not None and grad is not None:
                    self._add(sums, phantom * (grad.float().norm() / raw), skipped)
        self.seconds += perf_counter() - began

    def _add(self, sums: _Sums, phantom: Tensor, skipped: Tensor | None) -> None:
        reduction = sums.slot.reduction
        squares = phantom.square()
        total = squares.sum()
        good = torch.isfinite(total) & (total > 0)
        if skipped is not None:
            good = good & (skipped.to(good.device) == 0)
        flags = squares > total / squares.numel() * self._rule.threshold**2

        def cells(of: Callable[[Tensor, Chunk], Tensor], values: Tensor) -> Tensor:
            split, found = (
                reduction.split(values),
                torch.zeros(reduction.shape, dtype=torch.float32, device=values.device),
            )
            for chunk in reduction.chunks:
                found[chunk.rows] += of(split[chunk.elements], chunk)
            return found

        added = cells(reduction.sum, phantom)
        for into, what in (
            (sums.grad_sum, added),
            (sums.sum_squares, added.square()),
            (sums.grad_sumsq, cells(reduction.sum, squares)),
            (sums.events, cells(reduction.count, flags)),
        ):
            into += torch.where(good, what, 0.0)
        sums.exposure += good

    def take(self) -> list[_Sums]:
        """Hands over the window's sums and begins new ones; `digest` makes them plain values on another thread."""
        taken = list(self._sums.values())
        self._sums = {name: _Sums.fresh(sums.slot) for name, sums in self._sums.items()}
        return taken

    def take_steps(self) -> tuple[int, int]:
        """Steps that were to be sampled since the last call, and those of them that had a pass of too few tokens."""
        steps = self._armed_steps, self._short_steps
        self._armed_steps = self._short_steps = 0
        return steps

    def take_seconds(self) -> float:
        """Seconds spent since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def remove(self) -> None:
        """Takes the hooks off. Safe to call twice."""
        for handle in chain.from_iterable(self._handles.values()):
            handle.remove()
        self._handles.clear()


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes what `torch.nn.Linear` does; a subclass with a forward of its own may compute anything."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def elsewhere(random: np.random.Generator, count: int) -> NDArray[np.int64]:
    """A random cycle through all of `count` places: no place keeps its own, and every other one is equally likely there.

    Examples:
        >>> places = elsewhere(np.random.default_rng(0), 5)
        >>> sorted(places.tolist()), (places == np.arange(5)).any()
        ([0, 1, 2, 3, 4], np.False_)
    """
    tour = random.permutation(count)
    places = np.empty(count, np.int64)
    places[tour] = np.roll(tour, 1)
    return places


def digest(taken: Sequence[_Sums]) -> tuple[PhantomWindow, ...]:
    """Plain values of a window's sums that saw anything. Waits for the device, so it belongs on the writer's thread."""
    return tuple(
        PhantomWindow(
            name=sums.slot.info.name,
            grad_sum=_in_place(sums, sums.grad_sum).astype(np.float64),
            grad_sumsq=_in_place(sums, sums.grad_sumsq).astype(np.float64),
            sum_squares=_in_place(sums, sums.sum_squares).astype(np.float64),
            events=_in_place(sums, sums.events).round().astype(np.int64),
            exposure=exposure,
        )
        for sums in taken
        if (exposure := int(sums.exposure))
    )


def _in_place(sums: _Sums, cells: Tensor) -> NDArray[np.floating]:
    """Cells ``[R, K]``, from the order in which they lie in memory."""
    values = cells.cpu().numpy()
    return np.ascontiguousarray(values.T) if sums.slot.reduction.turned else values
