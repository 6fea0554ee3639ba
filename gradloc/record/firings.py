"""Which units carry an error signal for which token, sampled inside the backward pass.

A forward hook arms a hook on the activation's input; the backward pass then hands over that tensor's gradient. A tensor
hook is used rather than a module's full backward hook because it leaves in-place activations alone.

Shape letters: `T` sampled tokens, `U` units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradloc.core.window import FiringSample

FIRING_RMS = 2.0
"""Below this multiple of the sample's RMS a unit does not fire, unless its activation gives exact zeros."""
EXACT_ACTIVATIONS = ("relu",)


class FiringSampler:
    """Samples tokens of the operators it was given, whenever it is armed.

    Args:
        operators: name, module and following activation of each operator whose output units are watched.
        tokens: tokens sampled per armed backward pass; the same positions in every operator.
        seed: of the choice of tokens.
    """

    def __init__(self, operators: Sequence[tuple[str, nn.Module, str]], tokens: int, seed: int) -> None:
        self.tokens = tokens
        self.armed_step: int | None = None
        self.seconds = 0.0
        self._random = np.random.default_rng(seed)
        self._exact = {name: activation in EXACT_ACTIVATIONS for name, _, activation in operators}
        self._positions: dict[int, np.ndarray] = {}
        self._taken: set[str] = set()
        self._samples: list[tuple[str, int, np.ndarray, Tensor]] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._forward_hook(name)) for name, module, _ in operators
        ]

    def _forward_hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def arm(module: nn.Module, inputs: object, output: object) -> None:
            if self.armed_step is None or name in self._taken or not isinstance(output, Tensor):
                return
            if output.requires_grad and torch.is_grad_enabled():
                self._taken.add(name)
                output.register_hook(partial(self._collect, name, self.armed_step))

        arm.gradloc_hook = True  # type: ignore[attr-defined]  # so that a copied model can shed it
        return arm

    def arm(self, step: int) -> None:
        """Samples the next forward and backward pass, which lead to optimizer step `step`."""
        self.armed_step = step
        self._positions.clear()
        self._taken.clear()

    def disarm(self) -> None:
        self.armed_step = None

    def _collect(self, name: str, step: int, grad: Tensor) -> None:
        began = perf_counter()
        flat = grad.detach().reshape(-1, grad.shape[-1])
        count = flat.shape[0]
        if count not in self._positions:
            self._positions[count] = np.sort(self._random.permutation(count)[: self.tokens])
        positions = self._positions[count]
        self._samples.append((name, step, positions, flat[torch.from_numpy(positions).to(flat.device)].float()))
        self.seconds += perf_counter() - began

    def take(self) -> list[tuple[str, int, np.ndarray, Tensor]]:
        """Hands over the raw samples so far; `firing_samples` makes them plain values on another thread."""
        taken, self._samples = self._samples, []
        return taken

    def take_seconds(self) -> float:
        """Seconds spent since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def firing_samples(self, raw: list[tuple[str, int, np.ndarray, Tensor]]) -> tuple[FiringSample, ...]:
        """Raw gradients as energies, zero where the unit did not fire."""
        by_module: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for name, step, positions, grad in raw:
            squares = grad.square().cpu().numpy()
            mean = float(squares.mean())
            if not np.isfinite(mean) or mean == 0.0:
                continue
            energy = squares / mean
            if not self._exact[name]:
                energy[energy <= FIRING_RMS**2] = 0.0
            by_module.setdefault(name, []).append((step, positions, energy))
        return tuple(
            FiringSample(
                module=name,
                steps=np.concatenate([np.full(len(positions), step, np.int64) for step, positions, _ in parts]),
                positions=np.concatenate([positions for _, positions, _ in parts]).astype(np.int64),
                energy=np.concatenate([energy for _, _, energy in parts]).astype(np.float32),
            )
            for name, parts in by_module.items()
        )

    def remove(self) -> None:
        """Takes the hooks off the modules. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
