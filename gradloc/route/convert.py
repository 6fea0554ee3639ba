"""A copy of a model in which planned chains run as blocks; everything else, and the interface, is as it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gradloc.core.hooks import shed_hooks
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.errors import ConfigError, GradlocError, ModelMismatchError, NonFiniteError, UnsupportedError
from gradloc.route.certificate import Certificate, certify_chain, join
from gradloc.route.conditional import CONDITIONAL_KERNELS, IndexRoutedFFN
from gradloc.route.kernel_choice import KernelTable, measure_kernels
from gradloc.route.patterns import ChainForm, chain_form
from gradloc.route.structural import STRUCTURAL_KERNELS, RoutedChain


def route_model(model: nn.Module, plan: BlockPlan, *, kernel: str = "measured", certify: bool = True) -> nn.Module:
    """Runs a model's planned chains as blocks.

    Args:
        model: stays untouched.
        plan: structural, or conditional with routers (`Annealer` trains them).
        kernel: ``"measured"`` times the kernels for a few token counts and picks the fastest for each; a kernel's name
            forces it.
        certify: check the result, and refuse to return a model that fails.

    Returns:
        A copy with the same call and the same class, and ``.certificate`` (None with ``certify=False``).

    Raises:
        ModelMismatchError: the plan belongs to another model; all differences are listed.
        ConfigError: a conditional plan without routers, or a kernel that isn't known.
        UnsupportedError: a planned module no longer computes a plain chain, or shares a weight with another.
        NonFiniteError: weights with NaN or infinity.
        CertificateError: the result does not compute what the plan promises.

    Example:
        >>> import numpy as np
        >>> from gradloc.core.plan import OperatorChain
        >>> ffn = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> chain = OperatorChain("", ("0", "2"), ("relu",), (2, 4, 2))
        >>> two, four = np.array([0, 1]), np.array([0, 0, 1, 1])
        >>> fast = route_model(ffn, BlockPlan("structural", (ChainPlan(chain, (two, four, two), 2),), "inducible"))
        >>> fast.certificate.passed
        True
    """
    known = {"measured", *STRUCTURAL_KERNELS, *CONDITIONAL_KERNELS}
    if kernel not in known:
        raise ConfigError(f"kernel={kernel!r} must be one of {', '.join(sorted(known))}.")
    forms = _validate(model, plan)
    fast = copy.deepcopy(model)
    shed_hooks(fast)
    certificates: list[Certificate] = []
    for chain in plan.chains:
        weights, biases = _tensors(fast, chain)
        kind = IndexRoutedFFN if chain.conditional else RoutedChain
        routed = kind.from_plan(chain, weights, biases, forms[chain.chain.name].dropouts)
        routed.train(fast.get_submodule(chain.chain.name).training)
        routed.kernel_table = _kernels(routed, chain, weights[0], kernel)
        if certify:
            certificates.append(certify_chain(chain, weights, biases, routed))
        fast = _replace(fast, chain.chain.name, routed)
    certificate = join(certificates) if certify else None
    if certificate is not None:
        certificate.raise_if_failed()
    fast.certificate = certificate
    return fast


def _validate(model: nn.Module, plan: BlockPlan) -> dict[str, ChainForm]:
    """Everything that could go wrong is found before anything is copied."""
    modules = dict(model.named_modules())
    mismatches: list[str] = []
    others: list[GradlocError] = []
    forms: dict[str, ChainForm] = {}
    users: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for chain in plan.chains:
        name = chain.chain.name
        missing = [operator for operator in chain.chain.operators if not isinstance(modules.get(operator), nn.Linear)]
        if missing:
            mismatches.append(f"{', '.join(missing)}: no such linear module")
            continue
        weights, _ = _tensors(model, chain)
        shapes = [tuple(weight.shape) for weight in weights]
        planned = list(zip(chain.chain.widths[1:], chain.chain.widths, strict=False))
        if shapes != planned:
            mismatches.append(f"{name}: the plan has weights of shapes {planned}, the model {shapes}")
            continue
        form = chain_form(modules[name])
        if form is None or tuple(form.activations) != chain.chain.activations:
            others.append(
                UnsupportedError(
                    f"{name}: its forward isn't the chain linear → {' → '.join(chain.chain.activations)} → linear that was planned; leave it out of the plan with include=."
                )
            )
            continue
        forms[name] = form
        shared = [w for w, tensor in zip(chain.chain.weights, weights, strict=True) if users[id(tensor)] > 1]
        if shared:
            others.append(
                UnsupportedError(
                    f"{name}: {', '.join(shared)} is shared with another module, and cutting it into blocks would part them; leave the chain out of the plan with include=."
                )
            )
        broken = [w for w, tensor in zip(chain.chain.weights, weights, strict=True) if not torch.isfinite(tensor).all()]
        if broken:
            others.append(NonFiniteError(f"{', '.join(broken)} has NaN or infinity; take an earlier checkpoint."))
        if not chain.conditional and any((layer == HUB).any() for layer in chain.labels):
            others.append(
                UnsupportedError(
                    f"{name}: some units belong to all blocks (hub), which structural blocks can't run. Plan with hub=0, or apply plan.masks and stay dense."
                )
            )
        if chain.conditional and chain.router is None:
            others.append(
                ConfigError(
                    f"{name}: the plan has no router. Anneal it first: Annealer(model, optimizer, plan) trains the routers, and annealer.finish() returns the plan with them."
                )
            )
    if mismatches:
        raise ModelMismatchError("the plan belongs to another model: " + "; ".join(mismatches) + ".")
    if others:
        raise type(others[0])(" ".join(str(error) for error in others))
    return forms


def _tensors(model: nn.Module, chain: ChainPlan) -> tuple[list[Tensor], list[Tensor | None]]:
    operators = [model.get_submodule(name) for name in chain.chain.operators]
    return [operator.weight for operator in operators], [operator.bias for operator in operators]


def _kernels(routed: RoutedChain | IndexRoutedFFN, chain: ChainPlan, like: Tensor, kernel: str) -> KernelTable:
    if kernel == "measured":
        sizes = tuple(size for layer in chain.labels for size in _sizes(layer.tolist()))
        key = (type(routed).__name__, chain.chain.widths, chain.blocks, chain.active, sizes)
        was_training = routed.training
        routed.eval()
        table = measure_kernels(routed.run, routed.kernels(), chain.chain.widths[0], like.detach(), key)
        routed.train(was_training)
        return table
    if kernel not in routed.kernels():
        raise ConfigError(
            f"kernel={kernel!r} can't run chain {chain.chain.name!r}; it can use {', '.join(routed.kernels())}."
        )
    return KernelTable({1: kernel})


def _sizes(labels: list[int]) -> tuple[int, ...]:
    return tuple(labels.count(block) for block in sorted(set(labels)))


def _replace(model: nn.Module, name: str, routed: nn.Module) -> nn.Module:
    if not name:
        return routed
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, routed)
    return model
