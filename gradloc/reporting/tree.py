"""The model as a tree of modules, each with its numbers, its parameters and a link to its curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from gradloc.reporting.data import ReportData

COLUMNS = {
    "energy_share": "energy share",
    "core_fraction": "half in",
    "gini": "Gini",
    "overlap": "overlap",
    "drift_path_ratio": "drift / path",
    "dead_fraction": "without gradient",
    "parameters": "weights",
}
"""What the tree shows of every module and parameter, by the column's heading."""


@dataclass
class Node:
    """One module: `number` for links, `values` as `COLUMNS` has them, None for a module without numbers of its own."""

    name: str
    number: int
    values: dict[str, Any] | None = None
    state: str = ""
    children: list[Node] = field(default_factory=list)
    parameters: list[list[Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.name.rpartition(".")[2] or "(root)"


def module_tree(data: ReportData) -> Node:
    """All modules and parameters of the last window; the root has the whole model's numbers."""
    last = pd.concat([_last(data.modules), _last(data.containers)])
    numbers = {str(row["module"]): _values(row) for row in last.to_dict("records")}
    states = (
        {}
        if data.activity.empty
        else dict(
            zip(zip(data.activity["level"], data.activity["name"], strict=True), data.activity["state"], strict=True)
        )
    )
    root = Node("", 0, _values(data.model_curve.iloc[-1].to_dict() | {"energy_share": 1.0}))
    known = {"": root}

    def node(name: str) -> Node:
        if name not in known:
            known[name] = Node(name, len(known), numbers.get(name), states.get(("module", name), ""))
            node(name.rpartition(".")[0]).children.append(known[name])
        return known[name]

    for row in data.last_window.to_dict("records"):
        name = str(row["parameter"])
        own = [name.rpartition(".")[2] or name, *_values(row).values(), states.get(("parameter", name), "")]
        node(name.rpartition(".")[0]).parameters.append(own)
    return root


def numbers_of(root: Node) -> dict[str, int]:
    """Every module's number, by name."""
    found, waiting = {}, [root]
    while waiting:
        node = waiting.pop()
        found[node.name] = node.number
        waiting += node.children
    return found


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    return frame if frame.empty else frame[frame["window"] == frame["window"].max()]


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {column: row.get(column) for column in COLUMNS}
