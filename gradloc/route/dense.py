"""A routed model's weights under the names of the dense model that it came from, so that other libraries can keep them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.core.wrappers import own_modules
from gradloc.errors import UnsupportedError
from gradloc.route.conditional import IndexRoutedFFN
from gradloc.route.feed_forward import parameters
from gradloc.route.operator import RoutedOperator
from gradloc.route.operator_certificate import reassemble

PLAN_FILE = "gradloc_plan.safetensors"
"""Beside the weights in a directory of `save_pretrained`."""


class Origin:
    """What a routed model remembers of the dense one.

    Args:
        plan: by which it is routed.
        model: the dense one. Of its planned modules, what the plan doesn't cut is kept, such as a causal mask or a norm's count of batches.
    """

    def __init__(self, plan: BlockPlan, model: nn.Module) -> None:
        state = model.state_dict()
        self.plan, self.names, self.again = plan, frozenset(state), hasattr(model, "_routed_from")
        tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        names = _names(itertools.chain(*tensors))
        self.aliases = {name: every for every in names for name in every}
        cut = {
            alias
            for chain in plan.chains
            for parameter in chain.chain.parameters
            for alias in self.aliases.get(parameter.name, (parameter.name,))
        }
        planned = tuple(place for chain in plan.chains for place in _places(model, chain.chain.name))
        self.beside = {own: t.clone() for own, t in state.items() if own.startswith(planned) and own not in cut}


def dense_state_dict(fast: nn.Module) -> tuple[dict[str, Tensor], BlockPlan]:
    """The weights of a routed model for the dense model, and the plan with its routers as they are now.

    A dense model with these weights, routed by this plan, computes what the routed one does: of a conditional plan the weights are the dense
    network's, of a structural one they are zero between the blocks.

    Args:
        fast: made by `route_model`; it may have been trained since.

    Returns:
        ``(state_dict, plan)``; the tensors are copies where they were cut into blocks.

    Raises:
        UnsupportedError: not a whole model from `route_model`, routed twice, or its blocks are spread over processes.

    Examples:
        >>> dense_state_dict(nn.Linear(2, 2))
        Traceback (most recent call last):
            ...
        gradloc.errors.UnsupportedError: the model wasn't made by gradloc.route_model, so it has no plan.
    """
    fast = own_modules(fast)
    origin = getattr(fast, "_routed_from", None)
    if not isinstance(origin, Origin):
        raise UnsupportedError("the model wasn't made by gradloc.route_model, so it has no plan.")
    if origin.again:
        raise UnsupportedError(
            "the model was routed twice, so that no one plan leads back; route the dense model once."
        )
    plan, names = origin.plan, origin.names
    state = dict(fast.state_dict())
    routers = {}
    for chain in plan.chains:
        name = chain.chain.name
        module = fast.get_submodule(name)
        if isinstance(module, IndexRoutedFFN):
            dense = _conditional(module, chain)
            routers[name] = module.router.weights()
        elif isinstance(module, RoutedOperator):
            dense = reassemble(module, chain)
        else:
            raise UnsupportedError(
                f"{name} is a {type(module).__name__}: take the weights before blocks are spread or replaced."
            )
        inside = _places(fast, name)
        state = {own: tensor for own, tensor in state.items() if not own.startswith(inside)}
        state |= {alias: tensor for own, tensor in dense.items() if own in names for alias in origin.aliases[own]}
    state |= origin.beside
    odd = sorted(names ^ set(state))
    if odd:
        raise UnsupportedError(f"the routed model and the dense one it came from differ in {', '.join(odd)}.")
    return state, plan.with_routers(routers) if plan.kind == "conditional" else plan


def _names(named: Iterable[tuple[str, object]]) -> list[tuple[str, ...]]:
    """Of each object all of its names."""
    found: dict[int, list[str]] = {}
    for name, value in named:
        found.setdefault(id(value), []).append(name)
    return [tuple(names) for names in found.values()]


def _places(model: nn.Module, name: str) -> tuple[str, ...]:
    """What the names in a module begin with, for each place where the model has it."""
    every = _names(model.named_modules(remove_duplicate=False))
    (names,) = [names for names in every if name in names]
    return tuple(f"{own}." if own else "" for own in names)


@torch.no_grad()
def _conditional(module: IndexRoutedFFN, plan: ChainPlan) -> dict[str, Tensor]:
    ups, biases, down = module.dense_weights()
    return parameters(plan.chain, [*ups, down], [*biases, module.down_bias.detach()])


class SavesDense:
    """Stands in for a Hugging Face model's ``save_pretrained``, whose files `from_pretrained` couldn't read: it knows no blocks, and would
    fill in random weights. Writes the dense weights and, beside them, the plan.

    Args:
        model: routed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> Any:
        # A state that is given, as the Trainer does, is of blocks; the model's own weights are taken.
        state, plan = dense_state_dict(self._model)
        saved = type(self._model).save_pretrained(  # type: ignore[attr-defined]
            self._model, save_directory, is_main_process=is_main_process, state_dict=state, **options
        )
        if is_main_process:
            plan.save(Path(save_directory) / PLAN_FILE)
        return saved
