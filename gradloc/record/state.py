"""Evidence at no cost per step: the moments that Adam-family optimizers keep anyway, read at the end of each window.

They are exponential averages, not sums over the window, and are stored under their own source, never beside gradient moments.

Source: Kingma & Ba, "Adam", arXiv 1412.6980, algorithm 1 (bias correction).
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from gradloc.errors import UnsupportedError
from gradloc.record.accumulate import CellBank, local

MEAN, SQUARE = "exp_avg", "exp_avg_sq"


def observe_state(bank: CellBank, optimizer: Optimizer, step: int) -> None:
    r"""Adds one reading of an optimizer's moments: $\hat m = m/(1-β_1^t)$ as Σg, $\hat v = v/(1-β_2^t)$ as Σg².

    A reading has exposure 1: per observed step the mean of $g$ and of $g^2$, as the optimizer remembers them. Events count
    elements with $|\hat m|$ above κ times its own rms.

    Raises:
        UnsupportedError: the optimizer keeps no such moments.
    """
    bank.sums.begin_step(step)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for slot in bank.slots:
        if not slot.trained:
            continue
        state = optimizer.state.get(slot.parameter, {})
        if not state and slot.parameter.grad is None:
            continue  # never had a gradient
        if MEAN not in state or SQUARE not in state:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps no {MEAN} and {SQUARE} for {slot.info.name}, which "
                "source='optimizer_state' reads. Use an optimizer of the Adam family, or source='gradient'"
            )
        first, second = groups[id(slot.parameter)]["betas"]
        count = torch.as_tensor(state["step"], dtype=torch.float64, device=bank.device)
        mean = local(state[MEAN]).float() / (1 - first**count).float()
        square = local(state[SQUARE]).float() / (1 - second**count).float()
        bank.observe_moments(slot, mean, square)
