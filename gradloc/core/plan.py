"""How a network runs as blocks: which units belong together, and what picks them.

Shape letters: `U` units of one layer, `B` blocks, `D` width of a chain's input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradloc.core.artifact import load_artifact, save_artifact
from gradloc.core.masks import MaskSet
from gradloc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["structural", "conditional"]
Verdict = Literal["natural", "inducible", "none"]
ISOLATED = -1
"""Label of a unit that belongs to no block."""
HUB = -2
"""Label of a unit that belongs to every block, and in a conditional plan runs for every token."""
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class OperatorChain:
    """Linear operators that feed one another through element-wise activations, and nothing else.

    Args:
        name: the module that computes the chain, e.g. ``"blocks.0.ffn"``.
        operators: the linear modules in order, e.g. ``("blocks.0.ffn.up", "blocks.0.ffn.down")``.
        activations: the function between each two operators, e.g. ``("relu",)``.
        widths: units at the input, between the operators, and at the output: ``len(operators) + 1`` numbers.
    """

    name: str
    operators: tuple[str, ...]
    activations: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.activations) != len(self.operators) - 1 or len(self.widths) != len(self.operators) + 1:
            raise ConfigError(
                f"chain {self.name!r}: {len(self.operators)} operators need {len(self.operators) - 1} activations and "
                f"{len(self.operators) + 1} widths, got {len(self.activations)} and {len(self.widths)}."
            )

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight parameters, in order."""
        return tuple(f"{operator}.weight" for operator in self.operators)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.__dict__.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatorChain:
        return cls(data["name"], tuple(data["operators"]), tuple(data["activations"]), tuple(data["widths"]))


@dataclass(frozen=True)
class RouterWeights:
    """A linear router: block scores of a token $x$ are ``weight @ x + bias``, ``[B, D]`` and ``[B]``, float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class ChainPlan:
    """The blocks of one chain.

    Args:
        chain: where it is.
        labels: block of each unit, one array ``[U]`` per unit layer (input, hidden …, output). Conditional plans label
            the hidden units; their inputs and outputs belong to every block (`HUB`).
        blocks: number of blocks `B`.
        active: blocks that run per token (conditional); None for structural.
        router: picks the active blocks (conditional, after training); None before.
        statistics: what the choice rests on, e.g. ``kept``, ``chance``, ``excess``, ``p_value``.
    """

    chain: OperatorChain
    labels: tuple[Labels, ...]
    blocks: int
    active: int | None = None
    router: RouterWeights | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = tuple(len(labels) for labels in self.labels)
        if widths != self.chain.widths:
            raise ConfigError(
                f"chain {self.chain.name!r}: labels for {widths} units, the chain has {self.chain.widths}."
            )
        worst = max(int(labels.max(initial=ISOLATED)) for labels in self.labels)
        if worst >= self.blocks:
            raise ConfigError(f"chain {self.chain.name!r}: label {worst} is out of range for {self.blocks} blocks.")
        if self.active is not None and not 1 <= self.active <= self.blocks:
            raise ConfigError(
                f"chain {self.chain.name!r}: active={self.active} must be between 1 and blocks={self.blocks}."
            )

    @property
    def conditional(self) -> bool:
        return self.active is not None

    def operator_mask(self, index: int) -> NDArray[np.bool_]:
        """Kept dependencies ``[O, I]`` of operator `index` of a structural plan: both ends in one block, or one of them in the hub."""
        inputs, outputs = self.labels[index][None, :], self.labels[index + 1][:, None]
        joined = (outputs == inputs) | (outputs == HUB) | (inputs == HUB)
        return np.asarray(joined & (outputs != ISOLATED) & (inputs != ISOLATED))


@dataclass(frozen=True)
class BlockPlan:
    """How a model runs as blocks, with the verdict that goes with it.

    ``structural`` blocks are the same for every input; ``conditional`` ones are picked per token by a router.
    ``verdict`` is about static structure: ``"natural"`` (already splits), ``"inducible"`` (evidence above chance, at a cost
    that annealing shows) or ``"none"``. For conditional plans it speaks of co-firing in the same three words.

    Example:
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

    def labels(self, parameter: str) -> tuple[Labels, Labels]:
        """``(out_labels, in_labels)`` of a weight: the block of each unit, -1 isolated, -2 in every block.

        Raises:
            KeyError: the plan doesn't cover that parameter.
        """
        for chain in self.chains:
            if parameter in chain.chain.weights:
                index = chain.chain.weights.index(parameter)
                return chain.labels[index + 1], chain.labels[index]
        covered = [name for chain in self.chains for name in chain.chain.weights]
        raise KeyError(f"the plan has no blocks for {parameter!r}; it covers: {', '.join(covered) or 'nothing'}")

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
                name: chain.operator_mask(index)
                for chain in self.chains
                for index, name in enumerate(chain.chain.weights)
            },
            description={"from": "structural block plan"},
        )

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
                arrays |= {f"{number}:router:weight": chain.router.weight, f"{number}:router:bias": chain.router.bias}
            described.append(
                {
                    "chain": chain.chain.to_dict(),
                    "blocks": chain.blocks,
                    "active": chain.active,
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
        """
        arrays, header = load_artifact(path, "plan")
        chains = []
        for number, item in enumerate(header["chains"]):
            chain = OperatorChain.from_dict(item["chain"])
            weight = arrays.get(f"{number}:router:weight")
            chains.append(
                ChainPlan(
                    chain=chain,
                    labels=tuple(arrays[f"{number}:labels:{layer}"] for layer in range(len(chain.widths))),
                    blocks=item["blocks"],
                    active=item["active"],
                    router=None if weight is None else RouterWeights(weight, arrays[f"{number}:router:bias"]),
                    statistics=item["statistics"],
                )
            )
        return cls(header["plan_kind"], tuple(chains), header["verdict"], header["description"])
