"""Names of the parameters that an optimizer trains, and the part of each that this process records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradloc.core.run_info import ParameterInfo
from gradloc.core.wrappers import (
    inner_model,
    plain_modules,
    plain_name,
    refuse_flat_parameters,
    refuse_foreign_optimizers,
    reshard,
)
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.record.layouts import layout_of
from gradloc.record.processes import World
from gradloc.record.reduction import Part

MOST_NAMED = 5
"""Parameters that a message names."""


def named_parameters(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """The optimizers' parameters by their name in `model`; ones that the model lacks are named by optimizer, group and place.

    Raises:
        ConfigError: the optimizers have no parameter.
        UnsupportedError: a parameter can't be recorded; all of them are named.
    """
    refuse_flat_parameters(model)
    reshard(model)
    names = {id(parameter): plain_name(name) for name, parameter in inner_model(model).named_parameters()}
    found: dict[str, Tensor] = {}
    faults, shared = [], []
    owner: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for place, parameter in _places(optimizer, number, len(optimizers)):
            name = names.get(id(parameter), place)
            found[name] = parameter
            faults += [f"{name} {fault}" for fault in ([] if is_lazy(parameter) else _faults(parameter))]
            if owner.setdefault(id(parameter), number) != number:
                shared.append(name)
    _refuse_lazy(found)
    if shared:
        faults.append(f"several optimizers step {', '.join(shared)}, each with gradients of its own: leave them to one")
    if faults:
        raise UnsupportedError("gradloc can't record these parameters: " + "; ".join(faults) + ".")
    if not found:
        raise ConfigError("the optimizer has no parameters, so there is nothing to record.")
    return found


def _places(optimizer: Optimizer, number: int, optimizers: int) -> Iterator[tuple[str, Tensor]]:
    """Names by place: those of one optimizer stay the same when another gets more groups."""
    lead = f"optimizer{number}." if optimizers > 1 else ""
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            yield f"{lead}group{g}.parameter{p}", parameter


def _refuse_lazy(named: Mapping[str, Tensor]) -> None:
    if lazy := [name for name, parameter in named.items() if is_lazy(parameter)]:
        raise UnsupportedError(
            f"gradloc can't record lazy parameters before they have a shape ({shortened(lazy)}): run one forward pass of the model first."
        )


def _faults(parameter: Tensor) -> list[str]:
    if parameter.is_complex():
        return ["is complex: leave it out of this optimizer"]
    if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param"):
        return [
            "is a flat parameter of FullyShardedDataParallel: shard with torch.distributed.fsdp.fully_shard instead"
        ]
    odd = [str(p) for p in getattr(parameter, "placements", ()) if type(p).__name__ not in ("Shard", "Replicate")]
    return [f"is placed as {', '.join(odd)}, which doesn't give each process one block of it"] if odd else []


def held_parts(parameters: Mapping[str, Tensor], world: World) -> dict[str, Part]:
    """The block of each parameter that this process records; parameters recorded elsewhere are absent.

    Sharded parameters are recorded where they are held. Those that every process holds are shared out, largest first, so
    that each is recorded once.
    """
    parts: dict[str, Part] = {}
    whole = {name: p for name, p in parameters.items() if not hasattr(p, "placements")}
    loads = [0] * world.size
    for name, parameter in sorted(whole.items(), key=lambda item: (-item[1].numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += parameter.numel()
        if rank == world.rank:
            parts[name] = Part.whole(tuple(parameter.shape))
    for number, (name, parameter) in enumerate(parameters.items()):
        if name not in whole and (part := _sharded_part(parameter, number)) is not None:
            parts[name] = part
    return parts


def _sharded_part(parameter: Tensor, number: int) -> Part | None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    for axis, placement in enumerate(placements):
        if placement.is_replicate() and coordinate[axis] != number % mesh.size(axis):
            return None  # another replica records it
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return Part(tuple(offset), tuple(shape)) if prod(shape) else None


def parameter_infos(named: Mapping[str, Tensor], model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Layout and dtype of parameters, by the type of the module that owns each.

    Raises:
        UnsupportedError: lazy ones, which have no shape yet.
    """
    _refuse_lazy(named)
    modules = plain_modules(model)
    return tuple(_parameter_info(name, parameter, modules) for name, parameter in named.items())


def _parameter_info(name: str, parameter: Tensor, modules: Mapping[str, nn.Module]) -> ParameterInfo:
    owner_name, _, own_name = name.rpartition(".")
    owner = modules.get(owner_name)
    if owner is not None and own_name not in owner._parameters:
        owner = None
    return ParameterInfo(
        name=name,
        layout=layout_of(owner, own_name, tuple(parameter.shape)),
        dtype=str(parameter.dtype).removeprefix("torch."),
        module_type=_type_name(owner) if owner is not None else "",
    )


def _type_name(module: nn.Module) -> str:
    """The class's name; sharding puts ``FSDP`` in front of it."""
    kind = type(module)
    return kind.__mro__[1].__name__ if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 else kind.__name__


def new_parameters(optimizers: Sequence[Optimizer], model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Descriptions of everything the optimizers train, for a new run.

    Raises:
        UnsupportedError: parameters that can't be recorded.
    """
    return parameter_infos(named_parameters(optimizers, model), model)


def foreign_parameters(optimizers: Sequence[Optimizer], model: nn.Module) -> str | None:
    """Which parameters of the optimizers aren't the model's, in a sentence without a full stop; None where all are.

    Raises:
        ModelMismatchError: none is, so that the optimizers train something else.
    """
    refuse_flat_parameters(model)
    refuse_foreign_optimizers(optimizers, model)
    owned = {id(parameter) for parameter in inner_model(model).parameters()}
    places = [placed for number, one in enumerate(optimizers) for placed in _places(one, number, len(optimizers))]
    foreign = [name for name, parameter in places if id(parameter) not in owned]
    total = len(places)
    if not foreign:
        return None
    return (
        f"{len(foreign)} of the optimizer's {total} parameters are not the model's, and are recorded without a name of their own ({shortened(foreign)}); "
        "pass a model that holds them all, such as a torch.nn.ModuleList, or make the optimizer after the model got its last parameters"
    )


def shortened(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class GroupSettings(NamedTuple):
    """What an optimizer does to a parameter besides its gradient.

    `decay` is the share of a weight that decoupled decay takes away in a step; `momentum` the weight of the past in the running
    mean of gradients.
    """

    rate: float = 0.0
    weight_decay: float = 0.0
    decay: float = 0.0
    momentum: float = 0.0


def group_settings(optimizers: Sequence[Optimizer]) -> dict[int, GroupSettings]:
    """Settings by parameter's id."""
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate, decay = _number(group.get("lr", 0.0)), _number(group.get("weight_decay", 0.0))
            decoupled = group.get("decoupled_weight_decay") or type(optimizer).__name__ in ("Muon", "Adafactor")
            past = group["betas"][0] if group.get("betas") else group.get("momentum") or 0.0
            settings = GroupSettings(rate, decay, rate * decay if decoupled and decay else 0.0, _number(past))
            found |= {id(parameter): settings for parameter in group["params"]}
    return found


def _number(value: object) -> float:
    """A setting as a number; NaN where the optimizer finds it by itself, or for a tensor on a GPU, which is not waited for."""
    if value is None or (isinstance(value, torch.Tensor) and value.device.type != "cpu"):
        return float("nan")
    return float(value)  # type: ignore[arg-type]
