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


def core_size(cells: list[tuple[float, int]]) -> float:
    """The least share of all weights that holds half of the energy, each cell's spread evenly over its weights."""
    wanted, taken = 0.5 * sum(energy for energy, _ in cells), 0.0
    for energy, size in sorted(cells, key=lambda cell: -cell[0] / cell[1]):
        part = min(1.0, wanted / energy) if energy else 0.0
        taken, wanted = taken + part * size, wanted - part * energy
        if part < 1.0:  # what is left of `wanted` is rounding
            break
    return taken / sum(size for _, size in cells)


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
