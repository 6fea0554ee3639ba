"""What a certificate consists of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gradloc.core.names import THE_MODEL
from gradloc.errors import CertificateError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Allowed error relative to the largest output: sums in another order, in the dtype's own precision."""
CUT = 1e-6
"""Share of a weight's Σw² outside of the blocks from which on it was cut, and isn't left over by rounding."""
SHAPES = ((1,), (3,), (40,), (2, 5))
"""Batch shapes that are tried."""


def relative_error(difference: float, size: float) -> float:
    """A largest difference over the largest value; infinite where it isn't a finite number: NaN exceeds no limit, nor does it win a ``max``.

    Examples:
        >>> relative_error(0.5, 2.0), relative_error(float("nan"), 1.0), relative_error(float("inf"), float("inf"))
        (0.25, inf, inf)
    """
    return difference / max(size, 1e-30) if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Check:
    """One property of one chain: what was measured, and what is allowed."""

    chain: str
    name: str
    passed: bool
    value: float
    limit: float


@dataclass(frozen=True)
class Latency:
    """Time of the dense and of the routed chain, medians over interleaved runs, in seconds."""

    chain: str
    tokens: int
    dense: float
    routed: float
    kernel: str

    @property
    def speedup(self) -> float:
        return self.dense / self.routed


@dataclass(frozen=True)
class Memory:
    """Bytes of the dense and of the routed chain: weights, and the most that a call holds beside them, its result included."""

    chain: str
    tokens: int
    dense_weights: int
    routed_weights: int
    dense_peak: int
    routed_peak: int


@dataclass(frozen=True, repr=False)
class Certificate:
    """All checks of a routed model, and what it costs beside the dense one.

    Args:
        checks: whether the blocks compute what the plan promises.
        latency: of operators beside dense ones.
        dropped_mass: share of Σw² outside of the blocks, by weight name; 0 after annealing.
        memory: of operators beside dense ones.

    Examples:
        >>> Certificate((Check("ffn", "coverage", True, 0.0, 0.0),)).passed
        True
    """

    checks: tuple[Check, ...]
    latency: tuple[Latency, ...] = ()
    dropped_mass: dict[str, float] = field(default_factory=dict)
    memory: tuple[Memory, ...] = ()

    def __repr__(self) -> str:
        failed = len(self.failures)
        return f"Certificate({'passed' if self.passed else f'{failed} failed'}, {len(self.checks)} checks)"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def cut(self) -> dict[str, float]:
        """`dropped_mass` of those weights that aren't zero outside of their blocks: the routed model is another than the dense one."""
        return {name: share for name, share in self.dropped_mass.items() if share > CUT}

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "latency": [{**asdict(item), "speedup": item.speedup} for item in self.latency],
            "dropped_mass": self.dropped_mass,
            "memory": [asdict(item) for item in self.memory],
        }

    def raise_if_failed(self) -> None:
        """Raises `CertificateError` naming what failed."""
        if not self.passed:
            worst = "; ".join(
                f"{c.chain or THE_MODEL}: {c.name} is {c.value:.3g}, allowed {c.limit:.3g}" for c in self.failures
            )
            raise CertificateError(
                f"the routed model doesn't compute what its plan promises: {worst}. The plan or its weights were altered."
            )


def join(parts: Sequence[Certificate]) -> Certificate:
    """One certificate of several chains'."""
    return Certificate(
        tuple(check for part in parts for check in part.checks),
        tuple(item for part in parts for item in part.latency),
        {name: value for part in parts for name, value in part.dropped_mass.items()},
        tuple(item for part in parts for item in part.memory),
    )
