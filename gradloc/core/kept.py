"""How much of the evidence blocks keep.

Shape letters: `O` out units, `I` in units, `U` units of a layer, `B` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradloc.core.operators import memberships
from gradloc.core.plan import HUB, ISOLATED, Labels
from gradloc.errors import ConfigError, EmptyRunError, NonFiniteError

Floats = NDArray[np.floating]
Edges = Sequence[tuple[int, int]]
"""``(into, out)`` unit layers of each operator's evidence; without it the outputs of each are the inputs of the next."""
WIDE = 1 << 22
"""From this many dependencies on, an operator's evidence is kept in single precision."""


def normalised(evidence: Sequence[Floats], edges: Edges | None = None) -> list[Floats]:
    """Each operator's evidence scaled to sum 1.

    Raises:
        ConfigError: no operator, or operators that don't fit one another.
        NonFiniteError, EmptyRunError: an operator's evidence isn't finite, is negative, or all zero.
    """
    if not evidence:
        raise ConfigError("evidence is empty; give one array [O, I] per operator.")
    shapes = [np.shape(values) for values in evidence]
    faults = [
        f"operator {n} has shape {s}, not [O, I] with units on both sides"
        for n, s in enumerate(shapes)
        if len(s) != 2 or 0 in s
    ]
    if not faults:
        faults = _misfits(shapes, chained(evidence, edges))
    if faults:
        raise ConfigError("evidence: " + "; ".join(faults) + ".")
    found: list[Floats] = []
    for index, values in enumerate(evidence):
        array: Floats = np.asarray(values, np.float64 if np.size(values) < WIDE else None)
        low, high = float(array.min()), float(array.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise NonFiniteError(
                f"evidence of operator {index} has NaN or infinity; the run recorded a diverged model."
            )
        if low < 0:
            raise ConfigError(
                f"evidence of operator {index} goes down to {low:.3g}; it must be 0 or more, such as Σg²·w²."
            )
        if not high > 0:
            raise EmptyRunError(
                f"evidence of operator {index} is all zero: it was never trained, so it has no blocks to find."
            )
        # Brought near 1 by a power of two, which rounds nothing: single precision has no place for very small or large evidence.
        scaled: Floats = np.empty(array.shape, np.float32 if array.size >= WIDE else np.float64)
        np.ldexp(array, -int(np.frexp(high)[1]), out=scaled, casting="same_kind")
        found.append(scaled / scaled.dtype.type(scaled.sum(dtype=np.float64)))
    return found


def _misfits(shapes: Sequence[tuple[int, ...]], edges: Edges) -> list[str]:
    """Operators that see another number of units in a layer than one before them."""
    first: dict[int, tuple[int, tuple[int, ...]]] = {}
    faults = []
    for shape, (into, out) in zip(shapes, edges, strict=True):
        for layer, units in ((into, shape[1]), (out, shape[0])):
            known, other = first.setdefault(layer, (units, shape))
            if known != units:
                faults.append(f"operators of shapes {other} and {shape} don't follow one another")
    return faults


def chained(evidence: Sequence[Floats], edges: Edges | None) -> Edges:
    """`edges`, or those of operators one after another."""
    return edges if edges is not None else [(layer, layer + 1) for layer in range(len(evidence))]


def layer_widths(evidence: Sequence[Floats], edges: Edges) -> list[int]:
    """Units of each layer."""
    widths = {}
    for share, (into, out) in zip(evidence, edges, strict=True):
        widths[out], widths[into] = share.shape
    return [widths[layer] for layer in range(len(widths))]


def kept_share(shares: Sequence[Floats], labels: Sequence[Labels], edges: Edges | None = None) -> float:
    """Mean over operators of the share of (normalised) evidence whose two ends lie in one block, or one of which is in the hub."""
    found = []
    for share, (into, out) in zip(shares, chained(shares, edges), strict=True):
        a, b = labels[into], labels[out]
        if a.ndim == b.ndim == 1:
            # Hub units pair with all; isolated ones with none.
            numbers = np.arange(1 + max(0, int(a.max(initial=0)), int(b.max(initial=0))))
            by_block = np.where((a == HUB)[:, None], 1, a[:, None] == numbers)
            inside = (share @ by_block.astype(share.dtype))[np.arange(len(b)), np.maximum(b, 0)]
            inside[b == ISOLATED] = 0
            inside[b == HUB] = share[b == HUB][:, a != ISOLATED].sum(1)
            found.append(float(inside.sum(dtype=np.float64)))
        else:
            blocks = next(layer for layer in (a, b) if layer.ndim == 2).shape[0]
            inputs, outputs = (memberships(layer, blocks, HUB).astype(np.float64) for layer in (a, b))
            found.append(float(((outputs @ share) * inputs).sum()))
    return float(np.mean(found))
