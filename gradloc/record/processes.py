"""The processes of one training run, and what they tell each other: never with a collective, so that none can hang.

Words are passed through the key-value store that every process group has. Only attaching waits for a word, with a time limit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from gradloc.errors import ConfigError, GradlocError

PATIENCE = timedelta(seconds=120)
"""How long attaching waits for the first process."""


@dataclass(frozen=True)
class World:
    """This process's rank among `size`, and the store they share (None for one process alone)."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False)

    @classmethod
    def current(cls) -> World:
        """The world of the default process group.

        Raises:
            ConfigError: a launcher started several processes, which aren't joined yet.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            if distributed.get_world_size() == 1:
                return cls()
            store = distributed.distributed_c10d._get_default_store()
            return cls(distributed.get_rank(), distributed.get_world_size(), store)
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched.isdigit() and int(launched) > 1 and "RANK" in os.environ:
            raise ConfigError(
                f"{launched} processes were launched, but torch.distributed isn't initialized; call init_process_group "
                "before gradloc.wrap, so that each process records its own part."
            )
        return cls()

    def say(self, key: str, value: str) -> None:
        """Leaves a word for the other processes."""
        if self.store is not None:
            self.store.set(f"gradloc/{key}", value)

    def heard(self, key: str) -> str | None:
        """A word that was left, or None; never waits for it."""
        if self.store is None or not self.store.check([f"gradloc/{key}"]):
            return None
        return str(self.store.get(f"gradloc/{key}").decode())

    def agree(self, key: str, value: str) -> str:
        """Rank 0's value, on every rank.

        Raises:
            GradlocError: rank 0 said nothing in time.
        """
        if self.size == 1:
            return value
        if self.rank == 0:
            self.say(key, value)
            return value
        try:
            self.store.wait([f"gradloc/{key}"], PATIENCE)
        except RuntimeError as error:
            raise GradlocError(
                f"rank {self.rank} waited {PATIENCE.seconds} s for rank 0 to call gradloc.wrap; call it on every rank."
            ) from error
        return str(self.store.get(f"gradloc/{key}").decode())
