"""The demo's training loop: accumulation, clipping, a schedule; nothing in it knows gradloc but the annealer's one line."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradloc.cli.demo.corpus import Corpus
from gradloc.cli.demo.gpt import GPT, loss_of, validation_loss
from gradloc.pipeline.annealing import Annealer

ACCUMULATION = 2


@dataclass(frozen=True)
class Sizes:
    """How much the demo trains and measures. Times are for two cores."""

    record_steps: int
    stage_steps: int
    sequences: int = 8
    length: int = 128
    validation_batches: int = 16
    peak_rate: float = 3e-3

    @property
    def total_steps(self) -> int:
        return self.record_steps + self.stage_steps


FULL = Sizes(record_steps=440, stage_steps=180)
QUICK = Sizes(record_steps=80, stage_steps=24, validation_batches=6)


@dataclass
class Trainer:
    """A model with everything that its training loop needs, so that several stages can start from the same state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    corpus: Corpus
    sizes: Sizes
    batches: torch.Generator

    @classmethod
    def fresh(cls, corpus: Corpus, sizes: Sizes, seed: int = 0) -> Trainer:
        torch.manual_seed(seed)
        model = GPT(corpus.vocabulary, sizes.length)
        optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.peak_rate, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, sizes.total_steps))
        return cls(model, optimizer, scheduler, corpus, sizes, torch.Generator().manual_seed(seed + 1))

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "batches": self.batches.get_state(),
            }
        )

    @classmethod
    def resumed(cls, corpus: Corpus, sizes: Sizes, state: dict[str, Any]) -> Trainer:
        """A new trainer in a saved state: the same weights, moments, schedule and the same batches to come."""
        trainer, state = cls.fresh(corpus, sizes), copy.deepcopy(state)
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scheduler.load_state_dict(state["scheduler"])
        trainer.batches.set_state(state["batches"])
        return trainer

    def train(self, steps: int, advance: Callable[[], None], annealer: Annealer | None = None) -> None:
        """The loop. With an annealer it has one line more."""
        self.model.train()
        for _ in range(steps):
            for _ in range(ACCUMULATION):
                batch = self.corpus.batch(self.batches, self.sizes.sequences, self.sizes.length)
                (loss_of(self.model, batch) / ACCUMULATION).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if annealer is not None:
                annealer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            advance()

    def validate(self, batches: int | None = None) -> float:
        count = batches or self.sizes.validation_batches
        return validation_loss(self.model, self.corpus.held_out_batches(count, 16, self.sizes.length))


def _rate(step: int, total: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (total - warm))))
