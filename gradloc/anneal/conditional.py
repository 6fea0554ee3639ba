"""A conditional plan as an annealing target: blocks that a token doesn't pick fade, and routers learn to pick.

A convolution's places are tokens.

Shape letters: `N` tokens, `B` blocks, `U` hidden units, `D` width of the chain's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from gradloc.anneal.processes import agreed, average_gradients, together
from gradloc.core.hooks import Hook
from gradloc.core.names import called
from gradloc.core.places import as_tokens, from_tokens
from gradloc.core.plan import HUB, BlockPlan, ChainPlan
from gradloc.core.router import Router, new_router, pick
from gradloc.core.wrappers import inner_model, innermost, is_a, plain_name, refuse_meta
from gradloc.errors import ModelMismatchError, NotTrainedError, UnsupportedError

ROUTER_LEARNING_RATE = 3e-3
ROUTER_TOKENS = 8192
"""Tokens per forward pass that a router learns from, and per step that it practises on."""
ROUTER_WIDTH = 4
"""Width inside a low-rank router or an MLP, in multiples of the number of blocks, but at most the token's width."""
PRACTICE = (10, 20)
"""Steps after which a new router practises, and how often it does after each: it must know something before its picks count."""
MEMORY = 0.95
"""Of running averages, per forward pass."""


LOSS_WEIGHT = 16.0
"""Of the model's loss in a router's gradient, where the energies have 1."""


_HELD: WeakKeyDictionary[nn.TransformerEncoder, int] = WeakKeyDictionary()
"""Encoders that stages keep from nested tensors, and how many stages do."""
COLLAPSED = 0.25
"""Of a router whose share of blocks that next to no token picks is above this it is said that it collapsed."""


class _Gating(Hook):
    """One of a chain's, which knows whose it is."""

    def __init__(self, act: Callable[..., Any] | None = None, owner: ChainFading | None = None) -> None:
        super().__init__(act)
        self.owner = owner


class ChainFading:
    """Gates one chain's hidden units, and trains its router.

    The gate of unit $u$ for token $x$ is 1 where its block is among the router's picks (or it is in the hub), and the
    current factor elsewhere. With a weighted router, picked blocks go from 1 to $2\\,\\sigma(s)$ while the factor falls. The router
    learns from two things, apart from the model's optimizer: its scores of the blocks are fitted, by logistic loss, to whether a block
    is among those that carry the most of the chain's output,
    $\\sum_{u \\in b} h_u^2 \\lVert W^{down}_{:,u}\\rVert^2$: the token's highest, or with ``selection="threshold"`` the highest of
    all blocks of all tokens, as many as `active` for each token on average. And in the backward pass each block's score follows what
    the model's loss would gain from more of it, $\\sum_{u \\in b} h_u\\,\\partial L / \\partial h_u$, for the blocks that ran.
    A router that is new practises on the energies of the first steps' tokens, many times over.

    What a finished stage left on the chain is taken off: two gates would leave out what either does.
    """

    def __init__(self, model: nn.Module, plan: ChainPlan) -> None:
        if plan.chain.conditional_reason is not None or plan.active is None:
            reason = plan.chain.conditional_reason or "the plan is structural"
            raise UnsupportedError(f"{called('chain', plan.chain.name)}: {reason}.")
        *ups, self.down = (_submodule(model, name) for name in plan.chain.operators)
        up = ups[0]
        shapes = [
            (p.name, p.layout.shape, tuple(m.weight.shape))
            for p, m in zip(plan.chain.matrices, (*ups, self.down), strict=True)
        ]
        wrong = [f"{name} of shape {planned}, the model {there}" for name, planned, there in shapes if planned != there]
        if wrong:
            raise ModelMismatchError(f"{called('chain', plan.chain.name)}: the plan has {'; '.join(wrong)}.")
        self.plan, self.active, self.factor, self.dims = plan, plan.active, 1.0, plan.chain.dims
        labels = torch.from_numpy(plan.labels[1]).to(up.weight.device)
        self.labels = torch.where(labels == HUB, plan.blocks, labels)  # the hub is one more block that is always picked
        width = plan.chain.widths[0]
        start = plan.router or new_router(
            plan.router_kind, width, plan.blocks, min(width, ROUTER_WIDTH * plan.blocks), plan.weighted
        )
        self.router = Router(start, up.weight)
        dtype = self.router.layers[0].weight.dtype
        self.membership = F.one_hot(self.labels, plan.blocks + 1).to(dtype)[:, : plan.blocks]
        self.optimizer = torch.optim.Adam(
            [p for p in self.router.parameters() if p.requires_grad], lr=ROUTER_LEARNING_RATE
        )
        unknown = torch.full((plan.blocks + 2,), float("nan"), dtype=torch.float32, device=up.weight.device)
        self.agreement, self.captured, self.load = unknown[0], unknown[1], unknown[2:]
        # Mean squares of the two parts of the scores' gradient: on average, and summed up since the last step with their number.
        # The last two: what the best blocks exceed, summed up likewise, for a threshold.
        self.sizes, self.seen = unknown[:2].clone(), unknown.new_zeros(5)
        self.watched = self.taught = False
        self.to_practise = PRACTICE[0] if plan.router is None and plan.active < plan.blocks else 0
        self._exercises: list[tuple[Tensor, Tensor, Tensor]] = []
        self._input: Tensor | None = None
        for hook in list(self.down._forward_pre_hooks.values()):
            if isinstance(hook, _Gating) and hook.owner is not None:
                hook.owner.remove()
        self._handles: list[RemovableHandle] = [
            # Compiled code calls them as they are: traced, they would freeze the factor of one step.
            module.register_forward_pre_hook(_Gating(torch.compiler.disable(hook), self), with_kwargs=True)
            for module, hook in ((up, self._keep_input), (self.down, self._gate_hidden))
        ]

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self._input = next(iter((*inputs, *named.values())))

    def _gate_hidden(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        hidden, source = next(iter((*inputs, *named.values()))), self._input
        self._input = None
        if source is None:
            raise UnsupportedError(
                f"{called('chain', self.plan.chain.name)}: its second operator ran without its first, so nothing can be routed."
            )
        self.watched = True
        tokens = as_tokens(source, self.dims)
        lesson: Callable[[Tensor], None] | None = None
        with torch.autocast(tokens.device.type, enabled=False):
            # In evaluation mode as well: many fine-tune a pretrained model as it was loaded. What isn't trained has no backward pass.
            if torch.is_grad_enabled() and tokens.shape[0]:
                lesson = self._teach(tokens.detach(), as_tokens(hidden.detach(), self.dims))
            # Weights of blocks pass gradients on to the tokens; the router itself only learns from its lesson.
            fixed = {name: parameter.detach() for name, parameter in self.router.named_parameters()}
            scores = functional_call(self.router, fixed, (tokens,))
            gates = self.router.gates(scores, self.active)
            gate = torch.cat([gates, torch.ones_like(gates[:, :1])], dim=1).to(hidden.dtype)
            gate = gate + (1.0 - gate) * self.factor
            units = from_tokens(gate.index_select(1, self.labels), hidden, self.dims)
        gated = hidden * units
        if lesson is not None:
            if gated.requires_grad:
                gated.register_hook(Hook(lesson))
            elif module.training:  # nothing comes back to a frozen chain, so its router has only the energies
                lesson(torch.zeros_like(gated))
        if inputs:
            return (gated, *inputs[1:]), named
        return (), dict.fromkeys(named, gated)  # an operator takes one input, by whatever name

    def _teach(self, tokens: Tensor, hidden: Tensor) -> Callable[[Tensor], None]:
        """What the router learns from the energies, and from the gradient of the gated units once that is known.

        Nothing here reads a value of a tensor, which would make a GPU wait.
        """
        stride = max(1, tokens.shape[0] // ROUTER_TOKENS)
        tokens, hidden = (x[::stride].to(self.membership.dtype) for x in (tokens, hidden))
        # An overflow that a gradient scaler will skip must not stay in the router.
        usable = torch.isfinite(tokens).all() & torch.isfinite(hidden).all()
        tokens, hidden = (torch.where(usable, x, torch.zeros_like(x)) for x in (tokens, hidden))
        weight = self.down.weight.detach().flatten(1).to(self.membership.dtype)
        squares = weight.square().sum(1 if self.plan.chain.matrices[-1].layout.turned else 0)
        energy = (hidden.square() * squares) @ self.membership
        ideal = self._best(energy)
        with torch.enable_grad():
            scores = self.router(tokens)
            loss = F.binary_cross_entropy_with_logits(scores, ideal.to(scores.dtype))
        (urge,) = torch.autograd.grad(loss, scores)
        urge = urge * usable
        attached, scores = scores, scores.detach()
        picks = pick(scores, self.active, self.router.threshold)
        found = {
            "agreement": (picks & ideal).sum() / ideal.sum(),
            "captured": (energy * picks).sum() / (energy * ideal).sum().clamp(min=1e-30),
            "load": picks.to(self.load.dtype).mean(0),
        }
        gate = picks.to(hidden.dtype) * (1.0 - self.factor) + self.factor

        def lesson(gradient: Tensor) -> None:
            self.taught = True
            room = ROUTER_TOKENS - sum(len(kept) for kept, *_ in self._exercises)
            if self.to_practise and room > 0:
                self._exercises.append((tokens[:room], ideal[:room].to(scores.dtype), usable))
            if self.plan.selection == "threshold":
                # It moves with the router, once a step: a pass that is computed again must pick as it did.
                cut = _cut(scores, self.active)
                self.seen[3:] += torch.where(usable, torch.stack([cut, torch.ones_like(cut)]), 0.0)
            # Kept as tensors: reading them would wait for the device in every step.
            for name, value in found.items():
                setattr(self, name, _blend(getattr(self, name), value, usable))
            self._learn_from_loss(attached, hidden, gate, urge, usable, stride, gradient)

        return lesson

    def _learn_from_loss(
        self, scores: Tensor, hidden: Tensor, gate: Tensor, urge: Tensor, usable: Tensor, stride: int, gradient: Tensor
    ) -> None:
        """Adds what the model's loss says of each block that ran: to first order, what more of it would change.

        Its size is made that of the energies' gradient, by running averages over the steps and processes before, so that neither a loss
        scale nor the size of a batch decides which of the two leads. Nothing is added where the gradient overflowed.
        """
        rows = as_tokens(gradient.detach(), self.dims)[::stride].to(hidden.dtype)
        with torch.no_grad():
            chance = torch.sigmoid(scores)
            wish = ((rows * hidden) @ self.membership) * gate * chance * (1 - chance)
            squares = torch.stack([urge.square().mean(), wish.square().mean()])
            whole = torch.isfinite(squares).all() & usable
            self.seen[:3] += torch.where(whole, torch.cat([squares, torch.ones_like(squares[:1])]), 0.0)
            ratio = (self.sizes[0] / self.sizes[1]).sqrt()
            wish = torch.where(whole & torch.isfinite(ratio), wish * ratio, torch.zeros_like(wish))
        scores.backward(urge + LOSS_WEIGHT * wish, retain_graph=True)  # the model's own graph may be gone through again

    def _best(self, energy: Tensor) -> Tensor:
        if self.plan.selection == "top":
            return pick(energy, self.active)
        return energy > _cut(energy, self.active)

    def learn(self) -> None:
        """One optimizer step of the router on what the forward passes since the last one gathered, in all processes; then a new one practises."""
        seen = _averaged(self.seen, *self._learning())
        self.sizes = _blend(self.sizes, seen[:2] / seen[2].clamp(min=1e-30), seen[2] > 0)
        if self.plan.selection == "threshold" and float(seen[4]) > 0:  # a GPU waits here, once a step
            cut, old = float(seen[3] / seen[4]), self.router.threshold
            self.router.threshold = cut if old is None else MEMORY * old + (1 - MEMORY) * cut
        self.seen = torch.zeros_like(self.seen)
        before = self._copies()
        self._step()
        # Where all of it overflowed, or none was training, nothing was learned: momentum alone must not move the router.
        self._return_unless(seen[2] > 0, before)
        if self.to_practise:
            self._practise()

    def _practise(self) -> None:
        """Optimizer steps on the energies of the first passes since the last step, in all processes."""
        exercises, self._exercises = self._exercises, []
        self.to_practise -= 1
        before = self._copies()
        usable = sum((usable.to(self.seen.dtype) for *_, usable in exercises), torch.zeros_like(self.seen[0]))
        for _ in range(PRACTICE[1]):
            for tokens, ideal, whole in exercises:
                with torch.enable_grad():
                    loss = F.binary_cross_entropy_with_logits(self.router(tokens), ideal)
                    (loss * whole / len(exercises)).backward(inputs=self._learning())
            count = _averaged(usable, *self._learning())
            self._step()
        self._return_unless(count > 0, before)
        if self.plan.selection == "threshold":
            found = torch.zeros_like(self.seen[3:])
            with torch.no_grad():
                for tokens, _, whole in exercises:
                    cut = _cut(self.router(tokens), self.active)
                    found += torch.where(whole, torch.stack([cut, torch.ones_like(cut)]), 0.0)
            total, count = _averaged(found)
            if float(count) > 0:
                self.router.threshold = float(total / count)

    def _learning(self) -> list[nn.Parameter]:
        return [p for p in self.router.parameters() if p.requires_grad]

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.router.parameters()]

    @torch.no_grad()
    def _return_unless(self, learned: Tensor, before: list[Tensor]) -> None:
        """Sets the router back where nothing was learned, without looking."""
        for parameter, old in zip(self.router.parameters(), before, strict=True):
            parameter.copy_(torch.where(learned, parameter, old))

    @property
    def attached(self) -> bool:
        """Whether the gate is on."""
        return bool(self._handles)

    def statistics(self) -> dict[str, float]:
        """How well the router picks, running averages over training tokens.

        ``router_agreement``: share of the ideal picks that it makes. ``router_captured``: energy of its picks over that of the
        ideal ones. ``blocks_run``: mean share of the blocks that run. ``load_spread``: of the most over the least used block's
        share of tokens, as the share of the mean. ``dead_blocks``: picked by fewer than one token in a thousand.
        """
        load = self.load
        return {
            "router_agreement": float(self.agreement),
            "router_captured": float(self.captured),
            "blocks_run": float(load.mean()),
            "load_spread": float((load.max() - load.min()) / load.mean()),
            "dead_blocks": float((load < 1e-3).sum()),
        }

    def remove(self) -> None:
        """Takes the gate off: the model runs dense again. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._exercises.clear()


class ConditionalTarget:
    """All chains of a conditional plan.

    Raises:
        ModelMismatchError, UnsupportedError: a chain doesn't fit the model.
    """

    def __init__(self, model: nn.Module, plan: BlockPlan) -> None:
        self._plan = plan
        self._chains: list[ChainFading] = []
        self._encoders: list[nn.TransformerEncoder] = []
        try:
            for chain in plan.chains:
                self._chains.append(ChainFading(inner_model(model), chain))
        except Exception:
            self.close()
            raise
        # Its nested tensors of padded batches have no tokens that a router could score.
        self._encoders = [
            module
            for module in inner_model(model).modules()
            if isinstance(module, nn.TransformerEncoder) and (module.use_nested_tensor or module in _HELD)
        ]
        for encoder in self._encoders:
            _HELD[encoder] = _HELD.get(encoder, 0) + 1
            encoder.use_nested_tensor = False
        # Code that was compiled before would go on without the hooks; nobody can tell from a module whether it was.
        torch.compiler.reset()

    def fades(self) -> str:
        """How many of the blocks fade for a token."""
        networks = f"{len(self._chains)} feed-forward networks" if len(self._chains) > 1 else "a feed-forward network"
        return f"the blocks that a token doesn't pick ({self._plan.running} run) in {networks}"

    def check_watched(self) -> None:
        """Raises `UnsupportedError` if no forward pass has come through a chain, so that nothing would be annealed."""
        missed = [called("chain", chain.plan.chain.name) for chain in self._chains if not chain.watched]
        if missed:
            raise UnsupportedError(
                f"no forward pass of the model went through {', '.join(missed)} before this step, so nothing can fade there. Annealing "
                "needs the model's own forward: no CUDA graph's replay, no exported program, no copy of it."
            )

    def check_trained(self, steps: int) -> None:
        """Raises `NotTrainedError` if after so many steps a router is as it was drawn: it would pick blocks at random."""
        new = [chain for chain in self._chains if chain.plan.router is None]
        drawn = [
            called("chain", chain.plan.chain.name) for chain in new if not steps or bool(torch.isnan(chain.agreement))
        ]
        if drawn:
            raise NotTrainedError(
                f"finish(): the routers of {', '.join(drawn)} are untrained. Train on with annealer.step() after each optimizer.step(), for some hundred "
                "steps, so that they learn which blocks a token needs; route_model(model, plan) would pick at random."
            )

    def apply(self, factor: float) -> None:
        """Raises `NotTrainedError` where a router's picks are about to count alone and it has never learned anything."""
        for chain in self._chains:
            if factor == 0.0 and chain.plan.router is None and not chain.taught and together() == 1:
                raise NotTrainedError(
                    f"{called('chain', chain.plan.chain.name)}: no backward pass came through it since annealing began, so its router has learned nothing. "
                    "Train it with gradients on, and call annealer.step() after each optimizer.step()."
                )
            chain.factor = factor
            chain.learn()

    def left(self) -> float:
        """The factor: what isn't picked is scaled by it."""
        return max(chain.factor for chain in self._chains)

    def account(self) -> dict[str, float]:
        """Of `ChainFading.statistics` over chains: means, but the largest spread, and all dead blocks; the mean over processes."""
        found = [chain.statistics() for chain in self._chains]
        how = {"load_spread": max, "dead_blocks": sum}
        return {name: agreed(float(how.get(name, fmean)([own[name] for own in found]))) for name in found[0]}

    def faults(self) -> str:
        """Which routers collapsed."""
        said = [
            f"{called('chain', c.plan.chain.name)} ({int(dead)} of {c.plan.blocks})"
            for c in self._chains
            if (dead := c.statistics()["dead_blocks"]) > COLLAPSED * c.plan.blocks
        ]
        return (
            f"next to no token picks some blocks of {', '.join(said)}, so that their units are idle: plan fewer blocks or a smaller keep=, or train "
            "on more varied data"
            if said
            else ""
        )

    def exact(self) -> bool:
        return all(chain.factor == 0.0 and chain.attached for chain in self._chains)

    def plan(self) -> BlockPlan:
        """The plan with the routers as they are now, and how often they agree with the ideal choice."""
        plan = self._plan.with_routers({c.plan.chain.name: c.router.weights() for c in self._chains})
        chains = (
            replace(chain, statistics=chain.statistics | fading.statistics())
            for chain, fading in zip(plan.chains, self._chains, strict=True)
        )
        return replace(plan, chains=tuple(chains))

    def state_dict(self) -> dict[str, Any]:
        return {
            c.plan.chain.name: {
                "factor": c.factor,
                "agreement": c.agreement,
                "captured": c.captured,
                "load": c.load,
                "sizes": c.sizes,
                "threshold": c.router.threshold,
                "to_practise": c.to_practise,
                "router": c.router.state_dict(),
                "optimizer": c.optimizer.state_dict(),
            }
            for c in self._chains
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for chain in self._chains:
            saved = state[chain.plan.chain.name]
            chain.factor, chain.router.threshold = saved["factor"], saved["threshold"]
            chain.to_practise, chain._exercises = saved["to_practise"], []
            # A checkpoint may have been loaded onto another device than the chain's.
            device = chain.load.device
            chain.taught = not bool(torch.isnan(saved["agreement"]))
            chain.agreement, chain.captured = saved["agreement"].to(device), saved["captured"].to(device)
            chain.load, chain.sizes = saved["load"].to(device), saved["sizes"].to(device)
            chain.router.load_state_dict(saved["router"])
            chain.optimizer.load_state_dict(saved["optimizer"])

    def close(self) -> None:
        for chain in self._chains:
            chain.remove()
        for encoder in self._encoders:
            _HELD[encoder] -= 1
            if not _HELD[encoder]:  # a later stage may be at work there
                del _HELD[encoder]
                encoder.use_nested_tensor = True
        self._encoders = []
        torch.compiler.reset()


def _cut(values: Tensor, active: int) -> Tensor:
    """What `active` of a row's values exceed, on average over the rows of ``[N, B]``; a scalar."""
    rest = values.numel() - active * values.shape[0]
    return values.flatten().kthvalue(rest).values if rest else values.new_tensor(-math.inf)


def _averaged(values: Tensor, *parameters: Tensor) -> Tensor:
    """Averages the parameters' gradients over all processes, and `values` with them."""
    holder = torch.zeros_like(values)
    holder.grad = values
    average_gradients([*parameters, holder])
    return holder.grad


def _blend(old: Tensor, new: Tensor, usable: Tensor) -> Tensor:
    """A running average that starts with its first usable value."""
    return torch.where(usable, torch.where(old.isnan(), new, MEMORY * old + (1 - MEMORY) * new), old)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        module = innermost(model.get_submodule(name))  # wrappers hand on what is asked for below them
    except AttributeError:
        raise ModelMismatchError(f"the plan belongs to another model: there is no module {name!r}.") from None
    if not isinstance(module._parameters.get("weight"), Tensor):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} without a weight of its own; conditional blocks need a linear operator, or a convolution of kernel 1."
        )
    refuse_meta([(f"{name}.weight", module.weight)])
    if isinstance(module.weight, DTensor) and not _gathered_for_forward(model, name):
        raise UnsupportedError(
            f"{name} is split over processes by {', '.join(map(str, module.weight.placements))} and stays so while it runs, so no "
            "process sees all of its units; conditional blocks work with DDP and torch.distributed.fsdp.fully_shard."
        )
    return module


def _gathered_for_forward(model: nn.Module, name: str) -> bool:
    """Whether FSDP2 shards the module: its weight is whole while it runs."""
    sharded = (plain_name(f"{own}.") for own, module in model.named_modules() if is_a(module, "FSDPModule"))
    return any(f"{name}.".startswith(own) or own == "." for own in sharded)
