"""Conditional plans: blocks of units that fire together, of which each token runs a few.

Shape letters: `T` tokens, `U` units, `B` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradloc.core.arguments import is_whole, number
from gradloc.core.plan import HUB, BlockPlan, ChainPlan, Labels, OperatorChain, Selection, Verdict
from gradloc.core.ports import Progress, told
from gradloc.core.router import RouterKind
from gradloc.decompose.firing_clusters import captured_share, cluster_units
from gradloc.decompose.firing_null import IndependentFirings
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError, NonFiniteError

LEAST_TOKENS = 32
DEFAULT_BLOCKS = 16
CONTROLS = 19
"""Random clusterings at least; a smaller level needs more, so that a p-value can reach it."""
LEAST_ALPHA = 0.001
LEAST_EXCESS = 0.01
"""An excess below this share of the energy is no structure, however significant: initial weights have as much."""
TESTED_UNITS, TESTED_TOKENS = 1024, 1024
"""Of more, a random part is tested: still a right test, of less power."""
CANDIDATES = (8, 16, 32, 64)
MOST_SHARES = 8
"""That a message names."""
SLOWER = 0.1
"""How much slower than the fastest a number of blocks may be, to capture more."""


def plan_conditional(
    chains: Sequence[OperatorChain],
    firings: Mapping[str, NDArray[np.floating]],
    blocks: int | Literal["auto"] = DEFAULT_BLOCKS,
    *,
    keep: float = 0.25,
    hub_share: float = 0.9,
    router: RouterKind = "linear",
    selection: Selection = "top",
    weighted: bool = True,
    alpha: float = 0.05,
    cost: Callable[[OperatorChain, int, int], float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BlockPlan:
    r"""Clusters the hidden units of each chain by what they fire for.

    Half of the sampled tokens find the clusters, the other half judge them: ``captured`` is the share of a held-out token's
    energy in its best blocks, ``chance`` the same for random clusters, and ``independent`` the same where units and tokens keep their own rates and sizes, and
    nothing else (`IndependentFirings`): units of one rate, put together, capture more than random ones without ever firing together. ``excess`` is what
    is captured beyond both, ``p_value`` the larger of the two. Units that fire for at least `hub_share` of the tokens run
    for every token (the hub), as far as half of the budget allows. The verdict is *natural* where 99 % is captured,
    *inducible* where clusters beat both, else *none*. It is about which units fire together, and
    not about what routing costs: in a long stage that begins early random blocks cost no more if they are weighted (`benchmarks/quality.py`), after training they
    do (`benchmarks/stages.py`).

    Args:
        chains: candidates; only chains of two operators can be routed, others are listed in ``description["skipped"]``.
        firings: energy per token and hidden unit by chain name, ``[T, U]``, 0 = did not fire.
        blocks: number of blocks; ``"auto"``: of those in `CANDIDATES` that run within a tenth of the fastest, the number whose blocks
            capture the most (16 without `cost`, or as many as there are hidden units).
        keep: share of the hidden units that run per token; whole blocks run, so that it is rounded to the nearest number of them, of which there
            must be at least one, and not all.
        hub_share: firing share from which a unit belongs to the hub.
        router: the kind that will be trained: ``"linear"``, ``"low_rank"`` or ``"mlp"``.
        selection: ``"top"``: every token runs equally many blocks; ``"threshold"``: those that score high enough, `keep` on average.
        weighted: blocks that run count $2\,\sigma(s)$ times by the router's score $s$, as experts of a mixture do, instead of once. All
            scores begin at 0, where that is once.
        alpha: level of the tests against random clusters and against units that fire independently; of each there are 1/alpha − 1, and 19 at least.
        cost: seconds that a chain takes with so many blocks, of which so many run.
        seed: of clustering and controls.
        progress: called with (done, total) chains.

    Raises:
        EmptyRunError: too few sampled tokens for which any unit fired.
        ModelMismatchError: firings of another number of units.
        NonFiniteError: energies that aren't finite.
        ConfigError: an argument isn't allowed, no chain can be routed, or `keep` is none or all of so many blocks.
    """
    count = DEFAULT_BLOCKS if blocks == "auto" else blocks
    faults = []
    if not is_whole(count, 2):
        faults.append(f"blocks={blocks!r} must be a whole number from 2, or 'auto'")
    if not 0 < number(keep) < 1:
        faults.append(f"keep={keep!r} must be between 0 and 1, both excluded")
    if not 0 < number(hub_share) <= 1:
        faults.append(f"hub_share={hub_share!r} must be above 0 and at most 1")
    if not LEAST_ALPHA <= number(alpha) < 1:
        faults.append(f"alpha={alpha!r} must be from {LEAST_ALPHA} to below 1")
    for name, value, known in (("router", router, get_args(RouterKind)), ("selection", selection, get_args(Selection))):
        if value not in known:
            faults.append(f"{name}={value!r} must be one of {', '.join(known)}")
    if faults:
        raise ConfigError("conditional blocks: " + "; ".join(faults) + ".")
    usable = [chain for chain in chains if chain.conditional_reason is None]
    if not usable:
        reasons = "; ".join(f"{chain.name}: {chain.conditional_reason}" for chain in chains) or "no operator was found"
        raise ConfigError(f"nothing can be routed per token. {reasons}.")
    too_wide = [c.name for c in usable if c.widths[1] < (2 if blocks == "auto" else count)]
    if too_wide:
        raise ConfigError(
            f"blocks={2 if blocks == 'auto' else count} is more than the hidden units of {', '.join(too_wide)}."
        )
    plans, controls = [], max(CONTROLS, math.ceil(1 / alpha) - 1)
    for chain in told(usable, len(usable), progress):
        energy = _checked(chain, firings.get(chain.name, np.zeros((0, chain.widths[1]))))
        if blocks == "auto" and cost is not None:
            plans.append(_fitted(chain, energy, keep, hub_share, seed, controls, cost))
        else:
            plans.append(_chain_plan(chain, energy, min(count, chain.widths[1]), keep, hub_share, seed, controls))
        plans[-1] = _tested(plans[-1], energy, seed, controls)
    plans = [replace(plan, router_kind=router, selection=selection, weighted=weighted) for plan in plans]
    verdicts = [_verdict(plan, alpha) for plan in plans]
    overall: Verdict = "none"
    if all(verdict == "natural" for verdict in verdicts):
        overall = "natural"
    elif sum(verdict != "none" for verdict in verdicts) * 2 >= len(verdicts):
        overall = "inducible"
    skipped = {chain.name: chain.conditional_reason for chain in chains if chain not in usable}
    description: dict[str, Any] = {"keep": keep, "seed": seed, "alpha": alpha, "controls": controls, "skipped": skipped}
    return BlockPlan("conditional", tuple(plans), overall, description)


def _checked(chain: OperatorChain, firings: NDArray[np.floating]) -> NDArray[np.floating]:
    """A chain's firings, if clusters can be found and judged in them."""
    energy = np.asarray(firings)
    if len(energy) and energy.shape[1] != chain.widths[1]:
        raise ModelMismatchError(
            f"chain {chain.name!r}: firings of {energy.shape[1]} units, it has {chain.widths[1]}; the run belongs to another model."
        )
    if not np.isfinite(energy).all():
        raise NonFiniteError(f"chain {chain.name!r}: firings have NaN or infinity; the run recorded a diverged model.")
    # Tokens without an error signal say nothing of who fires together.
    tokens = int(energy.any(1).sum()) if energy.size else 0
    if tokens < LEAST_TOKENS:
        silent = f" and {len(energy) - tokens} for which nothing fired" if tokens < len(energy) else ""
        raise EmptyRunError(
            f"chain {chain.name!r}: {tokens} sampled tokens{silent}, at least {LEAST_TOKENS} are needed. "
            "Record with firings=True (the default) for longer, or with a smaller firing_every."
        )
    return energy


def _chain_plan(
    chain: OperatorChain,
    energy: NDArray[np.floating],
    blocks: int,
    keep: float,
    hub_share: float,
    seed: int,
    controls: int,
) -> ChainPlan:
    random = np.random.default_rng(seed)
    order = random.permutation(len(energy))
    learn, judge = energy[order[::2]], energy[order[1::2]]
    units = chain.widths[1]
    hub = _hub(learn, hub_share, round(keep * units / 2), blocks)
    rest = np.setdiff1d(np.arange(units), hub)
    active = _running(keep, units, len(hub), blocks)
    labels = np.full(units, HUB, np.int64)
    labels[rest] = cluster_units(learn[:, rest], blocks, seed=seed)
    captured = float(captured_share(judge, labels, active, blocks).mean())
    drawn = np.array([captured_share(judge, _redraw(labels, random), active, blocks).mean() for _ in range(controls)])
    statistics = {
        "captured": captured,
        "chance": float(drawn.mean()),
        "excess": captured - float(drawn.mean()),
        "p_value": float((1 + (drawn >= captured).sum()) / (1 + controls)),
        "fire_share": float((judge > 0).mean()),
        "hub_units": float(len(hub)),
        "tokens": float(len(energy)),
    }
    ends = (np.full(chain.widths[0], HUB, np.int64), np.full(chain.widths[2], HUB, np.int64))
    return ChainPlan(chain, (ends[0], labels, ends[1]), blocks, active=active, statistics=statistics)


def _tested(plan: ChainPlan, energy: NDArray[np.floating], seed: int, controls: int) -> ChainPlan:
    """The plan with what clusters capture where units fire independently: the same search, in firings that only keep how often units and tokens fire
    and how large energies are. Co-firing is what there is beyond both that and random clusters, so that the smaller excess and the larger p-value count.
    """
    random = np.random.default_rng(seed)
    labels, blocks = plan.labels[1], plan.blocks
    units = _some(len(labels), max(TESTED_UNITS, 4 * blocks), random)
    tokens = random.permutation(np.flatnonzero(energy.any(1)))[:TESTED_TOKENS]
    part = np.asarray(energy[np.ix_(tokens, units)], np.float64)
    hub = labels[units] == HUB

    def captured(of: NDArray[np.float64]) -> float:
        found = np.full(len(units), HUB, np.int64)
        found[~hub] = cluster_units(of[::2, ~hub], blocks, restarts=1, seed=seed)
        return float(captured_share(of[1::2], found, plan.active or blocks, blocks).mean())

    firings = IndependentFirings(part, random)
    null = np.array([captured(firings.draw()) for _ in range(controls)])
    observed = captured(part)
    statistics = dict(plan.statistics)
    excess = observed - float(null.mean())
    statistics["independent"] = statistics["captured"] - excess
    statistics["excess"] = min(statistics["excess"], excess)
    statistics["p_value"] = max(statistics["p_value"], float((1 + (null >= observed).sum()) / (1 + controls)))
    return replace(plan, statistics=statistics)


def _some(count: int, most: int, random: np.random.Generator) -> NDArray[np.int64]:
    return np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))


def _running(keep: float, units: int, hub: int, blocks: int) -> int:
    """How many blocks run for a token.

    Raises:
        ConfigError: all would, which leaves nothing to choose or to test; or the share is nearer to none.
    """
    active = max(1, round((keep * units - hub) / ((units - hub) / blocks)))
    if active < blocks and keep * blocks > 0.5:
        return active
    wrong = f"half of one of {blocks} blocks or less" if active < blocks else f"all of {blocks} blocks"
    shares = ", ".join(f"{count / blocks:.3g}" for count in range(1, blocks)[:MOST_SHARES])
    more = ", …" if blocks - 1 > MOST_SHARES else ""
    least = math.ceil(1 / min(keep, 1 - keep) - 1e-9)
    instead = f", or as it is with blocks={least}" if least <= units else ""
    raise ConfigError(
        f"conditional blocks: keep={keep!r} is {wrong}; with blocks={blocks} it can be {shares}{more}{instead}."
    )


def _fitted(
    chain: OperatorChain,
    energy: NDArray[np.floating],
    keep: float,
    hub_share: float,
    seed: int,
    controls: int,
    cost: Callable[[OperatorChain, int, int], float],
) -> ChainPlan:
    """The number of blocks by what it captures, among those that run fast."""
    found = []
    for blocks in CANDIDATES:
        if blocks <= min(chain.widths[1] // 2, round(1 / keep) * 16):
            try:
                plan = _chain_plan(chain, energy, blocks, keep, hub_share, seed, controls)
            except ConfigError:  # so many blocks can't run that share
                continue
            assert plan.active is not None
            found.append(replace(plan, statistics=plan.statistics | {"seconds": cost(chain, blocks, plan.active)}))
    if not found:
        return _chain_plan(chain, energy, min(DEFAULT_BLOCKS, chain.widths[1]), keep, hub_share, seed, controls)
    fast = (1 + SLOWER) * min(plan.statistics["seconds"] for plan in found)
    return max((p for p in found if p.statistics["seconds"] <= fast), key=lambda plan: plan.statistics["captured"])


def _hub(energy: NDArray[np.floating], share: float, most: int, blocks: int) -> NDArray[np.int64]:
    """Units that fire nearly always, the most frequent first; as many as leave the rest divisible into equal blocks."""
    fires = (energy > 0).mean(0)
    candidates = np.argsort(-fires, kind="stable")[: int((fires >= share).sum())][:most]
    units = energy.shape[1]
    count = next((n for n in range(len(candidates), 0, -1) if (units - n) % blocks == 0), 0)
    return candidates[:count]


def _redraw(labels: Labels, random: np.random.Generator) -> Labels:
    drawn = labels.copy()
    drawn[labels >= 0] = random.permutation(labels[labels >= 0])
    return drawn


def _verdict(plan: ChainPlan, alpha: float) -> Verdict:
    if plan.statistics["p_value"] > alpha or plan.statistics["excess"] < LEAST_EXCESS:
        return "none"
    return "natural" if plan.statistics["captured"] >= 0.99 else "inducible"


def random_clusters(plan: BlockPlan, seed: int = 0) -> BlockPlan:
    """The control of a conditional plan: blocks of the same sizes and the same hub, other units drawn at random."""
    random = np.random.default_rng(seed)
    chains = tuple(
        replace(c, labels=(c.labels[0], _redraw(c.labels[1], random), c.labels[2]), router=None, statistics={})
        for c in plan.chains
    )
    return BlockPlan("conditional", chains, "none", {**plan.description, "control": "random clusters"})
