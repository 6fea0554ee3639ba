"""What recording will cost, before training: memory, disk and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gradloc.core.layout import CellGrid
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import UnsupportedError
from gradloc.record.accumulate import CellBank, Slot
from gradloc.record.config import RecordConfig
from gradloc.record.reduction import Part

ROUNDS = 7


@dataclass(frozen=True)
class RecordEstimate:
    """The cost of recording a model with some settings.

    Args:
        parameters, cells: weights that are recorded, and cells they are counted in.
        memory_bytes: kept beside the model all the time; `scratch_bytes` the chunk that is worked on; `copy_bytes` the
            weights that are kept during a step whose update is measured.
        memory_share: of the parameters' own bytes.
        observation_seconds: one observed step, measured here on random gradients, so it depends on this machine.
        step_seconds: a training step, if it was given.
        every: steps between observations under the budget, if `step_seconds` was given.
        share: of training time.
        window_bytes: of one window's cells before compression, if every cell had an event; on disk it is less. Sampled tokens come on top.
        snapshot_bytes: of the initial and the last weights, once a run.
    """

    parameters: int
    cells: int
    memory_bytes: int
    scratch_bytes: int
    copy_bytes: int
    memory_share: float
    observation_seconds: float
    step_seconds: float | None
    every: float | None
    share: float | None
    window_bytes: int
    snapshot_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    parameters: Sequence[tuple[ParameterInfo, Tensor]],
    config: RecordConfig,
    aim: float,
    step_seconds: float | None,
    cell_bytes: int,
) -> RecordEstimate:
    """Builds the accumulators that recording would, and times them on random gradients.

    Args:
        parameters: description and tensor of each; their gradients are put back as they were.
        config: the settings.
        aim: share of training time that the schedule spends on purpose.
        step_seconds: of a training step without recording.
        cell_bytes: on disk for a cell of a window.
    """
    device = parameters[0][1].device
    if {parameter.device for _, parameter in parameters} != {device}:
        raise UnsupportedError("the model lies on several devices; estimate each part by itself.")
    slots = [Slot(i, p, CellGrid(i.layout, config.granularity), Part.whole(tuple(p.shape))) for i, p in parameters]
    bank = CellBank(slots, config.rules, device, config.flush_every)
    before = [slot.parameter.grad for slot in slots]
    turns = [bank.slots[turn :: config.update_turns] for turn in range(config.update_turns)]
    times = []
    try:
        # Training goes on from the random state that it had.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for slot in slots:
                slot.parameter.grad = torch.randn_like(slot.parameter)
        for step in range(ROUNDS):
            measured = turns[step % len(turns)]
            began = _now(device)
            with torch.no_grad():
                bank.remember(measured)
                bank.observe_gradients(step + 1, None)
                bank.observe_updates(measured, {})
            times.append(_now(device) - began)
    finally:
        for slot, grad in zip(slots, before, strict=True):
            slot.parameter.grad = grad
    cost = median(times[1:])
    own = sum(slot.parameter.nbytes for slot in slots)
    every = share = None
    if step_seconds is not None:
        every = config.every or max(1.0, cost / (aim * config.overhead * step_seconds))
        share = cost / every / step_seconds
    return RecordEstimate(
        parameters=sum(slot.elements for slot in slots),
        cells=bank.cells,
        memory_bytes=bank.memory_bytes(),
        scratch_bytes=bank.scratch_bytes(),
        copy_bytes=max(sum(slot.parameter.nbytes for slot in turn) for turn in turns),
        memory_share=bank.memory_bytes() / own,
        observation_seconds=cost,
        step_seconds=step_seconds,
        every=every,
        share=share,
        window_bytes=cell_bytes * bank.cells,
        snapshot_bytes=2 * own if config.snapshots else 0,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
