"""A model's own code, run aside: whatever it sets, fills or draws, the model and the training don't see."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; then every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def twin_of(module: nn.Module) -> nn.Module:
    """A module for a trial of its code, which may set attributes of it and of the modules in it, and fill their lists, dicts and sets.
    Parameters and buffers are the module's own: changed in place they would change there, too.
    """
    return _twin(module, {})


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in known:
        twin = known[id(module)] = object.__new__(type(module))
        twin.__dict__.update({name: _copied(value) for name, value in vars(module).items()})
        children = {name: child if child is None else _twin(child, known) for name, child in module._modules.items()}
        twin.__dict__["_modules"] = children
    return known[id(module)]


def _copied(value: object) -> object:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


@contextmanager
def randomness_kept(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Gives back the state of Python's, NumPy's and torch's random numbers, on the CPU and on `devices`."""
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


@contextmanager
def tracing(module: nn.Module) -> Iterator[None]:
    """Around a trace of a module's forward: nobody hears its warnings, and random numbers are given back."""
    first = next(module.parameters(), None)
    with warnings.catch_warnings(), randomness_kept([first.device] if first is not None and first.is_cuda else []):
        warnings.simplefilter("ignore")
        yield
