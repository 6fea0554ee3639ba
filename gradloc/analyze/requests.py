"""What can be asked of the evidence, checked before anything is read, and which parameters it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np

from gradloc.analyze.combine import check_combination
from gradloc.analyze.criteria import find_criterion
from gradloc.analyze.support import check_test
from gradloc.core.groups import DependencyGroup, check_decided, n_of_m, single_groups, unit_groups
from gradloc.core.masks import NULLS, Null
from gradloc.core.names import listed, matching, meant
from gradloc.core.ports import RunReader, WindowRange
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, EmptyRunError

Scope = Literal["global", "layer", "unit"]
SCOPES: tuple[str, ...] = get_args(Scope)


@dataclass(frozen=True)
class SupportRequest:
    """What `measure_support` is asked for; see `gradloc.find_support` for each field.

    Raises:
        ConfigError: the test can't be made.
    """

    criterion: str = "wald"
    null: Null = "zero"
    calibration: str | None = None
    samples_per_step: int | None = None
    combine: str = "cauchy"
    groups: tuple[DependencyGroup, ...] = ()
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        if self.null not in NULLS:
            raise ConfigError(
                f"null={self.null!r} must be one of {', '.join(NULLS)}{meant(self.null, NULLS)}, or weights by name."
            )
        check_combination(self.combine)
        check_test(self.criterion, self.null, self.calibration, self.samples_per_step)


@dataclass(frozen=True)
class SelectionRequest:
    """What `select_masks` is asked for; see `gradloc.find_masks` for each field.

    Raises:
        ConfigError: naming every field that is wrong.
    """

    criterion: str = "saliency"
    null: Null = "zero"
    density: float | None = None
    budget: int | None = None
    scope: Scope = "global"
    granularity: str = "dependency"
    groups: tuple[DependencyGroup, ...] = ()
    include: tuple[str, ...] | None = None
    windows: WindowRange = None

    def __post_init__(self) -> None:
        faults = []
        check_decided(self.granularity)
        if n_of_m(self.granularity) is not None:
            if self.density is not None or self.budget is not None:
                faults.append(f"granularity={self.granularity!r} says how many stay; leave density= and budget= out")
        elif (self.density is None) == (self.budget is None):
            faults.append(
                "give one of density= (the share to keep), budget= (the number to keep) and alpha= (the error rate)"
            )
        if self.scope == "unit" and self.granularity not in ("dependency", "element"):
            faults.append(
                f"scope='unit' compares an out unit's own weights, and granularity={self.granularity!r} decides about several units "
                "or a whole one at once; use scope='layer' or 'global'"
            )
        if self.groups and self.granularity == "unit":
            faults.append("granularity='unit' makes its own groups; leave groups= out")
        if self.density is not None and not (_is_number(self.density) and 0 < self.density <= 1):
            faults.append(f"density={self.density!r} must be a number above 0 and at most 1")
        if self.budget is not None and not (_is_number(self.budget, Integral) and self.budget >= 1):
            faults.append(f"budget={self.budget!r} must be a whole number of parameters, at least 1")
        if self.null not in NULLS:
            faults.append(
                f"null={self.null!r} must be one of {', '.join(NULLS)}{meant(self.null, NULLS)}, or weights by name"
            )
        if self.scope not in SCOPES:
            faults.append(f"scope={self.scope!r} must be one of {', '.join(SCOPES)}{meant(self.scope, SCOPES)}")
        if faults:
            raise ConfigError("masks: " + "; ".join(faults) + ".")
        find_criterion(self.criterion)


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))


def observed_names(run: RunReader, windows: WindowRange = None) -> set[str]:
    """Parameters that had a gradient in an observed step of those windows."""
    rows = run.window_rows(windows)
    return set(rows.loc[rows["exposure"] > 0, "parameter"])


def chosen_parameters(
    run: RunReader, include: Sequence[str] | None, windows: WindowRange = None
) -> list[ParameterInfo]:
    """The parameters that `include` names; by default every weight with inputs that isn't an embedding.

    What had no gradient in those windows (an unused head, a frozen layer) is left out, unless it is named exactly.

    Raises:
        ConfigError: a name or glob matches nothing.
        EmptyRunError: nothing that was chosen was observed.
    """
    names = [p.name for p in run.info.parameters]
    exactly = set(include or ()) & set(names)
    if include is None:
        matched = [
            p
            for p in run.info.parameters
            if p.layout.in_units > 1 and p.module_type not in ("Embedding", "EmbeddingBag")
        ]
        if not matched:
            raise ConfigError("the run has no weight matrix; name parameters with include=[…].")
    else:
        found = {pattern: matching(pattern, names) for pattern in include}
        unmatched = [pattern for pattern, those in found.items() if not those]
        if unmatched:
            raise ConfigError(
                f"include: {', '.join(map(repr, unmatched))} matches no recorded parameter; there are: {listed(names, unmatched[0])}."
            )
        meant = {name for those in found.values() for name in those}
        matched = [p for p in run.info.parameters if p.name in meant]
        # A glob such as "blocks.*" means its weights; biases and norms have no dependencies and stay, unless named exactly.
        matched = [p for p in matched if p.layout.in_units > 1 or p.name in exactly]
    observed = observed_names(run, windows) | exactly
    if not any(p.name in observed for p in matched):
        raise EmptyRunError(
            f"none of {', '.join(p.name for p in matched) or 'the chosen parameters'} had a gradient in an observed step."
        )
    return [p for p in matched if p.name in observed]


def decided_groups(
    run: RunReader,
    parameters: Sequence[ParameterInfo],
    groups: Sequence[DependencyGroup],
    granularity: str,
    windows: WindowRange = None,
) -> list[DependencyGroup]:
    """What is decided together: units with all that belongs to them, or the given groups and every other parameter by itself.

    Raises:
        ConfigError: a group names a parameter that wasn't recorded, of another shape, or twice.
    """
    if granularity == "unit":
        observed = observed_names(run, windows)
        return unit_groups(parameters, [p for p in run.info.parameters if p.name in observed], run.info.chains)
    shapes = {parameter.name: parameter.layout.shape for parameter in run.info.parameters}
    members = [(group.name, name, layout) for group in groups for name, layout in group.members.items()]
    faults = [
        f"{group}: {name} has shape {shapes.get(name, 'not recorded')}, the group's layout {layout.shape}"
        for group, name, layout in members
        if shapes.get(name) != layout.shape
    ]
    names = [name for _, name, _ in members]
    faults += [f"{name} is in more than one group" for name in dict.fromkeys(names) if names.count(name) > 1]
    decided = [*groups, *single_groups(parameter for parameter in parameters if parameter.name not in set(names))]
    called = [group.name for group in decided]
    faults += [f"{name!r} names more than one" for name in dict.fromkeys(called) if called.count(name) > 1]
    if faults:
        raise ConfigError("groups: " + "; ".join(faults) + ".")
    return decided


def described(request: SupportRequest | SelectionRequest, run: RunReader) -> dict[str, Any]:
    """What was asked, and of which run."""
    left_out = ("include", "groups")
    asked = {key: value for key, value in request.__dict__.items() if value is not None and key not in left_out}
    if request.groups:
        asked["groups"] = {group.name: list(group.members) for group in request.groups}
    return asked | {"run_id": run.info.run_id}


def groups_of(run: RunReader, request: SupportRequest | SelectionRequest) -> list[DependencyGroup]:
    """What is decided together for a request."""
    granularity = request.granularity if isinstance(request, SelectionRequest) else "dependency"
    parameters = chosen_parameters(run, request.include, request.windows)
    return decided_groups(run, parameters, request.groups, granularity, request.windows)
