"""A copy of a model in which planned chains run as blocks; everything else, and the interface, is as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradloc.core.arguments import check_kind
from gradloc.core.hooks import foreign_hooks, shed_hooks
from gradloc.core.names import THE_MODEL, listed
from gradloc.core.operators import OperatorChain
from gradloc.core.plan import BlockPlan, ChainPlan
from gradloc.core.wrappers import inner_model, own_modules, refuse_meta, unwrap
from gradloc.errors import ConfigError, GradlocError, ModelMismatchError, NonFiniteError, UnsupportedError
from gradloc.route.aside import randomness_kept
from gradloc.route.certificate import certify_chain, check_plan
from gradloc.route.checks import CUT, Certificate, join
from gradloc.route.conditional import CONDITIONAL_KERNELS, CUDA_KERNELS, IndexRoutedFFN
from gradloc.route.conditional_timing import choose_conditional_kernels
from gradloc.route.convolutions import conv_form
from gradloc.route.dense import Origin, SavesDense
from gradloc.route.feed_forward import projections
from gradloc.route.inline import inline_again, is_inline, planned_module, take_over
from gradloc.route.kinds import ROUTED, SHARED, kind_of, operator_tensors
from gradloc.route.operator import STRUCTURAL_KERNELS, RoutedOperator
from gradloc.route.operator_certificate import certify_operator, cut_squares, masked, share_cut
from gradloc.route.operator_timing import choose_kernels
from gradloc.route.operators.gated import gated_form
from gradloc.route.patterns import chain_form, each_traced_once


def route_model(model: nn.Module, plan: BlockPlan, *, kernel: str = "measured", certify: bool = True) -> nn.Module:
    """Runs a model's planned chains as blocks.

    Args:
        model: stays untouched. Of what `torch.compile`, `DistributedDataParallel` or a checkpoint wrapper holds, the user's own modules are
            copied: wrap the copy again.
        plan: structural, or conditional with routers (`Annealer` trains them).
        kernel: ``"measured"`` times the kernels for a few token counts and picks the fastest for each; a kernel's name
            forces it.
        certify: check the result, and refuse to return a model that fails.

    Returns:
        A copy with the same call and the same class, and ``.certificate`` (None with ``certify=False``). The ``save_pretrained`` of a
        Hugging Face model writes the dense weights and the plan.

    Raises:
        ModelMismatchError: the plan belongs to another model, or the model is routed already; all differences are listed.
        ConfigError: a conditional plan without routers, a kernel that isn't known, or an argument of another kind.
        UnsupportedError: a planned module no longer computes what was planned, or shares a weight with another.
        NonFiniteError: weights with NaN or infinity.
        CertificateError: the result does not compute what the plan promises.

    Warns:
        RuntimeWarning: weights that aren't zero lie outside of structural blocks, and are cut: the plan wasn't annealed. Or there are hooks
            inside a planned operator, which routing leaves behind.

    Examples:
        >>> import numpy as np
        >>> from gradloc.core.plan import OperatorChain
        >>> ffn = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> chain = OperatorChain("", ("0", "2"), ("relu",), (2, 4, 2))
        >>> two, four = np.array([0, 1]), np.array([0, 0, 1, 1])
        >>> plan = BlockPlan("structural", (ChainPlan(chain, (two, four, two), 2),), "inducible")
        >>> plan.masks.apply(ffn)
        >>> fast = route_model(ffn, plan)
        >>> fast.certificate.passed
        True
    """
    known = {"measured", *STRUCTURAL_KERNELS, *CONDITIONAL_KERNELS, *CUDA_KERNELS}
    if kernel not in known:
        raise ConfigError(f"kernel={kernel!r} must be one of {', '.join(sorted(known))}.")
    check_kind(model, nn.Module, "the model", "a torch.nn.Module", "the model comes first, then the plan.")
    check_plan(plan)
    with _whatever_is_set(model):
        return _routed(inner_model(model), plan, kernel, certify)


@contextmanager
def _whatever_is_set(model: nn.Module) -> Iterator[None]:
    """Around routing: what is trained stays trainable under ``no_grad``, weights aren't rounded by autocast, and a training draws the same
    random numbers after it."""
    devices = {p.device for p in model.parameters()}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        randomness_kept([device for device in devices if device.type == "cuda"]),
        ExitStack() as stack,
    ):
        for kind in {device.type for device in devices if torch.amp.is_autocast_available(device.type)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _routed(model: nn.Module, plan: BlockPlan, kernel: str, certify: bool) -> nn.Module:
    own = own_modules(model)
    _validate(own, plan)
    _warn_of_cuts(own, plan)
    _warn_of_hooks(own, plan)
    fast = unwrap(copy.deepcopy(model))
    shed_hooks(fast)
    certificates: list[Certificate] = []
    for chain in plan.chains:
        module = planned_module(fast, chain.chain)
        make = _conditional if chain.conditional else _structural
        routed, certificate = make(chain, operator_tensors(fast, chain.chain), module, kernel, certify)
        routed.train(module.training)
        _answer_for(routed, module)
        certificates += [certificate] if certificate is not None else []
        if is_inline(chain.chain):
            take_over(fast, chain.chain, routed)
        else:
            fast = _replace(fast, chain.chain.name, routed)
    for module in fast.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, (RoutedOperator, IndexRoutedFFN)) for m in module.modules()
        ):
            module.use_nested_tensor = False  # its way around its layers takes their weights
    joined = join(certificates) if certify else None
    if joined is not None:
        joined.raise_if_failed()
    fast.certificate = joined
    fast._routed_from = Origin(plan, own)
    if hasattr(fast, "save_pretrained"):
        fast.save_pretrained = SavesDense(fast)
    return fast


def _structural(
    plan: ChainPlan, tensors: dict[str, Tensor], module: nn.Module, kernel: str, certify: bool
) -> tuple[nn.Module, Certificate | None]:
    routed = kind_of(plan.chain).build(plan, tensors, module)
    choose_kernels(routed, tensors[plan.chain.weights[0]], kernel)
    return routed, certify_operator(plan, tensors, routed, module) if certify else None


def _conditional(
    plan: ChainPlan, tensors: dict[str, Tensor], module: nn.Module, kernel: str, certify: bool
) -> tuple[nn.Module, Certificate | None]:
    weights, biases = projections(plan.chain, tensors)
    routed = IndexRoutedFFN.from_plan(plan, weights, biases, _dropouts(module))
    choose_conditional_kernels(routed, plan, weights[0], kernel)
    return routed, certify_chain(plan, weights, biases, routed, module) if certify else None


def _dropouts(module: nn.Module) -> tuple[float, ...]:
    """Before the first operator, before the last, and after it."""
    plain = chain_form(module) or conv_form(module)
    if plain is not None:
        return tuple(plain.dropouts)
    gated = gated_form(module)
    assert gated is not None
    return (0.0, *gated.dropouts)


def _validate(model: nn.Module, plan: BlockPlan) -> None:
    """Everything that could go wrong is found before anything is copied."""
    if sharded := [name for name, p in model.named_parameters() if isinstance(p, DTensor)]:
        raise UnsupportedError(
            f"{sharded[0]} is split over processes. Gather the weights into a model that isn't: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and route that."
        )
    modules = dict(model.named_modules())
    mismatches: list[str] = []
    others: list[GradlocError] = []
    routed: list[str] = []
    unrouted: list[str] = []
    users: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for chain in plan.chains:
        operator, name = chain.chain, chain.chain.name
        label = name or THE_MODEL
        kind = kind_of(operator)
        if isinstance(modules.get(name), (RoutedOperator, IndexRoutedFFN)):
            routed.append(label)
            continue
        missing = [own for own in (name, *operator.operators) if own not in modules]
        if missing:
            mismatches.append(f"{', '.join(dict.fromkeys(missing))}: no such {kind.holds} module")
            continue
        tensors = operator_tensors(model, operator)
        refuse_meta(tensors.items())
        shapes = {
            p.name: (p.layout.shape, tuple(tensors[p.name].shape)) for p in operator.parameters if p.name in tensors
        }
        wrong = [own for own, (planned, there) in shapes.items() if planned != there]
        lost = [own for own in operator.weights if own not in tensors]
        if wrong or lost:
            said = [f"{own} of shape {shapes[own][0]}, the model {shapes[own][1]}" for own in wrong]
            said += [f"{own}, the model none of that name" for own in lost]
            mismatches.append(f"{label}: other shapes; the plan has " + ", ".join(said))
            continue
        if chain.conditional and operator.conditional_reason is not None:
            others.append(UnsupportedError(f"{label}: {operator.conditional_reason}."))
            continue
        found = _found(model, operator)
        if found != operator:
            others.append(_other(operator, found))
            continue
        shared = [own for own, tensor in tensors.items() if users.get(id(tensor), 0) > 1]
        if shared:
            others.append(
                UnsupportedError(
                    f"{label}: {', '.join(shared)} {SHARED}; leave the chain out of the plan with include=."
                )
            )
        broken = [own for own, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            others.append(NonFiniteError(f"{', '.join(broken)} has NaN or infinity; take an earlier checkpoint."))
        if chain.conditional and chain.router is None:
            unrouted.append(label)
    if unrouted:
        others.append(
            ConfigError(
                f"{listed(unrouted)}: the plan has no router. Anneal it first: Annealer(model, optimizer, plan) trains the routers, and annealer.finish() returns the plan with them."
            )
        )
    if routed:
        raise ModelMismatchError(f"{listed(routed)}: {ROUTED}.")
    if mismatches:
        raise ModelMismatchError("the plan belongs to another model: " + "; ".join(mismatches) + ".")
    if others:
        raise type(others[0])(" ".join(str(error) for error in others))


def check_forwards(model: nn.Module, plan: BlockPlan) -> None:
    """Refuses before a stage what `route_model` would refuse after it: a plan, such as one by hand, of operators that compute something else.

    A forward that isn't recognised passes, and so does a sharded model: training may have put something there that comes off again.

    Raises:
        UnsupportedError: all that differ.
    """
    own = own_modules(model)
    if any(isinstance(p, DTensor) or p.is_meta for p in own.parameters()):
        return
    modules = dict(own.named_modules())
    there = [c.chain for c in plan.chains if {c.chain.name, *c.chain.operators} <= modules.keys()]
    with _whatever_is_set(own), each_traced_once():
        found = [(operator, _found(own, operator)) for operator in there]
    others = [_other(planned, now) for planned, now in found if isinstance(now, OperatorChain) and now != planned]
    if others:
        raise UnsupportedError(" ".join(map(str, others)))


def _found(model: nn.Module, operator: OperatorChain) -> OperatorChain | str | None:
    """What a model computes where an operator was planned."""
    if is_inline(operator):
        return inline_again(model, operator)
    return kind_of(operator).find(operator.name, model.get_submodule(operator.name))


def _other(operator: OperatorChain, found: OperatorChain | str | None) -> UnsupportedError:
    if isinstance(found, OperatorChain):  # what differs may be deeper than words go
        found = f"but the {_said(found)}" if _said(found) != _said(operator) else None
    why = f" ({found})" if found else ""
    return UnsupportedError(
        f"{operator.name or THE_MODEL}: its forward isn't the {_said(operator)} that was planned{why}; leave it out of the plan with include=."
    )


def _warn_of_cuts(model: nn.Module, plan: BlockPlan) -> None:
    """A certificate is of the routed model against its plan, and passes whatever the plan leaves out."""
    shares = {}
    for chain in plan.chains:
        if not chain.conditional:
            tensors = operator_tensors(model, chain.chain)
            squares = cut_squares(chain.chain, tensors, masked(chain, tensors)).values()
            shares[chain.chain.name] = share_cut(*np.sum(list(squares), axis=0))
    said = [f"{name or THE_MODEL} ({100 * share:.3g} %)" for name, share in shares.items() if share > CUT]
    if said:
        warnings.warn(
            f"gradloc: routing cuts weights that are not zero, by share of an operator's squared weights: {', '.join(said)}. So the routed model "
            "computes something else than the dense one; anneal first: Annealer(model, optimizer, plan) takes them to zero while the model trains.",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_hooks(model: nn.Module, plan: BlockPlan) -> None:
    """Modules that blocks stand for aren't called any more."""
    hooked, modules = [], dict(model.named_modules())
    for chain in (planned.chain for planned in plan.chains):
        inline = is_inline(chain)
        for name in (*chain.options["passed"], *chain.operators) if inline else (chain.name,):
            if name not in modules:  # a function
                continue
            inside = [modules[name]] if inline else modules[name].modules()
            if any(foreign_hooks(module) for module in inside):
                hooked.append(name or THE_MODEL)
    if hooked:
        warnings.warn(
            f"gradloc: {listed(hooked)}: hooks there don't run in the routed copy, since blocks take the place of these modules. Register them on "
            "the copy, or on a module around.",
            RuntimeWarning,
            stacklevel=4,
        )


def _said(operator: OperatorChain) -> str:
    """What an operator computes, in words."""
    if operator.kind == "chain":
        return f"chain linear → {' → '.join(operator.activations)} → linear"
    return f"{operator.kind} operator"


def _answer_for(routed: nn.Module, module: nn.Module) -> None:
    """Gives a routed operator the plain attributes of the module that it replaces, such as a stride: the model's code may ask for them."""
    for name, value in vars(module).items():
        if (
            not name.startswith("_")
            and isinstance(value, _PLAIN)
            and not hasattr(routed, name)
            and not hasattr(type(routed), name)
        ):
            setattr(routed, name, value)
    for name, parameter in module._parameters.items():
        if parameter is None and not hasattr(routed, name):  # a bias that there isn't
            routed.register_parameter(name, None)


_PLAIN = (int, float, str, tuple, torch.dtype, torch.device, type(None))


def _replace(model: nn.Module, name: str, routed: nn.Module) -> nn.Module:
    """Also wherever else the model has the same module."""
    if not name:
        return routed
    replaced = model.get_submodule(name)
    for parent in list(model.modules()):
        for own, child in list(parent._modules.items()):
            if child is replaced:
                setattr(parent, own, routed)
    return model
