"""Support and masks from a run, why a dependency is kept, and what removal costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn

from gradloc.analyze.engines import engine_named
from gradloc.analyze.explain import explain_selection
from gradloc.analyze.requests import SelectionRequest, SupportRequest, chosen_parameters, groups_of
from gradloc.analyze.selection import measure_support, select_masks
from gradloc.analyze.support import COARSER, Support, check_decision
from gradloc.analyze.work import Work
from gradloc.anneal.cost import costs_at_once
from gradloc.core.groups import DependencyGroup, check_decided, n_of_m, residual_groups
from gradloc.core.masks import MaskSet, Null, shareable
from gradloc.core.ports import Progress, WindowRange, told
from gradloc.errors import ConfigError, WeakEvidenceWarning
from gradloc.pipeline.arguments import patterns_of, refuse_without_effect
from gradloc.pipeline.run import Run, as_run, weights_of


def removal_cost(
    run: Run | str | Path,
    model: nn.Module,
    validate: Callable[[], float],
    *,
    support: Support | None = None,
    alphas: Sequence[float] = (0.01, 0.05, 0.2),
    densities: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    null: Literal["zero", "init"] = "zero",
    include: str | Sequence[str] | None = None,
    validations: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much could go, and what that costs at once: the validation loss under masks of both policies and of several densities.

    What training on makes up for is not in it; the `Annealer`'s log is.

    Args:
        run: a run or its path.
        model: the trained model. Its weights are taken away and put back, exactly.
        validate: returns the loss.
        support: from `find_support`; by default it is found, with the same `null` and `include`.
        alphas: error rates, each with both policies.
        densities: shares to keep by saliency.
        null: what is taken away goes to zero, or back to its initial value.
        include: names or globs of parameters.
        validations: calls of `validate` a mask; from 2 on the errors are known.
        progress: called with (done, total) masks.

    Returns:
        One row a mask: ``policy`` (``"conservative"``, ``"aggressive"``, ``"density"``), ``alpha``, ``density``, ``removed`` (share of the
        ``weights`` that were tested), ``loss``, ``increase``, and their errors.

    Raises:
        ConfigError: an argument isn't allowed.
        ModelMismatchError: `model` isn't the one that was recorded.
        NonFiniteError: the loss before anything is taken away isn't finite.
        EmptyRunError: nothing was observed.
    """
    opened = as_run(run)
    asked = [("conservative", a) for a in alphas] + [("aggressive", a) for a in alphas]
    if alphas and support is None:
        support = find_support(opened, null=null, include=include, model=model)

    def candidates() -> Iterator[tuple[dict[str, Any], MaskSet]]:
        for policy, alpha in asked:
            assert support is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", WeakEvidenceWarning)  # what it warns of is what is measured here
                masks = support.masks(alpha, policy)  # type: ignore[arg-type]
            yield {"policy": policy, "alpha": alpha}, masks
        for density in densities:
            masks = find_masks(opened, null=null, density=density, include=include, model=model)
            yield {"policy": "density", "density": density}, masks

    return costs_at_once(model, told(candidates(), len(asked) + len(densities), progress), validate, validations)


def find_support(
    run: Run | str | Path,
    criterion: str = "wald",
    null: Literal["zero", "init"] | Mapping[str, Any] = "zero",
    *,
    calibration: str | None = None,
    samples_per_step: int | None = None,
    combine: Literal["cauchy", "fisher"] = "cauchy",
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
    include: str | Sequence[str] | None = None,
    windows: WindowRange = None,
    model: nn.Module | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> Support:
    """Tests every dependency, and keeps the p-values: decisions at any error rate are then made without reading the run again.

    Args:
        run: a run or its path.
        criterion: ``"wald"``, ``"score"``, ``"drift"``, ``"events"`` or ``"distribution"``; several as ``"wald+score"``.
        null: ``"zero"``: does the network use the dependency; ``"init"``: did training change it; or weights by name, such as
            another checkpoint's: does it differ from those.
        calibration: scale of the p-values; the criterion's own by default (see `gradloc.analyze.criteria`).
        samples_per_step: samples whose mean loss a step follows; for the Wald test's ``calibration="theory"``.
        combine: how p-values of several criteria become one.
        groups: parameters that hold the same dependencies and are tested as one sequence of channels; ``"residual"`` takes the
            residual edges of every feed-forward chain d → c·d → d, with 2c channels.
        include: names or globs of parameters; by default every weight matrix and kernel except embeddings.
        windows: half-open range of windows, for evidence of a part of the training.
        model: takes current weights from it; by default the run's last snapshot.
        engine: ``"ray"`` spreads the work over a Ray cluster, joined or started; the result is the same.
        progress: called with (done, total) pieces of work.

    Returns:
        ``support.table(alpha)``, ``support.masks(alpha, policy, correction)``, ``support.at("row")``, ``support.explain(name, index)``,
        ``support.save(path)``.

    Raises:
        ConfigError: a test that can't be made.
        ModelMismatchError: `model` or the null's weights aren't of the model that was recorded.
        EmptyRunError: nothing was observed, or too few windows for the criterion.
    """
    opened = as_run(run)
    kind, values = _null(null)
    request = SupportRequest(
        criterion,
        kind,
        calibration,
        samples_per_step,
        combine,
        _groups(opened, groups, include, windows),
        patterns_of(include),
        windows,
    )
    return measure_support(_work(opened, request, model, values), progress, engine_named(engine))


def find_masks(
    run: Run | str | Path,
    criterion: str | None = None,
    null: Literal["zero", "init"] | Mapping[str, Any] = "zero",
    policy: Literal["conservative", "aggressive"] | None = None,
    *,
    alpha: float | None = None,
    density: float | None = None,
    budget: int | None = None,
    scope: Literal["global", "layer", "unit"] = "global",
    granularity: str = "dependency",
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
    calibration: str | None = None,
    samples_per_step: int | None = None,
    correction: str | None = None,
    include: str | Sequence[str] | None = None,
    windows: WindowRange = None,
    model: nn.Module | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> MaskSet:
    """Which dependencies stay: at an error rate, a density or a number.

    Args:
        run: a run or its path.
        criterion: with `alpha` as for `find_support`, ``"wald"`` by default; with `density`, `budget` or n:m ``"saliency"`` by
            default, or any of those, or a baseline: ``"magnitude"``, ``"magnitude_increase"``, ``"movement"``, ``"wanda"``, ``"random"``.
        null: ``"zero"``: unsupported dependencies are removed; ``"init"``: reverted to their initial value; weights by name: taken
            back to those.
        policy: with `alpha`, ``"conservative"`` (the default) removes only what an equivalence test shows negligible, ``"aggressive"``
            all that is not supported.
        alpha: error rate; 0.05 if none of `alpha`, `density` and `budget` is given.
        density: instead, the share of weights to keep.
        budget: instead, the number of weights to keep.
        scope: with those, the highest scores of all parameters together, of each layer, or of each out unit.
        granularity: what is decided at once: ``"dependency"`` (a connection with all its channels, such as a kernel's taps),
            ``"element"`` (each weight), ``"tile"`` (16×16), ``"row"``, ``"column"``, ``"unit"`` (a row with its bias and the next weight's
            column), or n:m such as ``"2:4"`` (n of every m consecutive inputs).
        groups: parameters that hold the same dependencies and are decided together; see `find_support`.
        calibration, samples_per_step: with `alpha`, see `find_support`.
        correction: with `alpha`, ``"bh"`` (the default), ``"by"``, ``"storey"``, ``"bonferroni"``, ``"holm"`` or ``"none"``.
        include: names or globs of parameters; by default every weight matrix and kernel except embeddings.
        windows: half-open range of windows.
        model: takes current weights from it; by default the run's last snapshot.
        inputs: norms of each input by parameter name, from `input_norms`; for ``"wanda"``.
        engine: ``"ray"`` spreads the work over a Ray cluster, joined or started; the result is the same.
        progress: called with (done, total) pieces of work.

    Returns:
        Masks by parameter name, True = kept. With `alpha`, a `WeakEvidenceWarning` where the tests can't tell what is not needed from what
        isn't known, which ``masks.description["doubt"]`` keeps; see `gradloc.analyze.support.WEAK_SHARE`.

    Raises:
        ConfigError: a request that isn't allowed; all faults are named.
        ModelMismatchError: `model` isn't the one that was recorded.
        EmptyRunError: nothing was observed.
    """
    opened = as_run(run)
    check_decided(granularity)
    if alpha is None and density is None and budget is None and n_of_m(granularity) is None:
        alpha = 0.05
    tests = {
        "policy": policy,
        "correction": correction,
        "calibration": calibration,
        "samples_per_step": samples_per_step,
    }
    if alpha is None:
        refuse_without_effect(tests, "with density=, budget= or n:m, which rank scores; they belong to alpha=")
        kind, values = _null(null)
        request = SelectionRequest(
            criterion or "saliency", kind, density, budget, scope, granularity, _groups(opened, groups, include, windows), patterns_of(include), windows
        )  # fmt: skip
        return select_masks(_work(opened, request, model, values, inputs), progress, engine_named(engine))
    if density is not None or budget is not None:
        raise ConfigError("give one of alpha=, density= and budget=, not several.")
    ranks = {"scope": None if scope == "global" else scope, "inputs": inputs}
    refuse_without_effect(ranks, "with alpha=, which tests each dependency; they belong to density= and budget=")
    policy, correction = policy or "conservative", correction or "bh"
    check_decision(alpha, correction, policy)
    if granularity not in ("dependency", *COARSER):
        raise ConfigError(
            f"granularity={granularity!r} can't be tested; with alpha= it must be dependency, {', '.join(COARSER)}."
        )
    support = find_support(
        opened, criterion or "wald", null, calibration=calibration, samples_per_step=samples_per_step, groups=groups,
        include=include, windows=windows, model=model, engine=engine, progress=progress,
    )  # fmt: skip
    return support.masks(alpha, policy, correction, granularity)


def explain(
    run: Run | str | Path,
    masks: MaskSet,
    parameter: str,
    index: Sequence[int],
    *,
    model: nn.Module | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    groups: Sequence[DependencyGroup] | Literal["residual"] = (),
) -> dict[str, Any]:
    """Why one dependency was kept or not, in numbers.

    Args:
        run: the run that the masks were found in.
        masks: from `find_masks`, at a density, a number or an error rate.
        parameter, index: an element of a masked parameter.
        model, inputs, groups: as they were given to `find_masks`.

    Returns:
        ``kept``; the ``weight``, its ``null_value``, ``rms_gradient``, ``events`` and ``last_step`` of its cell over ``exposure`` steps. For a
        density ``score``, the ``threshold`` it was held against, and ``smaller_scores``, the share of its parameter's decisions
        below it; where it belongs to two units, those of the unit that decided, and ``decisions`` has both. For an error rate what
        `Support.explain` says.

    Raises:
        UnknownNameError: no mask of that parameter.
        ConfigError: no such element, or masks of another run, or not from `find_masks`.
    """
    opened = as_run(run)
    asked = masks.description
    if asked.get("run_id") != opened.info.run_id or "criterion" not in asked:
        raise ConfigError(
            f"these masks come from run {asked.get('run_id')!r}, not from {opened.info.run_id!r}; name their run."
        )
    windows = asked.get("windows")
    values = masks.null_values if masks.null == "given" else None
    windows = None if windows is None else tuple(windows)
    chosen = {"windows": windows, "groups": _groups(opened, groups, tuple(masks), windows)}
    if "alpha" in asked:
        settings = {name: asked[name] for name in ("calibration", "samples_per_step", "combine") if name in asked}
        tested = SupportRequest(asked["criterion"], masks.null, include=tuple(masks), **settings, **chosen)
        support = measure_support(_work(opened, tested, model, values))
        support = support.at(asked["granularity"]) if "granularity" in asked else support
        found = support.explain(parameter, index, asked["alpha"], asked["correction"])
        return {"kept": bool(masks.array(parameter)[tuple(index)]), "policy": asked["policy"]} | found
    settings = {name: asked[name] for name in ("density", "budget", "scope", "granularity") if name in asked}
    request = SelectionRequest(asked["criterion"], masks.null, include=tuple(masks), **settings, **chosen)
    return explain_selection(_work(opened, request, model, values, inputs), masks, parameter, index)


def _null(null: str | Mapping[str, Any]) -> tuple[Null, dict[str, np.ndarray] | None]:
    """The null's name, and its weights where they were given."""
    if not isinstance(null, Mapping):
        return null, None  # type: ignore[return-value]  # checked by the request
    return "given", {name: shareable(values) for name, values in null.items()}


def _groups(
    run: Run, groups: Sequence[DependencyGroup] | str, include: str | Sequence[str] | None, windows: WindowRange
) -> tuple[DependencyGroup, ...]:
    """The groups that were given, or the residual edges of what was chosen."""
    if not isinstance(groups, str):
        return tuple(groups)
    if groups != "residual":
        raise ConfigError(f"groups={groups!r} must be 'residual' or DependencyGroups.")
    chosen = {parameter.name for parameter in chosen_parameters(run.store, patterns_of(include), windows)}
    found = tuple(group for group in residual_groups(run.info.chains) if chosen.issuperset(group.members))
    if not found:
        raise ConfigError(
            "groups='residual': of no chain d → c·d → d both weights were chosen and had a gradient; change include=, or leave groups= out."
        )
    return found


def _work(
    run: Run,
    request: SupportRequest | SelectionRequest,
    model: nn.Module | None,
    null_values: Mapping[str, np.ndarray] | None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> Work:
    """What is asked, of all groups that it is about."""
    weights = None if model is None else weights_of(model)
    return Work(run.store, request, tuple(groups_of(run.store, request)), weights, null_values, inputs)
