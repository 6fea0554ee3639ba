"""Names and descriptions of the parameters that an optimizer trains."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, UnsupportedError
from gradloc.record.layouts import layout_of


def named_parameters(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's parameters by their name in `model`; ones that the model lacks are named by group and place.

    Raises:
        ConfigError: the optimizer has no parameter.
        UnsupportedError: a parameter is sharded over processes, or complex.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group{number}.parameter{place}")
            if hasattr(parameter, "placements"):
                raise UnsupportedError(
                    f"{name} is sharded over processes (DTensor), which gradloc can't record yet. Record a run in one process."
                )
            if parameter.is_complex():
                raise UnsupportedError(
                    f"{name} is complex, which gradloc can't record yet. Leave it out of this optimizer."
                )
            found[name] = parameter
    if not found:
        raise ConfigError("the optimizer has no parameters, so there is nothing to record.")
    return found


def parameter_info(name: str, parameter: Tensor, model: nn.Module) -> ParameterInfo:
    """Layout and dtype of one parameter, by the type of the module that owns it."""
    owner_name, _, own_name = name.rpartition(".")
    modules = dict(model.named_modules())
    owner = modules.get(owner_name) if own_name in dict(getattr(modules.get(owner_name), "_parameters", {})) else None
    return ParameterInfo(
        name=name,
        layout=layout_of(owner, own_name, tuple(parameter.shape)),
        dtype=str(parameter.dtype).removeprefix("torch."),
        module_type=type(owner).__name__ if owner is not None else "",
    )
