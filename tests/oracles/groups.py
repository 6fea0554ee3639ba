"""What is decided at once, as plain lists of places, and what stays of it."""

from __future__ import annotations

import numpy as np

Place = tuple[str, tuple[int, ...]]


def group_members(
    granularity: str, chosen: dict[str, np.ndarray], known: dict[str, np.ndarray], following: dict[str, str]
) -> list[list[Place]]:
    """Each decision's weights. Axis 0 is out, axis 1 in, the others channels."""
    groups: dict[tuple[object, ...], list[Place]] = {}
    for name, values in chosen.items():
        if granularity == "unit" and name in following.values():
            continue
        for place in np.ndindex(values.shape):
            key: tuple[object, ...] = {
                "element": (name, place),
                "dependency": (name, place[:2]),
                "tile": (name, place[0] // 16, place[1] // 16),
                "row": (name, place[0]),
                "unit": (name, place[0]),
                "column": (name, place[1]),
            }[granularity]
            groups.setdefault(key, []).append((name, place))
        if granularity == "unit":
            bias = name.replace("weight", "bias")
            for unit in range(values.shape[0]):
                if bias in known:
                    groups[name, unit].append((bias, (unit,)))
                if name in following:
                    after = following[name]
                    groups[name, unit] += [(after, (o, unit)) for o in range(known[after].shape[0])]
    return list(groups.values())


def kept_by_group(groups: list[list[Place]], scores: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """The highest mean scores, one decision after another, until the share is reached to half a decision."""
    means = [float(np.mean([np.float32(scores[name][place]) for name, place in group])) for group in groups]
    masks = {name: np.zeros(scores[name].shape, bool) for group in groups for name, _ in group}
    total, taken = sum(map(len, groups)), 0
    for index in sorted(range(len(groups)), key=lambda index: -means[index]):
        if taken and taken + len(groups[index]) / 2 > density * total:
            break
        taken += len(groups[index])
        for name, place in groups[index]:
            masks[name][place] = True
    return masks
