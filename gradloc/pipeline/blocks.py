"""Block plans of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gradloc.core.arguments import check_kind, is_whole
from gradloc.core.masks import MaskSet, check_shapes
from gradloc.core.mixtures import Mixture
from gradloc.core.names import MOST_LISTED, THE_MODEL, listed, matching, meant
from gradloc.core.operators import KINDS, LayerParameter, OperatorChain
from gradloc.core.plan import BlockPlan
from gradloc.core.ports import Progress, WindowRange
from gradloc.core.wrappers import own_modules
from gradloc.decompose.conditional import plan_conditional
from gradloc.decompose.search import BlockSearch, search_structural
from gradloc.decompose.structural import plan_structural
from gradloc.errors import ConfigError, EmptyRunError, ModelMismatchError
from gradloc.pipeline.arguments import check_masks, patterns_of, refuse_without_effect
from gradloc.pipeline.run import Run, as_run, last_weights
from gradloc.route.block_cost import COST_TOKENS, StructuralCost, conditional_seconds
from gradloc.route.find import find_operators
from gradloc.route.kinds import ROUTED
from gradloc.route.mixtures import find_mixtures

SHUFFLES = 19
"""The fewest that allow a p-value of .05."""
FEED_FORWARD = ("chain", "gated", "conv")
"""Kinds that can have conditional blocks, if they have one hidden layer; convolutions, if each place is by itself."""
_ON_REQUEST = ("linear", "embedding")
"""Kinds whose units others read as well, so that blocks in them are a decision of their own."""


def plan_blocks(
    model: nn.Module | None,
    run: Run | str | Path | MaskSet,
    kind: Literal["structural", "conditional"] = "structural",
    blocks: int | Literal["auto"] = "auto",
    *,
    keep: float | None = None,
    form: Literal["mixed", "disjoint", "overlapping"] = "mixed",
    include: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    masks: MaskSet | None = None,
    windows: WindowRange = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> BlockPlan:
    """Groups units into blocks that run apart.

    Structural blocks are looked for in chains of linear operators, gated feed-forward networks, attention (by heads), convolutions and
    recurrent layers; in linear operators and embeddings by themselves on request. Conditional ones in chains and gated networks with one hidden layer,
    and in pairs of pointwise convolutions, of which each place is a token. What stays dense is in
    ``plan.description["skipped"]``, by module name with the reason. Experts of a mixture are blocks with a router already: they are named in
    ``plan.description["mixtures"]`` and stay whole unless `include` names them.

    Args:
        model: current weights and operators are taken from it; None takes both from the run.
        run: a run or its path; or masks, whose exact components (or co-clusters) become blocks. Of an operator of which masks remove whole
            hidden units and nothing else, as ``granularity="unit"`` does, the plan is one block without them, unless `blocks` is given.
        kind: ``"structural"``: the same blocks for every input. ``"conditional"``: blocks of units that fire together, of
            which a router picks some per token.
        blocks: number of blocks; ``"auto"`` takes the number whose evidence exceeds chance the most; if conditional, the one that
            captures the most among those measured to run fast.
        keep: share of a chain's hidden units that run per token (conditional; default .25).
        form: structural: ``"mixed"`` lets input and output of a chain be grouped apart, ``"disjoint"`` ties them, ``"overlapping"``
            lets blocks share inputs and outputs.
        include: names or globs of modules, each of which must mean an operator; by default all that were found.
        operators: kinds that are planned for: ``"chain"``, ``"gated"``, ``"attention"``, ``"conv"``, ``"recurrent"``, ``"linear"``, ``"embedding"``;
            by default all but the last two, and with `include` all.
        masks: beside a run: exact components of these masks are looked for first.
        windows: half-open range of windows.
        seed: of the search.
        progress: called with (done, total) operators.
        **settings: passed to the planner: ``alpha``; structural: ``sizes="free"`` (blocks of the sizes that the evidence has), ``hub=0.25``
            (up to that share of the inputs and of the outputs in all blocks), ``shuffles``, ``overlap`` (of the overlapping form);
            conditional: ``hub_share``, ``router``, ``selection``, ``weighted``.

    Returns:
        The plan; ``plan.verdict`` says whether the structure was there already, can be induced, or is absent.

    Raises:
        ConfigError: no chain to plan for, a name that means none, or more blocks than units.
        EmptyRunError: the run lacks the evidence that the kind needs.
        ModelMismatchError: `model` isn't the one that was recorded, or is routed already.
    """
    if kind not in ("structural", "conditional"):
        raise ConfigError(
            f"kind={kind!r} must be one of structural, conditional{meant(kind, ('structural', 'conditional'))}."
        )
    known = [name for name in _keywords(plan_blocks, _PLANNERS[kind]) if name not in _WITHOUT_EFFECT[kind]]
    other = "conditional" if kind == "structural" else "structural"
    elsewhere = dict.fromkeys(_keywords(_PLANNERS[other]), f"kind={other!r}")
    _check_known(settings, known, f"plan_blocks(kind={kind!r})", elsewhere)
    _check_seed(seed)
    if masks is not None:
        check_masks(masks)
    if model is not None:
        _check_model(model)
        model = own_modules(model)
    if kind == "structural":
        refuse_without_effect(
            {"keep": keep},
            "with kind='structural', where the number of blocks decides; see gradloc.search_blocks",
            "blocks",
        )
        settings.setdefault("shuffles", SHUFFLES)
    if isinstance(run, MaskSet):
        if model is None or kind == "conditional":
            raise ConfigError(
                "blocks from masks alone need model=, and are structural; conditional blocks need a recorded run."
            )
        run.check(model)
        found, skipped = find_operators(model)
        mixtures = find_mixtures(model)
        chains, skipped = _chosen_operators(found, include, operators, skipped, mixtures)
        bare = {chain.name: "the masks don't cover it" for chain in chains if not set(chain.weights) <= set(run)}
        chains = [chain for chain in chains if chain.name not in bare]
        if not chains:
            raise ConfigError("no operator of the model is covered by these masks; mask both weights of an FFN.")
        empty = [name for chain in chains for name in chain.weights if not run.array(name).any()]
        if empty:
            raise ConfigError(
                f"the masks keep nothing of {', '.join(empty)}, so that its operator computes constants; leave it out with include=[…]."
            )
        kept = {p.name: p.layout.grid(run.array(p.name)).sum(2).astype(np.float64) for c in chains for p in c.matrices}
        plan = plan_structural(
            chains, kept, blocks, form=form, seed=seed, masks=run, skipped=skipped | bare, progress=progress, **settings
        )
        return _beside_mixtures(_tested_with(plan, settings["shuffles"]), mixtures)
    opened = as_run(run)
    found, skipped = find_operators(model) if model is not None else (opened.info.chains, _unplanned(opened))
    mixtures = find_mixtures(model) if model is not None else opened.info.mixtures
    if kind == "conditional":
        without = {"form": None if form == "mixed" else form, "operators": operators, "masks": masks}
        refuse_without_effect(
            without, "with kind='conditional', whose blocks are hidden units of feed-forward networks", "blocks"
        )
        chains, left_out = _chosen_operators(found, include, FEED_FORWARD, skipped, mixtures, conditional=True)
        usable = [chain for chain in chains if chain.conditional_reason is None]
        firings = {c.name: opened.store.firings(c.fires_at, windows)[:, c.fires_among] for c in usable}

        def cost(chain: OperatorChain, blocks: int, active: int) -> float:
            like = torch.empty(0) if model is None else model.get_parameter(chain.weights[0])
            return conditional_seconds(chain, blocks, active, like)

        try:
            plan = plan_conditional(
                chains,
                firings,
                blocks,
                keep=0.25 if keep is None else keep,
                cost=cost,
                seed=seed,
                progress=progress,
                **settings,
            )
        except EmptyRunError as error:
            if model is not None:
                _check_recorded(opened, model)
            if opened.info.config.get("firings") is False:
                raise EmptyRunError(
                    "the run was recorded with firings=False, and conditional blocks are of units that fire together; record with firings=True (the default)."
                ) from None
            why = [problem for problem in (*opened.info.notes, *opened.problems) if "firings" in problem]
            raise EmptyRunError(f"{error} The run says: {why[0]}." if why else str(error)) from None
        plan = replace(plan, description={**plan.description, "skipped": left_out | plan.description["skipped"]})
        return _beside_mixtures(plan, mixtures)
    chains, evidence, skipped = _structural_evidence(
        opened, model, found, skipped, include, operators, windows, mixtures
    )
    plan = plan_structural(
        chains,
        evidence,
        blocks,
        form=form,
        seed=seed,
        masks=masks,
        skipped=skipped,
        progress=progress,
        **settings,
    )
    return _beside_mixtures(_tested_with(plan, settings["shuffles"]), mixtures)


_PLANNERS: dict[str, Callable[..., Any]] = {"structural": plan_structural, "conditional": plan_conditional}
_WITHOUT_EFFECT = {"structural": ("keep",), "conditional": ("form", "operators", "masks")}
"""Arguments of `plan_blocks` that belong to the other kind."""
_WIRED = ("skipped", "cost")
"""Arguments of planners that only this file gives."""


def _keywords(*functions: Callable[..., Any]) -> list[str]:
    """What functions can be told by name only."""
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _WIRED))


def _check_known(settings: Mapping[str, Any], known: Sequence[str], of: str, elsewhere: Mapping[str, str]) -> None:
    """Refuses keywords that a planner doesn't have, before it would raise a TypeError; `elsewhere` says what has those that it lacks."""
    unknown = [name for name in settings if name not in known]
    if unknown:
        said = [
            f"{name}= (it belongs to {elsewhere[name]})"
            if name in elsewhere
            else f"{name}={meant(f'{name}=', [f'{k}=' for k in known])}"
            for name in unknown
        ]
        raise ConfigError(f"{of} has no setting {', '.join(said)}. Settings: {', '.join(known)}.")


def _check_model(model: object) -> None:
    check_kind(model, nn.Module, "the model", "a torch.nn.Module", "the model comes first, then the run.")


def _check_seed(seed: int) -> None:
    if not is_whole(seed, 0):
        raise ConfigError(f"seed={seed!r} must be a whole number from 0.")


def _structural_evidence(
    run: Run,
    model: nn.Module | None,
    found: Sequence[OperatorChain],
    skipped: Mapping[str, str],
    include: Sequence[str] | None,
    operators: Sequence[str] | None,
    windows: WindowRange,
    mixtures: Sequence[Mixture],
) -> tuple[list[OperatorChain], dict[str, np.ndarray], dict[str, str]]:
    """Operators to plan for, the evidence of their weights, and what is left out with the reason."""
    chains, skipped = _chosen_operators(found, include, operators, skipped, mixtures)
    weights = last_weights(run, model)
    recorded = {parameter.name for parameter in run.info.parameters}
    unseen = {
        chain.name: f"{name} was not recorded"
        for chain in chains
        for name in chain.weights
        if name not in weights or name not in recorded
    }
    chains = [chain for chain in chains if chain.name not in unseen]
    if not chains:
        if model is not None:
            _check_recorded(run, model)
        raise ConfigError(
            f"{'; '.join(unseen.values())}, so no operator can be planned; record it, or choose others with include=[…]."
        )
    shapes = {parameter.name: parameter.layout.shape for parameter in run.info.parameters}
    wrong = [
        f"{name} is of shape {weights[name].shape}, in the run of {shapes[name]}"
        for chain in chains
        for name in chain.weights
        if weights[name].shape != shapes[name]
    ]
    if wrong:
        raise ModelMismatchError(f"the run belongs to another model: {'; '.join(wrong)}.")
    evidence = {p.name: saliency_of(run, p, weights, windows) for chain in chains for p in chain.matrices}
    return chains, evidence, skipped | unseen


def _check_recorded(run: Run, model: nn.Module) -> None:
    """Raises `ModelMismatchError` where the run recorded parameters that the model lacks or has in another shape."""
    check_shapes({p.name: p.layout.shape for p in run.info.parameters}, model, "run", most=4)


def search_blocks(
    model: nn.Module,
    run: Run | str | Path,
    *,
    keep: float | None = None,
    latency: float | None = None,
    tokens: Sequence[int] = COST_TOKENS,
    include: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    windows: WindowRange = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> BlockSearch:
    """Which static form each operator should run in: blocks of several forms and numbers, or fewer units, by kept evidence and measured
    latency.

    `plan_blocks` makes structural blocks of one form. This tries every form with several numbers of blocks, with and without a hub, and plain
    removal of hidden units by the same evidence; measures each on the model's device beside the dense operator; and takes, of those that meet
    the target, the fastest that keeps at least 95 % of what the best keeps. Where that is removal of units, it is annealed, routed
    and certified as blocks are.

    Args:
        model: its current weights count, and its device and dtype are what latency is measured on.
        run: a run or its path.
        keep: the target: largest share of an operator's weights that stays.
        latency: or: largest share of the dense operator's time, such as 0.5, in the geometric mean over `tokens`. On small networks nothing may reach
            it: begin with `keep`.
        tokens: numbers of tokens that are measured.
        include, operators, windows, seed, progress: as for `plan_blocks`.
        **settings: of the search: ``forms``, ``blocks`` (numbers to try), ``hub`` (largest share of units in all blocks; 0 for none), ``overlap``,
            ``alpha``, ``shuffles``.

    Returns:
        ``.table``: one row per operator and candidate, with kept evidence, latency, p-value and whether it is on the Pareto front; ``.plan``:
        what was chosen, and in ``plan.description["chosen"]`` why. ``plan.verdict`` is about blocks, as in `plan_blocks`, even where units
        were removed instead.

    Raises:
        ConfigError: not one target, an argument that isn't allowed, or no candidate that meets the target.
        EmptyRunError: the run lacks evidence.
        ModelMismatchError: `model` isn't the one that was recorded.
    """
    _check_known(settings, _keywords(search_blocks, search_structural), "search_blocks", {})
    _check_seed(seed)
    _check_model(model)
    model = own_modules(model)
    opened = as_run(run)
    found, skipped = find_operators(model)
    mixtures = find_mixtures(model)
    chains, evidence, skipped = _structural_evidence(
        opened, model, found, skipped, include, operators, windows, mixtures
    )
    settings.setdefault("shuffles", SHUFFLES)
    cost = StructuralCost(model, tokens)
    searched = search_structural(
        chains,
        evidence,
        cost,
        keep=keep,
        latency=latency,
        seed=seed,
        skipped=skipped,
        progress=progress,
        **settings,
    )
    return replace(searched, plan=_beside_mixtures(_tested_with(searched.plan, settings["shuffles"]), mixtures))


def saliency_of(
    run: Run, parameter: LayerParameter, weights: Mapping[str, np.ndarray], windows: WindowRange
) -> np.ndarray:
    """Evidence of each dependency of an operator, Σg²·w² over its channels, ``[O, I]``."""
    evidence = run.evidence(parameter.name, windows)
    # The record may see the tensor otherwise than the operator: a head is one unit here, and its rows are many there.
    recorded = evidence.cells.layout
    grads = recorded.ungrid(np.repeat(evidence.mean_grad_sumsq()[:, :, None], recorded.channels, axis=2))
    squares = grads * np.asarray(weights[parameter.name], np.float64) ** 2
    return np.asarray(parameter.layout.grid(squares).sum(axis=2))


def _chosen_operators(
    found: Sequence[OperatorChain],
    include: Sequence[str] | None,
    kinds: Sequence[str] | None,
    skipped: Mapping[str, str],
    mixtures: Sequence[Mixture],
    conditional: bool = False,
) -> tuple[list[OperatorChain], dict[str, str]]:
    """Operators to plan for, and what is left out with the reason. Parts of a mixture of experts are planned for where they are named."""
    patterns = patterns_of(include)
    already = "".join(f"{mixture.name} is {mixture.said}. " for mixture in mixtures)
    _check_patterns(patterns or (), found, skipped, conditional, already)
    asked = [kinds] if isinstance(kinds, str) else kinds
    unknown = [kind for kind in asked or () if kind not in KINDS]
    if unknown:
        raise ConfigError(f"operators={unknown} must be of {', '.join(KINDS)}.")
    wanted = asked or [kind for kind in KINDS if patterns is not None or kind not in _ON_REQUEST]
    routed = {
        name: f"{part} of {mixture.name}, which is {mixture.said}; include= plans for it"
        for mixture in mixtures
        for name in (*(chain.name for chain in found), *skipped)
        if (part := mixture.part(name)) is not None
    }
    known = [chain.name for chain in found]
    meant = (
        [name for name in known if name not in routed]
        if patterns is None
        else [name for pattern in patterns for name in matching(pattern, known)]
    )
    named = [chain for chain in found if chain.name in meant]
    chosen = [chain for chain in named if chain.kind in wanted]
    if ROUTED in skipped.values() and (patterns is None or not chosen):
        names = listed(name for name, why in skipped.items() if why == ROUTED)
        raise ModelMismatchError(f"{names}: {ROUTED}. For what is dense yet, name it with include=[…].")
    if not chosen:
        names = listed(f"{chain.name or THE_MODEL} ({chain.kind})" for chain in found)
        reasons = listed(f"{name or THE_MODEL}: {why}" for name, why in skipped.items())
        unfit = f"What can't be: {reasons}. " if skipped else ""
        raise ConfigError(
            f"{already}no operator of kind {', '.join(wanted)} to plan for (include={include!r}; found: {names}). {unfit}"
            "A chain is Linear → activation → Linear in one module's forward; where that does more, the activation must be a module."
        )
    unasked = (
        "only feed-forward networks have conditional blocks; this one is {}"
        if conditional
        else "operators= leaves out {}"
        if asked
        else "of kind {}, which blocks are looked for in on request: operators= or include="
    )
    left = {
        chain.name: unasked.format(chain.kind) if chain in named else "include= leaves it out"
        for chain in found
        if chain not in chosen
    }
    planned = {chain.name for chain in chosen}
    return chosen, {**skipped, **left, **{name: why for name, why in routed.items() if name not in planned}}


def _check_patterns(
    patterns: Sequence[str],
    found: Sequence[OperatorChain],
    skipped: Mapping[str, str],
    conditional: bool,
    already: str,
) -> None:
    """Raises `ConfigError` for names and globs that mean no operator, or none that can be planned for; `already` begins its message."""
    names = [chain.name for chain in found]
    matched = {pattern: matching(pattern, names) for pattern in patterns}
    unmatched = [pattern for pattern, those in matched.items() if not those]
    if unmatched:
        dense = {name: skipped[name] for pattern in unmatched for name in matching(pattern, skipped)}
        why = "".join(f"; {name or THE_MODEL}: {reason}" for name, reason in list(dense.items())[:MOST_LISTED])
        raise ConfigError(
            f"{already}include: {', '.join(map(repr, unmatched))} matches no operator{why}; there are: {listed(names, unmatched[0])}."
        )
    if conditional:
        by_name = {chain.name: chain for chain in found}
        of_others = [those for those in matched.values() if all(by_name[name].conditional_reason for name in those)]
        if of_others:
            unfit = [by_name[name] for name in dict.fromkeys(name for those in of_others for name in those)]
            said = listed(f"{chain.name or THE_MODEL} ({chain.kind})" for chain in unfit)
            why = "; ".join(dict.fromkeys(str(chain.conditional_reason) for chain in unfit))
            raise ConfigError(
                f"{already}include: {said} can't be conditional: {why}. Leave it out, or plan structural blocks."
            )


def _tested_with(plan: BlockPlan, controls: int) -> BlockPlan:
    """A plan that says how many shuffles its p-values come from, which is how small they can get."""
    return replace(plan, description={**plan.description, "controls": controls})


def _beside_mixtures(plan: BlockPlan, mixtures: Sequence[Mixture]) -> BlockPlan:
    """A plan that says which parts of the model are routed without it."""
    if not mixtures:
        return plan
    known = {mixture.name: {"experts": mixture.count, "per_token": mixture.per_token} for mixture in mixtures}
    return replace(plan, description={**plan.description, "mixtures": known})


def _unplanned(run: Run) -> dict[str, str]:
    """Modules of a run that no operator holds."""
    held = {parameter.name for chain in run.info.chains for parameter in chain.parameters}
    return {
        parameter.name.rpartition(".")[0]: f"a {parameter.module_type} of no kind that can run as blocks"
        for parameter in run.info.parameters
        if parameter.name not in held and len(parameter.layout.shape) > 1
    }
