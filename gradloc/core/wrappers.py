"""What stands between us and a user's own module and optimizer: replicas, compilers, checkpointing, sharding, loops.

Classes are known by name, so that this stays free of torch.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from gradloc.errors import ModelMismatchError, UnsupportedError

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain_name(name: str) -> str:
    """A parameter's or module's name without what compiling, checkpointing or sharding put in front of it.

    Examples:
        >>> plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.up.weight")
        'blocks.0.up.weight'
    """
    return _WRAPPERS.sub("", name)


def inner_model(model: Any) -> Any:
    """The user's own module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if is_a(model, "DistributedDataParallel") or is_a(model, "DataParallel"):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def own_modules(model: Any) -> Any:
    """`inner_model` as it would be without what compiling and checkpointing put around parts of it.

    For reading: its modules are the model's own, but for copies of those that hold a wrapped one, which share all else with what they are copies of.
    """
    inner = inner_model(model)
    wrapped = any(plain_name(f"{name}.") != f"{name}." for name, _ in inner.named_modules())
    return _own(inner, {}) if wrapped else inner


def innermost(module: Any) -> Any:
    """The module that compiling and checkpointing were put around, however often."""
    while found := [module._modules[name] for name in _INNER if name in module._modules]:
        module = found[0]
    return module


def _own(module: Any, known: dict[int, Any]) -> Any:
    module = innermost(module)
    if id(module) not in known:
        known[id(module)] = module
        children = {n: None if c is None else _own(c, known) for n, c in module._modules.items()}
        if any(child is not module._modules[name] for name, child in children.items()):
            known[id(module)] = copy.copy(module)
            known[id(module)]._modules = children
    return known[id(module)]


def unwrap(model: Any) -> Any:
    """The same for a copy that is ours, in which wrappers are taken out: what else its modules hold, such as a forward that was bound to one
    of them, goes on holding the modules of that copy.
    """
    inner = inner_model(model)
    for module in list(inner.modules()):
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else innermost(child)
    return inner


def plain_modules(model: Any) -> dict[str, Any]:
    """Every module by its plain name; what is wrapped, not its wrapper."""
    return {plain_name(f"{name}.")[:-1]: module for name, module in inner_model(model).named_modules()}


def reshard(model: Any) -> None:
    """Lets FSDP2 drop gathered weights: after a forward pass without backward it keeps them in the parameters' place.

    Such copies aren't what the optimizer trains, and their memory is freed under whoever holds them.
    """
    for module in model.modules():
        if is_a(module, "FSDPModule"):
            module.reshard()


def plain_parameters(model: Any) -> dict[str, Any]:
    """Every parameter by each of its plain names."""
    reshard(model)
    return {plain_name(n): p for n, p in inner_model(model).named_parameters(remove_duplicate=False)}


def is_compiled(model: Any) -> bool:
    """Whether `torch.compile` has the model or a part of it."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def refuse_flat_parameters(model: Any) -> None:
    """Raises `UnsupportedError` if the first FullyShardedDataParallel holds a part of the model."""
    held = [name or "the model" for name, module in model.named_modules() if is_a(module, "FullyShardedDataParallel")]
    if held:
        raise UnsupportedError(
            f"{held[0]} is sharded by FullyShardedDataParallel, whose parameters are pieces of a flat one that begin inside a "
            "row; shard with torch.distributed.fsdp.fully_shard (FSDP2) instead: fsdp_version=2 in Accelerate and in the Hugging Face "
            "Trainer, ModelParallelStrategy in Lightning."
        )


def refuse_meta(named: Any) -> None:
    """Raises `UnsupportedError` for a tensor without values, of ``(name, tensor)``."""
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        raise UnsupportedError(
            f"{empty[0]} is on the meta device and has no values there; load the model's weights first, or leave out what is offloaded."
        )


def torch_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside `optimizer`, which may be a wrapper such as Accelerate's or Opacus's.

    Raises:
        UnsupportedError: it isn't a torch optimizer, or one whose parameters or steps can't be told apart.
    """
    inner = optimizer
    while True:
        _refuse_foreign_steps(inner)
        wrapped = getattr(inner, "optimizer", None) or getattr(inner, "original_optimizer", None)
        if wrapped is None:
            break
        inner = wrapped
    if not any(
        kind.__name__ == "Optimizer" and kind.__module__ == "torch.optim.optimizer" for kind in type(inner).__mro__
    ):
        kind = type(optimizer)
        raise UnsupportedError(
            f"optimizer is a {kind.__module__}.{kind.__qualname__}; gradloc hooks into torch.optim.Optimizer. "
            "Pass the torch optimizer itself."
        )
    return inner


def refuse_foreign_optimizers(optimizers: Any, model: Any) -> None:
    """Raises `ModelMismatchError` if none of the optimizers' parameters is the model's, so that they train something else."""
    reshard(model)
    owned = {id(parameter) for parameter in inner_model(model).parameters()}
    held = [id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]]
    if held and not owned & set(held):
        raise ModelMismatchError(
            f"none of the optimizer's {len(held)} parameters is the model's. Pass the model that it was made from, as it is in training: "
            "after a copy, a new head or fully_shard the parameters are other ones, and the optimizer must be made after that. Optimizers of float32 "
            "copies of half-precision weights (master weights) can't be followed; torch.autocast keeps one set of weights."
        )


def _refuse_foreign_steps(optimizer: Any) -> None:
    kind = type(optimizer)
    if kind.__module__.split(".")[0] == "deepspeed" or kind.__name__.startswith("DeepSpeed"):
        raise UnsupportedError(
            f"optimizer is a {kind.__module__}.{kind.__qualname__}: DeepSpeed's engine steps on flattened pieces of the parameters, "
            "which have no rows or units. Train with DDP or torch.distributed.fsdp.fully_shard (FSDP2) to record."
        )
    if kind.__name__ == "LayerWiseDummyOptimizer":
        raise UnsupportedError(
            "optimizer is a placeholder of a layer-wise optimizer, whose real ones step inside backward; pass those, "
            "gradloc.wrap(list_of_optimizers, model, …), or choose an optimizer without layer-wise updates."
        )


def is_a(value: Any, class_name: str) -> bool:
    """Whether one of the value's classes has that name."""
    return any(kind.__name__ == class_name for kind in type(value).__mro__)
