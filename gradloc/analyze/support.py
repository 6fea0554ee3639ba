"""Tests of every dependency, kept with their p-values, so that decisions can change without reading the run again.

Shape letters: `O` out units, `I` in units, `C` channels; `R`, `K` rows and columns of cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradloc.analyze.combine import combined, from_tangent, tangent
from gradloc.analyze.correction import decision_faults, rejected
from gradloc.analyze.criteria import Criterion, find_criterion
from gradloc.analyze.nulls import against_normal, against_sample, check_calibration, empirical_scale
from gradloc.analyze.subject import Subject
from gradloc.core.artifact import load_artifact, reading_artifact, save_artifact
from gradloc.core.groups import Decisions, DependencyGroup, unit_groups
from gradloc.core.layout import CellGrid, DependencyLayout
from gradloc.core.masks import MaskSet, Null
from gradloc.core.names import listed, meant
from gradloc.core.plan import OperatorChain
from gradloc.core.run_info import ParameterInfo
from gradloc.errors import ConfigError, UnknownNameError, WeakEvidenceWarning

Floats = NDArray[np.float64]
Policy = Literal["conservative", "aggressive"]
POLICIES: tuple[str, ...] = get_args(Policy)
SUPPORTED, UNDECIDED, UNSUPPORTED = 1, 0, -1
_OUTCOMES = {UNSUPPORTED: "unsupported", UNDECIDED: "undecided", SUPPORTED: "supported"}
"""From the one that masks take back first."""
COARSER = ("tile", "row", "column", "unit")
_SAVED = ("difference", "equivalence", "statistic")
WEAK_SHARE = 0.1
"""Share of a parameter's evidence (its squared statistics) from which on masks that take it back are warned of.

What is negligible one by one is not so together. To second order what is lost is the sum of squared Wald statistics, and where
training leaves evidence spread over a whole tensor, the empirical null takes its bulk for noise. Measured on 120 masks
(both policies at alpha .05, two seeds, AdamW): students of sparse and of grouped teachers, two-layer students, an MLP and an MLP-Mixer
on digits, trained for 45 to 1,500 steps of which 45 to all were observed. Of what training had
learned, the 41 masks below this share lost at most .083 (all but one at most .017), the 79 above it .066 to everything. The number of observed steps tells
little: the MLP trained for 1,600 steps fell from .98 to .66 and .87 by 44 observed ones, and to .71 and .86 by all of them.
"""


@dataclass(frozen=True)
class DependencyTests:
    """The tests of one parameter, or of several that hold the same dependencies.

    Args:
        members: the cells of each parameter; where there are several, each through the layout that the tests were made with.
        difference, equivalence: p-values of each dependency ``[O, I]``, or of each cell ``[R, K]``.
        statistic: what they were read from, same shape: the size over channels in null standard deviations.
    """

    members: Mapping[str, CellGrid]
    difference: Floats
    equivalence: Floats
    statistic: Floats

    def spread(self, values: NDArray[Any], member: str | None = None) -> NDArray[Any]:
        """Values per hypothesis in a member's shape; of the only one by default."""
        return self.members[member or next(iter(self.members))].spread(values)

    def share_taken(self, kept: NDArray[np.bool_], member: str) -> float:
        """Share of a member's evidence, its squared statistics, in what isn't kept; 0 where it has none."""
        squares = np.nan_to_num(self.spread(self.statistic**2, member), posinf=0.0)
        whole = float(squares.sum())
        return float(squares[~kept].sum()) / whole if whole else 0.0

    @property
    def values(self) -> tuple[Floats, Floats, Floats]:
        """`difference`, `equivalence` and `statistic`."""
        return self.difference, self.equivalence, self.statistic


class Support:
    """Which dependencies training supported, with error rates: the p-values of every hypothesis, and what was asked.

    Args:
        tests: by the name of the parameter or group.
        null: what an unsupported dependency goes back to.
        null_values: unless the null is zero, the values by parameter name.
        description: criteria, calibration and run.
        chains: linear operators that feed one another; `at` needs them for units.
    """

    def __init__(
        self,
        tests: Mapping[str, DependencyTests],
        null: Null,
        null_values: Mapping[str, NDArray[Any]],
        description: Mapping[str, Any],
        chains: Sequence[OperatorChain] = (),
    ) -> None:
        self.tests, self.chains = dict(tests), tuple(chains)
        self.null: Null = null
        self.null_values = dict(null_values)
        self.description = dict(description)

    def outcomes(self, alpha: float = 0.05, correction: str = "bh") -> dict[str, NDArray[np.int8]]:
        """1 supported, -1 unsupported, 0 undecided, per hypothesis.

        *Supported*: the null is rejected. *Unsupported*: an equivalence test shows the effect negligible. Both are corrected over
        all hypotheses of all parameters.

        Raises:
            ConfigError: alpha outside (0, 1), or no such correction.
        """
        supported = rejected(np.concatenate([t.difference.ravel() for t in self.tests.values()]), alpha, correction)
        negligible = rejected(np.concatenate([t.equivalence.ravel() for t in self.tests.values()]), alpha, correction)
        pooled = np.where(supported, SUPPORTED, np.where(negligible, UNSUPPORTED, UNDECIDED)).astype(np.int8)
        return split_like(pooled, {name: test.difference for name, test in self.tests.items()})

    def table(self, alpha: float = 0.05, correction: str = "bh") -> pd.DataFrame:
        """Shares of ``supported``, ``unsupported`` and ``undecided`` hypotheses per parameter, and their number."""
        outcomes = self.outcomes(alpha, correction)
        return pd.DataFrame([{"parameter": name} | _shares(found) for name, found in outcomes.items()])

    def masks(
        self,
        alpha: float = 0.05,
        policy: Policy = "conservative",
        correction: str = "bh",
        granularity: str = "dependency",
    ) -> MaskSet:
        """What stays: ``conservative`` takes back only the unsupported, ``aggressive`` all that is not supported.

        Where a parameter loses `WEAK_SHARE` of its evidence or more, "no evidence" doesn't mean "not needed": a `WeakEvidenceWarning` says so,
        and ``description["doubt"]`` keeps it for the report.

        Args:
            alpha, correction: of the decisions.
            policy: what becomes of the undecided.
            granularity: decide as `at` does.

        Raises:
            ConfigError: a setting isn't allowed.
        """
        check_decision(alpha, correction, policy)
        if granularity != "dependency":
            return self.at(granularity).masks(alpha, policy, correction)
        keep: dict[str, NDArray[np.bool_]] = {}
        counts: dict[str, Any] = {}
        for name, found in self.outcomes(alpha, correction).items():
            kept = found != UNSUPPORTED if policy == "conservative" else found == SUPPORTED
            for member in self.tests[name].members:
                mask = np.asarray(self.tests[name].spread(kept, member), np.bool_)
                keep[member] = keep[member] & mask if member in keep else mask
                counts[member] = {"kept": float(keep[member].mean())} | _shares(found)
        for test in self.tests.values():
            for member in test.members:
                taken = max(test.share_taken(keep[member], member), counts[member].get("evidence_taken", 0.0))
                counts[member]["evidence_taken"] = taken
        description = self.description | {"alpha": alpha, "policy": policy, "correction": correction}
        description["parameters"] = counts
        if doubt := self._doubt(counts):
            description["doubt"] = doubt
            warnings.warn(f"gradloc: {doubt}.", WeakEvidenceWarning, stacklevel=2)
        return MaskSet(keep, null=self.null, null_values=self.null_values, description=description)

    def _doubt(self, counts: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why masks may take away what is needed, in a sentence."""
        if any(
            find_criterion(name.strip()).one_sided for name in str(self.description.get("criterion", "")).split("+")
        ):
            return None  # squares of one-sided statistics measure nothing
        weak = {name: float(count["evidence_taken"]) for name, count in counts.items()}
        weak = {name: share for name, share in weak.items() if share >= WEAK_SHARE}
        if not weak:
            return None
        worst = max(weak, key=lambda name: weak[name])
        return (
            f"what these masks take back is not negligible together: it holds {weak[worst]:.0%} of the evidence in {worst}, "
            f"and {WEAK_SHARE:.0%} or more in {len(weak)} of {len(counts)} parameters. There, no evidence does not mean not needed. "
            "Measure the loss before you rely on them (gradloc.removal_cost, or an Annealer with validate=), or keep more with density="
        )

    def at(self, granularity: str) -> Support:
        """The same evidence about coarser hypotheses: a whole tile, row, column or unit.

        *Difference* is the Cauchy combination over all that is decided at once, which holds under any dependence between them: a
        row is supported if some of its dependencies are. *Equivalence* is the largest p-value: a row is unsupported only if all
        of them are.

        Args:
            granularity: ``"tile"``, ``"row"``, ``"column"`` or ``"unit"``. A unit is a row with its bias and, in a chain, the next
                weight's column, as far as those were tested.

        Raises:
            ConfigError: another granularity, or no unit that can go.
        """
        if granularity not in COARSER:
            raise ConfigError(f"granularity={granularity!r} of tests must be dependency, {', '.join(COARSER)}.")
        coarse = self._units() if granularity == "unit" else self._cells(granularity)
        description = self.description | {"granularity": granularity}
        return Support(coarse, self.null, self.null_values, description, self.chains)

    def _cells(self, granularity: str) -> dict[str, DependencyTests]:
        found = {}
        for name, test in self.tests.items():
            layouts = {member: cells.layout for member, cells in test.members.items()}
            decisions = Decisions(DependencyGroup(name, layouts), granularity)
            first = next(iter(test.members.values()))
            difference, equivalence, statistic = map(first.per_dependency, test.values)
            found[name] = DependencyTests(
                {member: CellGrid(layout, granularity) for member, layout in layouts.items()},  # type: ignore[arg-type]
                from_tangent(decisions.mean(tangent(difference, decisions.together())[:, :, None])),
                decisions.maximum(equivalence),
                np.sqrt(decisions.mean(statistic[:, :, None] ** 2)),
            )
        return found

    def _units(self) -> dict[str, DependencyTests]:
        owner = {member: test for test in self.tests.values() for member in test.members}
        tested = [ParameterInfo(name, test.members[name].layout, "", "") for name, test in owner.items()]
        found = {}
        for group in unit_groups(tested, tested, self.chains):
            difference, equivalence, statistic = (
                group.gather(
                    {member: owner[member].spread(owner[member].values[which], member) for member in group.members}
                )
                for which in range(3)
            )
            found[group.name] = DependencyTests(
                {member: CellGrid(layout, "element") for member, layout in group.members.items()},
                combined(difference, "cauchy", axis=2),
                equivalence.max(axis=2),
                np.sqrt((statistic**2).mean(axis=2)),
            )
        return found

    def explain(self, name: str, index: Sequence[int], alpha: float = 0.05, correction: str = "bh") -> dict[str, Any]:
        """Why one dependency is supported or not, in numbers.

        Args:
            name: the parameter.
            index: of an element of it.
            alpha, correction: the decision that is explained.

        Returns:
            Its ``outcome`` and the numbers behind it. What belongs to two units, such as a weight between two hidden layers, has the
            outcome of the less supported one, as masks do; ``tests`` has the numbers of each.

        Raises:
            UnknownNameError: the parameter wasn't tested.
            ConfigError: no such element.
        """
        tests = {key: test for key, test in self.tests.items() if name in test.members}
        if not tests:
            tested = dict.fromkeys(member for other in self.tests.values() for member in other.members)
            raise UnknownNameError(f"{name!r} was not tested; tested: {listed(tested, name)}")
        place, shape = tuple(index), next(iter(tests.values())).members[name].layout.shape
        if len(place) != len(shape) or not all(0 <= i < n for i, n in zip(place, shape, strict=True)):
            raise ConfigError(f"index={place} is no element of {name}, whose shape is {shape}.")
        outcomes = self.outcomes(alpha, correction)
        everyone = np.concatenate([other.difference.ravel() for other in self.tests.values()])
        told: list[dict[str, Any]] = []
        for key, test in tests.items():
            p = float(test.spread(test.difference, name)[place])
            told.append(
                {
                    "decided_with": [member for member in test.members if member != name],
                    "outcome": _OUTCOMES[int(test.spread(outcomes[key], name)[place])],
                    "statistic": float(test.spread(test.statistic, name)[place]),
                    "p_difference": p,
                    "p_equivalence": float(test.spread(test.equivalence, name)[place]),
                    "smaller_p": float((everyone < p).mean()),
                }
            )
        # A mask keeps what all of its units keep.
        worst = list(_OUTCOMES.values())
        decisive = min(told, key=lambda one: (worst.index(one["outcome"]), -one["p_difference"]))
        return {
            "parameter": name,
            "index": list(place),
            **decisive,
            "hypotheses": everyone.size,
            "alpha": alpha,
            "correction": correction,
            "tests": told,
        }

    def save(self, path: str | Path) -> Path:
        """Writes all p-values as safetensors.

        Raises:
            StoreError: the path can't be written.
        """
        arrays: dict[str, NDArray[Any]] = {f"null:{name}": values for name, values in self.null_values.items()}
        tests: dict[str, Any] = {}
        for name, test in self.tests.items():
            arrays |= {f"{what}:{name}": values for what, values in zip(_SAVED, test.values, strict=True)}
            tests[name] = {
                member: {"layout": cells.layout.to_dict(), "granularity": cells.granularity}
                for member, cells in test.members.items()
            }
        chains = [chain.to_dict() for chain in self.chains]
        header = {"null": self.null, "description": self.description, "tests": tests, "chains": chains}
        return save_artifact(path, "support", arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> Support:
        """Reads what `save` wrote.

        Raises:
            StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
        """
        arrays, header = load_artifact(path, "support")
        with reading_artifact(path, "support"):
            tests = {
                name: DependencyTests(
                    {
                        member: CellGrid(DependencyLayout.from_dict(saved["layout"]), saved["granularity"])
                        for member, saved in members.items()
                    },
                    *(arrays[f"{what}:{name}"] for what in _SAVED),
                )
                for name, members in header["tests"].items()
            }
            nulls = {name[5:]: values for name, values in arrays.items() if name.startswith("null:")}
            chains = [OperatorChain.from_dict(chain) for chain in header["chains"]]
            return cls(tests, header["null"], nulls, header["description"], chains)

    def __repr__(self) -> str:
        hypotheses = sum(test.difference.size for test in self.tests.values())
        return f"Support({len(self.tests)} tensors, {hypotheses} hypotheses, null={self.null!r})"


def _shares(outcomes: NDArray[np.int8]) -> dict[str, Any]:
    """How many hypotheses, and the share of each outcome."""
    shares = {what: float((outcomes == one).mean()) for one, what in _OUTCOMES.items()}
    return {"hypotheses": outcomes.size} | {what: shares[what] for what in ("supported", "unsupported", "undecided")}


def split_like(pooled: NDArray[Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Values of all `arrays` one after another ``[N]``, by name and in each one's shape."""
    bounds = np.cumsum([array.size for array in arrays.values()])[:-1]
    parts = np.split(pooled, bounds)
    return {name: part.reshape(array.shape) for part, (name, array) in zip(parts, arrays.items(), strict=True)}


def split_names(criterion: str) -> list[Criterion]:
    """The criteria of ``"wald+score"``; all must have p-values.

    Raises:
        ConfigError: one isn't known, or is a baseline.
    """
    found = [find_criterion(name.strip()) for name in criterion.split("+")]
    twice = sorted({one.name for one in found if found.count(one) > 1})
    if twice:
        raise ConfigError(f"criterion={criterion!r} names {', '.join(twice)} twice.")
    for one in found:
        if one.statistic is None:
            raise ConfigError(f"criterion={one.name!r} has no p-values; use density=, or criterion='wald' with alpha=.")
    return found


def check_decision(alpha: float, correction: str, policy: str) -> None:
    """Raises `ConfigError` naming every setting of a decision that isn't allowed."""
    faults = decision_faults(alpha, correction)
    if policy not in POLICIES:
        faults.append(f"policy={policy!r} must be one of {', '.join(POLICIES)}{meant(policy, POLICIES)}")
    if faults:
        raise ConfigError("masks: " + "; ".join(faults) + ".")


def check_test(criterion: str, null: str, calibration: str | None, samples_per_step: int | None) -> None:
    """Raises `ConfigError` for a test that can't be made, before anything is read."""
    if samples_per_step is not None and not (
        isinstance(samples_per_step, Real) and not isinstance(samples_per_step, bool) and 1 <= samples_per_step < np.inf
    ):
        raise ConfigError(f"samples_per_step must be a number of samples, at least 1; got {samples_per_step!r}.")
    for one in split_names(criterion):
        if null not in one.nulls:
            raise ConfigError(f"criterion={one.name!r} tests null={' or '.join(map(repr, one.nulls))}, not {null!r}.")
        chosen = calibration or one.calibrations[0]
        check_calibration(chosen, one.calibrations, one.name)
        if one.needs_samples and chosen == "theory" and samples_per_step is None:
            raise ConfigError(
                f"calibration='theory' of criterion={one.name!r} needs samples_per_step=, the number of samples whose mean loss a step "
                "follows, at least 1."
            )


def tests_of(
    subject: Subject, criterion: str, calibration: str | None, samples_per_step: int | None, combine: str
) -> DependencyTests:
    """Tests one parameter by one criterion, or by several whose p-values are combined."""
    found = [_tested(subject, one, calibration, samples_per_step) for one in split_names(criterion)]
    if len(found) == 1:
        return found[0]

    def all_of(what: Callable[[DependencyTests], Floats]) -> Floats:
        return np.stack([subject.cells.per_dependency(values) for values in map(what, found)])

    return DependencyTests(
        {subject.name: subject.cells},
        combined(all_of(lambda test: test.difference), combine),
        # Negligible means so by every criterion.
        all_of(lambda test: test.equivalence).max(axis=0),
        all_of(lambda test: np.abs(test.statistic)).max(axis=0),
    )


def standardised(subject: Subject, criterion: str, calibration: str | None, samples_per_step: int | None) -> Floats:
    """A parameter's statistic in null standard deviations, in the parameter's shape; NaN where the scale isn't known.

    Raises:
        ConfigError: a criterion or calibration that has no such statistic.
    """
    criteria = split_names(criterion)
    chosen = calibration or criteria[0].calibrations[0]
    if len(criteria) > 1 or criteria[0].one_sided or chosen == "init":
        raise ConfigError(
            f"groups: criterion={criterion!r} with calibration={chosen!r} has no statistic that could be added over several "
            "parameters; use one of wald, score and drift, and not calibration='init'."
        )
    statistic, scale = _scaled(subject, criteria[0], chosen, samples_per_step)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(statistic == 0, np.where(np.isnan(scale), np.nan, 0.0), statistic / scale)
    layout = subject.layout
    if z.shape[:2] == (layout.out_units, layout.in_units) and z.shape[2] == layout.channels:
        return np.asarray(layout.ungrid(z))
    return np.asarray(subject.cells.spread(z[:, :, 0]))


def joint_tests(group: DependencyGroup, standard: Mapping[str, Floats]) -> DependencyTests:
    r"""Tests dependencies whose channels lie in several parameters, $\sum_c z_c^2 \sim \chi^2_C$, from `standardised` statistics.

    A member whose scale isn't known, such as a short bias, has no say in what is supported; and nothing is negligible of which that isn't
    known.
    """
    members = {member: CellGrid(layout, "element") for member, layout in group.members.items()}
    known = {member: layout for member, layout in group.members.items() if not np.isnan(standard[member]).any()}
    if not known:
        return _nothing_claimed(members, group.grid_shape)
    z = DependencyGroup(group.name, known).gather(standard)
    difference, equivalence = against_normal(z, 1.0)
    if len(known) < len(members):
        equivalence = np.ones_like(equivalence)
    return DependencyTests(members, difference, equivalence, np.sqrt((z**2).mean(axis=2)))


def _nothing_claimed(members: Mapping[str, CellGrid], shape: tuple[int, ...]) -> DependencyTests:
    return DependencyTests(members, np.ones(shape), np.ones(shape), np.full(shape, np.nan))


def _scaled(
    subject: Subject, criterion: Criterion, calibration: str, samples_per_step: int | None
) -> tuple[Floats, Floats | float]:
    """A criterion's statistic, and its standard deviation under the null."""
    assert criterion.statistic is not None
    if calibration == "phantom":
        assert criterion.phantom is not None
        return criterion.phantom(subject), 1.0
    statistic = criterion.statistic(subject)
    if calibration == "init":
        return statistic, float(np.sqrt(np.mean(_initial_statistics(subject) ** 2)))
    if calibration == "empirical":
        return statistic, empirical_scale(statistic)
    return statistic, 1.0 / samples_per_step if criterion.needs_samples and samples_per_step else 1.0


def _tested(
    subject: Subject, criterion: Criterion, calibration: str | None, samples_per_step: int | None
) -> DependencyTests:
    chosen = calibration or criterion.calibrations[0]
    statistic, scale = _scaled(subject, criterion, chosen, samples_per_step)
    members = {subject.name: subject.cells}
    if np.isnan(scale).any():  # too few to know their bulk
        return _nothing_claimed(members, statistic.shape[:2])
    difference, equivalence = against_normal(statistic, scale, criterion.one_sided)
    if chosen == "init":
        difference = against_sample(statistic, _initial_statistics(subject))
    size = statistic / scale if np.any(scale) else statistic
    shown = np.sqrt((size**2).mean(axis=2)) if size.shape[2] > 1 else size[:, :, 0]
    return DependencyTests(members, difference, equivalence, shown)


def _initial_statistics(subject: Subject) -> Floats:
    """Wald statistics of weights that are fresh draws of the initial values, with the information where it is, ``[O·I, C]``."""
    start = subject.started("calibration='init'")
    drawn = np.random.default_rng(0).permutation(start.ravel()).reshape(start.shape)
    statistic = (drawn - subject.grid(subject.null_value)) * np.sqrt(subject.information)
    return np.asarray(statistic.reshape(-1, statistic.shape[2]))
