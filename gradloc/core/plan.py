"""How a network runs as blocks: which units belong together, and what picks them.

Shape letters: `U` units of one layer, `B` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradloc.core.artifact import load_artifact, reading_artifact, save_artifact
from gradloc.core.masks import MaskSet
from gradloc.core.names import counted
from gradloc.core.operators import OperatorChain, memberships
from gradloc.core.router import RouterKind, RouterWeights
from gradloc.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["structural", "conditional"]
Verdict = Literal["natural", "inducible", "none"]
Selection = Literal["top", "threshold"]
ANNEALED = "annealed"
"""In a plan's description."""
ISOLATED = -1
"""Label of a unit that belongs to no block."""
HUB = -2
"""Label of a unit that belongs to every block: of an end of an operator, or of a hidden unit that runs for every token."""
Labels = NDArray[np.int64]
"""Block of each unit of a layer, ``[U]``; or, where blocks overlap, which units belong to which, bool ``[B, U]``."""
AS_FAST = 0.05
"""Within this share of dense's speed, a median of timings says neither faster nor slower."""


@dataclass(frozen=True)
class ChainPlan:
    """The blocks of one operator or chain of them.

    Args:
        chain: what it is, and where.
        labels: block of each unit, one array ``[U]`` per unit layer (input, hidden …, output). Hidden units with the label `ISOLATED` are
            removed; a plan of one block is plain removal of units. Conditional plans label the hidden units; their inputs and outputs belong to every block (`HUB`). At the ends of a structural plan units may
            be in every block as well, or in several, with memberships ``[B, U]`` in place of labels.
        blocks: number of blocks `B`.
        active: blocks that run per token (conditional); None for structural.
        router_kind: the router to train (conditional).
        selection: ``"top"``: every token runs `active` blocks; ``"threshold"``: it runs those that score high enough, `active` of
            them on average (conditional).
        weighted: whether blocks that run count by their score, instead of once (conditional); see `RouterWeights`.
        router: picks the blocks (conditional, after training); None before.
        statistics: what the choice rests on, e.g. ``kept``, ``chance``, ``excess``, ``p_value``.
    """

    chain: OperatorChain
    labels: tuple[Labels, ...]
    blocks: int
    active: int | None = None
    router_kind: RouterKind = "linear"
    selection: Selection = "top"
    weighted: bool = False
    router: RouterWeights | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = tuple(labels.shape[-1] for labels in self.labels)
        if widths != self.chain.widths:
            raise ConfigError(
                f"chain {self.chain.name!r}: labels for {widths} units, the chain has {self.chain.widths}."
            )
        for labels in self.labels:
            if labels.ndim == 2 and labels.shape[0] != self.blocks:
                raise ConfigError(
                    f"chain {self.chain.name!r}: memberships of {labels.shape[0]} blocks, the plan has {self.blocks}."
                )
        worst = max(int(labels.max(initial=ISOLATED)) for labels in self.labels)
        if worst >= self.blocks:
            raise ConfigError(f"chain {self.chain.name!r}: label {worst} is out of range for {self.blocks} blocks.")
        if self.active is not None and not 1 <= self.active <= self.blocks:
            raise ConfigError(
                f"chain {self.chain.name!r}: active={self.active} must be between 1 and blocks={self.blocks}."
            )
        if self.router is not None and self.router.weighted != self.weighted:
            raise ConfigError(
                f"chain {self.chain.name!r}: weighted={self.weighted}, but its router has {self.router.weighted}."
            )
        if not self.conditional:
            self._check_overlap()
            return
        if (self.labels[1] == ISOLATED).any():
            raise ConfigError(
                f"chain {self.chain.name!r}: conditional blocks can't leave a hidden unit isolated; give it a block or the hub."
            )
        if self.router is not None and (self.router.blocks, self.router.width) != (self.blocks, self.chain.widths[0]):
            raise ConfigError(
                f"chain {self.chain.name!r}: a router from {self.router.width} inputs to {self.router.blocks} blocks; the chain has "
                f"{self.chain.widths[0]}, the plan {self.blocks}."
            )

    def _check_overlap(self) -> None:
        """Every dependency of a structural plan is in one block at most, and hidden units are, too."""
        plain = [labels.ndim == 1 and not (labels == HUB).any() for labels in self.labels]
        torn = [layer for layer in self.chain.inner_layers if not plain[layer]]
        if torn:
            raise ConfigError(
                f"chain {self.chain.name!r}: units of layer {torn[0]} are made and read by its blocks, so they can belong to one "
                "block only; give one label per unit, not the hub."
            )
        for parameter, (into, out) in zip(self.chain.matrices, self.chain.edges, strict=True):
            if not (plain[into] or plain[out]) and int(self._covered(into, out).max(initial=0)) > 1:
                raise ConfigError(
                    f"chain {self.chain.name!r}: blocks share dependencies of {parameter.name}, which would be counted twice; "
                    "let blocks overlap at its inputs or at its outputs, not at both."
                )

    @property
    def conditional(self) -> bool:
        return self.active is not None

    @property
    def hub_block(self) -> bool:
        """Whether the last block of a plan that overlaps is its hub: the only one that reads and writes every unit of the ends that may overlap."""
        ends = [labels for labels in self.labels if labels.ndim == 2]
        return bool(ends) and all(bool(held[-1].all()) and not held.all() for held in ends)

    @property
    def density(self) -> float:
        """Share of the operator's weights that are inside blocks."""
        kept = whole = 0
        for parameter, (into, out) in zip(self.chain.matrices, self.chain.edges, strict=True):
            # But for those between two hubs a dependency is in one block at most, so that blocks are counted without a mask.
            inputs, outputs = (memberships(self.labels[layer], self.blocks, HUB).sum(1) for layer in (into, out))
            hubs = prod(int((self.labels[layer] == HUB).sum()) for layer in (into, out))
            kept += (int(inputs @ outputs) - (self.blocks - 1) * hubs) * parameter.layout.channels
            whole += prod(parameter.layout.shape)
        return kept / whole

    def members(self, layer: int) -> list[NDArray[np.int64]]:
        """Units of each block at a layer, ascending; `B` arrays."""
        return [np.flatnonzero(row) for row in memberships(self.labels[layer], self.blocks, HUB)]

    def _covered(self, into: int, out: int) -> NDArray[np.float32]:
        """In how many blocks each pair of units is, ``[O, I]``."""
        inputs, outputs = (
            memberships(self.labels[layer], self.blocks, HUB).astype(np.float32) for layer in (into, out)
        )
        return np.asarray(outputs.T @ inputs)

    def operator_mask(self, index: int) -> NDArray[np.bool_]:
        """Kept dependencies ``[O, I]`` of matrix `index` of a structural plan: both ends in one block."""
        into, out = self.chain.edges[index]
        inputs, outputs = self.labels[into], self.labels[out]
        if inputs.ndim == outputs.ndim == 1 and not (inputs == HUB).any() and not (outputs == HUB).any():
            return np.asarray((outputs[:, None] == inputs[None, :]) & (outputs[:, None] >= 0))
        return np.asarray(self._covered(into, out) > 0)

    def parameter_mask(self, index: int) -> NDArray[np.bool_]:
        """The same in the shape of the matrix's tensor."""
        layout, kept = self.chain.matrices[index].layout, self.operator_mask(index)
        return layout.ungrid(np.repeat(kept[:, :, None], layout.channels, axis=2))


@dataclass(frozen=True, repr=False)
class BlockPlan:
    """How a model runs as blocks, with the verdict that goes with it.

    ``structural`` blocks are the same for every input; ``conditional`` ones are picked per token by a router.
    ``verdict`` is about static structure: ``"natural"`` (already splits), ``"inducible"`` (evidence above chance, at a cost
    that annealing shows) or ``"none"``. For conditional plans it speaks of co-firing in the same three words.

    Examples:
        >>> chain = OperatorChain("ffn", ("up", "down"), ("relu",), (2, 2, 2))
        >>> half = np.array([0, 1])
        >>> plan = BlockPlan("structural", (ChainPlan(chain, (half, half, half), blocks=2),), "inducible")
        >>> plan.masks.density
        0.5
    """

    kind: Kind
    chains: tuple[ChainPlan, ...]
    verdict: Verdict
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def annealed(self) -> bool:
        """Whether a stage took to zero what lies outside of static blocks, so that a model which has it again isn't the one that was annealed."""
        return bool(self.description.get(ANNEALED, False))

    def with_annealed(self, annealed: bool) -> BlockPlan:
        """The plan, saying so."""
        return replace(self, description={**self.description, ANNEALED: annealed})

    def check(self) -> None:
        """Raises `ConfigError` if there is no operator in it, or one is in two chains: what is done with one would undo the other's."""
        if not self.chains:
            raise ConfigError("the plan has no chain; see plan.description for what was skipped.")
        names = [name for planned in self.chains for name in planned.chain.operators]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"the plan has {', '.join(twice)} in two chains; leave one of them out.")

    def __repr__(self) -> str:
        operators = counted(len(self.chains), "operator")
        counts = sorted({chain.blocks - chain.hub_block for chain in self.chains})
        least_and_most = "–".join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))
        blocks = f", {least_and_most} block{'s' * (counts != [1])}" if counts else ""
        slower = f", {len(self.slower)} of them slower than dense" if self.slower else ""
        return f"BlockPlan({self.kind}, {operators}{blocks}{slower}, verdict={self.verdict!r})"

    @property
    def slower(self) -> dict[str, float]:
        """Operators whose blocks, or fewer units, a search measured to be slower than dense; with their share of dense's speed."""
        speeds = {planned.chain.name: planned.statistics.get("speedup", 1.0) for planned in self.chains}
        return {name: speed for name, speed in speeds.items() if speed < 1 - AS_FAST}

    @property
    def running(self) -> str:
        """How many blocks of a conditional plan run for a token, in words: ``"4 of 16"``, or ``"2 to 4 of 16"`` over its chains."""
        counts: dict[int, list[int]] = {}
        for chain in self.chains:
            counts.setdefault(chain.blocks, []).append(chain.active or chain.blocks)
        ranges = ((blocks, min(run), max(run)) for blocks, run in counts.items())
        return ", ".join(
            f"{low} of {blocks}" if low == high else f"{low} to {high} of {blocks}" for blocks, low, high in ranges
        )

    def labels(self, parameter: str) -> tuple[Labels, Labels]:
        """``(out_labels, in_labels)`` of a weight: the block of each unit, -1 isolated, -2 in every block; or memberships
        ``[B, U]`` where blocks overlap.

        Raises:
            UnknownNameError: the plan doesn't cover that parameter.
        """
        for chain in self.chains:
            if parameter in chain.chain.weights:
                into, out = chain.chain.edges[chain.chain.weights.index(parameter)]
                return chain.labels[out], chain.labels[into]
        covered = [name for chain in self.chains for name in chain.chain.weights]
        raise UnknownNameError(
            f"the plan has no blocks for {parameter!r}; it covers: {', '.join(covered) or 'nothing'}"
        )

    @property
    def masks(self) -> MaskSet:
        """A structural plan as masks: True inside a block.

        Raises:
            ConfigError: the plan is conditional, whose blocks differ by token.
        """
        if self.kind == "conditional":
            raise ConfigError("a conditional plan has no masks: every weight is kept, and a router picks per token.")
        return MaskSet(
            {
                name: chain.parameter_mask(index)
                for chain in self.chains
                for index, name in enumerate(chain.chain.weights)
            },
            description={"from": "structural block plan"},
        )

    def tied_ends(self, chain: str) -> bool:
        """Whether an operator's inputs and outputs are the same units, and share their blocks."""
        forms = self.description.get("forms", {})
        return bool(forms.get(chain, self.description.get("form")) == "disjoint")

    def with_routers(self, routers: Mapping[str, RouterWeights]) -> BlockPlan:
        """The same plan with the routers that were trained for it, by chain name."""
        return replace(self, chains=tuple(replace(c, router=routers[c.chain.name]) for c in self.chains))

    def save(self, path: str | Path) -> Path:
        """Writes the plan as one safetensors file.

        Raises:
            StoreError: the path can't be written.
        """
        arrays: dict[str, NDArray[Any]] = {}
        described = []
        for number, chain in enumerate(self.chains):
            arrays |= {f"{number}:labels:{layer}": labels for layer, labels in enumerate(chain.labels)}
            if chain.router is not None:
                arrays |= {f"{number}:router:{name}": array for name, array in chain.router.arrays().items()}
            described.append(
                {
                    "chain": chain.chain.to_dict(),
                    "blocks": chain.blocks,
                    "active": chain.active,
                    "router_kind": chain.router_kind,
                    "selection": chain.selection,
                    "weighted": chain.weighted,
                    "threshold": None if chain.router is None else chain.router.threshold,
                    "statistics": chain.statistics,
                }
            )
        return save_artifact(
            path,
            "plan",
            arrays,
            {"plan_kind": self.kind, "verdict": self.verdict, "chains": described, "description": self.description},
        )

    @classmethod
    def load(cls, path: str | Path) -> BlockPlan:
        """Reads a plan that `save` wrote.

        Raises:
            StoreError, ConfigError, SchemaVersionError: no such file, or not of this kind.
            UnsupportedError: it has an operator of a kind that this version doesn't know.
        """
        arrays, header = load_artifact(path, "plan")
        with reading_artifact(path, "plan"):
            chains = []
            for number, item in enumerate(header["chains"]):
                chain = OperatorChain.from_dict(item["chain"])
                weighted = item.get("weighted", False)  # plans of earlier versions don't say
                head = f"{number}:router:"
                router = {name.removeprefix(head): array for name, array in arrays.items() if name.startswith(head)}
                chains.append(
                    ChainPlan(
                        chain=chain,
                        labels=tuple(arrays[f"{number}:labels:{layer}"] for layer in range(len(chain.widths))),
                        blocks=item["blocks"],
                        active=item["active"],
                        router_kind=item["router_kind"],
                        selection=item["selection"],
                        weighted=weighted,
                        router=RouterWeights.from_arrays(router, item["router_kind"], item["threshold"], weighted)
                        if router
                        else None,
                        statistics=item["statistics"],
                    )
                )
            return cls(header["plan_kind"], tuple(chains), header["verdict"], header["description"])


__all__ = [
    "HUB",
    "ISOLATED",
    "BlockPlan",
    "ChainPlan",
    "Kind",
    "Labels",
    "OperatorChain",
    "RouterWeights",
    "Verdict",
]
