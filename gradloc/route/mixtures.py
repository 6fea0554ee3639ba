"""Finds mixtures of experts in a model, and counts the tokens that come to each expert.

Shape letters: `T` tokens, `D` width, `E` experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from gradloc.core.mixtures import Mixture, stacked_parameters
from gradloc.core.wrappers import own_modules, plain_modules
from gradloc.errors import UnsupportedError
from gradloc.route.aside import randomness_kept, twin_of

TRIAL_TOKENS = 16
_PER_TOKEN = ("top_k", "num_experts_per_tok", "topk", "k")
"""Attributes that say how many experts run for a token."""


def find_mixtures(model: nn.Module) -> tuple[Mixture, ...]:
    """All mixtures of experts of a model.

    Two forms are known. Experts in one module with stacked weights ``[E, …, …]``, as in Hugging Face's models, beside a module whose weight
    ``[E, D]`` scores them. And alike modules in a `torch.nn.ModuleList`, beside such a module; whether those are experts shows in
    a trial in which stubs stand in for them and see which tokens come: each token must come to as many of them, and not to all.

    Examples:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 3)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         best = self.gate(x).argmax(-1)
        ...         return sum(expert(x[best == n]).sum() for n, expert in enumerate(self.experts))
        >>> find_mixtures(nn.ModuleDict({"moe": Experts()}))[0].said
        'routed already: 3 experts, 1 per token'
    """
    found = []
    for name, module in own_modules(model).named_modules():
        for own, child in module.named_children():
            mixture = _stacked(name, module, own, child) or _listed(name, module, own, child)
            if mixture is not None:
                found.append(mixture)
    return tuple(found)


def _stacked(name: str, module: nn.Module, own: str, child: nn.Module) -> Mixture | None:
    parameters = stacked_parameters(child)
    if not parameters:
        return None
    count = child._parameters[parameters[0]].shape[0]  # type: ignore[union-attr]
    router = _router(module, own, count)
    if router is None:
        return None
    holders = (module.get_submodule(router), module, child)
    stated = (getattr(holder, key, None) for holder in holders for key in _PER_TOKEN)
    per_token = next((value for value in stated if isinstance(value, int)), None)
    held = _joined(name, own)
    return Mixture(
        name, _joined(name, router), (held,), count, per_token, tuple(f"{held}.{parameter}" for parameter in parameters)
    )


def _listed(name: str, module: nn.Module, own: str, child: nn.Module) -> Mixture | None:
    if type(child) is not nn.ModuleList or len(child) < 2 or len({_form(expert) for expert in child}) > 1:
        return None
    router = _router(module, own, len(child))
    per_token = None if router is None else _per_token(module, own, router)
    if router is None or per_token is None:
        return None
    experts = tuple(_joined(name, f"{own}.{number}") for number in range(len(child)))
    return Mixture(name, _joined(name, router), experts, len(child), per_token)


def _joined(name: str, own: str) -> str:
    return f"{name}.{own}".removeprefix(".")


def _form(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _router(module: nn.Module, experts: str, count: int) -> str | None:
    """The module beside the experts that has a weight ``[E, D]`` of its own."""
    for own, child in module.named_children():
        weight = child._parameters.get("weight")
        if own != experts and weight is not None and weight.ndim == 2 and weight.shape[0] == count:
            return own
    return None


class _Stub(nn.Module):
    """Keeps what comes to an expert, and answers with numbers that no token has."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator, self.seen = generator, []

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        self.seen.append(x.detach().reshape(-1, x.shape[-1]))
        return torch.randn(x.shape, generator=self.generator).to(x)


def _per_token(module: nn.Module, own: str, router: str) -> int | None:
    """How many experts each of a few random tokens comes to, as a batch ``[1, T, D]`` or as ``[T, D]``; None where these aren't a
    mixture's experts.
    """
    weight = module.get_submodule(router)._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        return None
    shapes = ((1, TRIAL_TOKENS, weight.shape[1]), (TRIAL_TOKENS, weight.shape[1]))
    return next((found for shape in shapes if (found := _trial(module, own, weight, shape)) is not None), None)


def _trial(module: nn.Module, own: str, weight: Tensor, shape: tuple[int, ...]) -> int | None:
    generator = torch.Generator().manual_seed(0)
    stubs = nn.ModuleList(_Stub(generator) for _ in module.get_submodule(own).children())
    trial = twin_of(module)
    # The module's own code on copies of all that it holds beside the experts, which may be large.
    trial._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    others = {name: child for name, child in module._modules.items() if name != own}
    trial._modules = {**_without_hooks(others), own: stubs}
    trial._modules = {name: trial._modules[name] for name in module._modules}
    trial.train(False)
    x = torch.randn(shape, generator=generator).to(weight)
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.no_grad(), randomness_kept(devices):
            type(module).forward(trial, x)
    except Exception:  # whatever another's code raises: it isn't called like a mixture's
        return None
    rows = [row for stub in stubs for row in stub.seen]
    if not rows or len({row.shape[1] for row in rows}) > 1:
        return None
    seen, times = torch.unique(torch.cat(rows), dim=0, return_counts=True)
    alike = len(seen) == TRIAL_TOKENS and bool((times == times[0]).all()) and int(times[0]) < len(stubs)
    return int(times[0]) if alike else None


def _without_hooks(modules: Mapping[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    found = copy.deepcopy(dict(modules))
    for module in (inner for one in found.values() if one is not None for inner in one.modules()):
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    return found


@torch.no_grad()
def expert_load(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None) -> pd.DataFrame:
    """What share of the tokens each expert gets.

    Args:
        model: has mixtures of experts.
        batches: inputs: tensors, tuples of arguments, or mappings of keyword arguments.
        run: what to do with a batch; by default the model is called with it. The model's mode is left as it is.

    Returns:
        One row per mixture and expert: ``mixture``, ``expert``, ``per_token``, ``tokens`` that came to it, and ``share`` of all that came
        to the mixture, where even use is 1/`E`.

    Raises:
        UnsupportedError: no mixture of experts was found, or one wasn't called in a way that shows its choices; all are named.

    Examples:
        >>> expert_load(nn.Linear(2, 2), [])
        Traceback (most recent call last):
            ...
        gradloc.errors.UnsupportedError: the model has no mixture of experts that gradloc knows.
    """
    mixtures = find_mixtures(model)
    if not mixtures:
        raise UnsupportedError("the model has no mixture of experts that gradloc knows.")
    tokens = {mixture.name: [0] * mixture.count for mixture in mixtures}
    unclear: list[str] = []
    handles = []

    def count_rows(mixture: Mixture, number: int) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
            tokens[mixture.name][number] += first[..., 0].numel()

        return count

    def count_indices(mixture: Mixture) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
            chosen = [value for value in values if not value.is_floating_point() and value.dtype != torch.bool]
            if len(chosen) != 1:
                unclear.append(mixture.name)
                return
            found = torch.bincount(chosen[0].flatten(), minlength=mixture.count)[: mixture.count].tolist()
            tokens[mixture.name] = [a + b for a, b in zip(tokens[mixture.name], found, strict=True)]

        return count

    modules = plain_modules(model)
    for mixture in mixtures:
        for number, expert in enumerate(mixture.experts):
            hook = count_indices(mixture) if mixture.stacked else count_rows(mixture, number)
            handles.append(modules[expert].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for batch in batches:
            run(batch) if run is not None else _called(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unclear += [name for name, counts in tokens.items() if not sum(counts)]
    if unclear:
        raise UnsupportedError(
            f"{', '.join(dict.fromkeys(unclear))}: no batch came to its experts in a way that shows which were chosen."
        )
    return pd.DataFrame(
        {
            "mixture": mixture.name,
            "expert": number,
            "per_token": mixture.per_token,
            "tokens": came,
            "share": came / sum(tokens[mixture.name]),
        }
        for mixture in mixtures
        for number, came in enumerate(tokens[mixture.name])
    )


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
