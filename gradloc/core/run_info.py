"""What a run says of itself: everything a reader needs before it opens a shard."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from gradloc.core.arguments import is_whole
from gradloc.core.events import EventRule
from gradloc.core.layout import GRANULARITIES, CellGrid, DependencyLayout, Granularity
from gradloc.core.mixtures import Mixture
from gradloc.core.plan import OperatorChain
from gradloc.core.sites import FiringSite
from gradloc.errors import SchemaVersionError

SCHEMA_VERSION = 4
MOST_PROCESSES = 1 << 20
"""More than any training has; a reader looks for each one's shards."""


def check_version(version: object) -> None:
    """Raises `SchemaVersionError` for a format that this version doesn't read."""
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"schema version {version}; this gradloc reads {SCHEMA_VERSION}. Read it with the gradloc that wrote it."
        )


def _check_values(data: dict[str, Any]) -> None:
    """Refuses what a reader would stumble over later, where nothing says any more which file is at fault."""
    if data["granularity"] not in GRANULARITIES:
        raise ValueError(f"granularity={data['granularity']!r} must be one of {', '.join(GRANULARITIES)}")
    if not isinstance(data["config"], dict):
        raise TypeError(f"config is a {type(data['config']).__name__}, not a mapping")
    size = data.get("world_size", 1)
    if not (is_whole(size, 1) and size <= MOST_PROCESSES):
        raise ValueError(f"world_size={size!r} must be a whole number from 1 to {MOST_PROCESSES:,}")
    for rule in data["rules"]:
        EventRule.parse(rule)
    if not data["rules"]:
        raise ValueError("rules is empty")


@dataclass(frozen=True)
class ParameterInfo:
    """One recorded parameter: its name in the model, layout and dtype."""

    name: str
    layout: DependencyLayout
    dtype: str
    module_type: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "layout": self.layout.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ParameterInfo:
        return cls(data["name"], DependencyLayout.from_dict(data["layout"]), data["dtype"], data["module_type"])


@dataclass(frozen=True)
class RunInfo:
    """A run's description, stored as ``run.json``.

    `rules` are the event rules in the order of their columns; `chains` the operator chains found in the model, which
    block plans refer to; `sites` where firings are watched; `mixtures` its mixtures of experts; `notes` what could not be recorded and why.
    """

    run_id: str
    created: str
    gradloc_version: str
    torch_version: str
    optimizer: str
    granularity: Granularity
    rules: tuple[str, ...]
    config: dict[str, Any]
    parameters: tuple[ParameterInfo, ...]
    chains: tuple[OperatorChain, ...] = ()
    sites: tuple[FiringSite, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    notes: tuple[str, ...] = ()
    world_size: int = 1
    schema_version: int = field(default=SCHEMA_VERSION)

    def cells(self, parameter: ParameterInfo) -> CellGrid:
        return CellGrid(parameter.layout, self.granularity)

    def with_parameters(self, *more: ParameterInfo) -> RunInfo:
        return replace(self, parameters=(*self.parameters, *more))

    def to_dict(self) -> dict[str, Any]:
        data = dict(self.__dict__)
        data["parameters"] = [parameter.to_dict() for parameter in self.parameters]
        data["chains"] = [chain.to_dict() for chain in self.chains]
        data["sites"] = [site.to_dict() for site in self.sites]
        data["mixtures"] = [mixture.to_dict() for mixture in self.mixtures]
        data["rules"], data["notes"] = list(self.rules), list(self.notes)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunInfo:
        """Reads a description.

        Raises:
            SchemaVersionError: of a format that this version doesn't read.
            ValueError, KeyError, TypeError, AttributeError: not a run's description.
        """
        check_version(data.get("schema_version"))
        _check_values(data)
        return cls(
            **{
                **data,
                "parameters": tuple(ParameterInfo.from_dict(item) for item in data["parameters"]),
                "chains": tuple(OperatorChain.from_dict(item) for item in data["chains"]),
                "sites": tuple(FiringSite.from_dict(item) for item in data["sites"]),
                "mixtures": tuple(Mixture.from_dict(item) for item in data.get("mixtures", ())),
                "rules": tuple(data["rules"]),
                "notes": tuple(data["notes"]),
            }
        )
