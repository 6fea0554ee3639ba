"""Core sets and their overlap, cell by cell."""

from __future__ import annotations


def core(cells: list[tuple[float, int]]) -> set[int]:
    """The densest cells that together hold half of the energy; cells are ``(energy, size)``."""
    total, held, chosen = sum(energy for energy, _ in cells), 0.0, set()
    for index in sorted(range(len(cells)), key=lambda i: -cells[i][0] / cells[i][1]):
        if held >= 0.5 * total * (1 - 1e-12):
            break
        chosen.add(index)
        held += cells[index][0]
    return chosen


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
