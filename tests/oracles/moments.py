"""Moments and events recomputed element by element from plain gradients and weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class MomentOracle:
    """Watches an optimizer's parameters from outside: call `before` and `after` around each optimizer step."""

    parameters: dict[str, torch.nn.Parameter]
    grads: dict[str, list[np.ndarray]] = field(default_factory=dict)
    updates: dict[str, list[np.ndarray]] = field(default_factory=dict)
    changed: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def before(self) -> None:
        self._weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._grads = {name: None if p.grad is None else p.grad.detach().clone() for name, p in self.parameters.items()}

    def after(self, rate: float, decay: float) -> None:
        for name, parameter in self.parameters.items():
            if self._grads[name] is None:
                continue
            old, new = self._weights[name], parameter.detach()
            self.grads.setdefault(name, []).append(self._grads[name].double().cpu().numpy())
            self.updates.setdefault(name, []).append((new.float() - old.float()).abs().double().cpu().numpy())
            moved = new != old
            if decay:
                # The two ways in which implementations round decoupled decay.
                moved &= new != old * (1 - rate * decay)
                moved &= new != (old.float() - rate * decay * old.float()).to(old.dtype)
            self.changed.setdefault(name, []).append(moved.cpu().numpy())

    def events(self, name: str, kappa: float = 2.0) -> np.ndarray:
        """How often |g| > κ·rms(g), per element."""
        return sum((np.abs(g) > kappa * np.sqrt((g**2).mean())).astype(int) for g in self.grads[name])


def cell_sums(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums ``[O, I, C]`` over cells with two plain loops."""
    rows, columns = -(-values.shape[0] // height), -(-values.shape[1] // width)
    sums = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            sums[row, column] = values[row * height : (row + 1) * height, column * width : (column + 1) * width].sum()
    return sums
