"""Mixtures of experts: networks that were built as blocks with a router, and need no plan to be routed.

Shape letters: `E` experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts as a model holds it.

    Args:
        name: the module that routes, by its name in the model.
        router: the module that scores experts.
        experts: a module for each expert, or the one that holds them all.
        count: number of experts `E`.
        per_token: experts that run for a token; None where the model doesn't say.
        stacked: parameters that hold all experts, one after another along their first axis; none where each expert is a module.

    Examples:
        >>> Mixture("mlp", "mlp.gate", ("mlp.experts.0", "mlp.experts.1"), 2, 1).said
        'routed already: 2 experts, 1 per token'
    """

    name: str
    router: str
    experts: tuple[str, ...]
    count: int
    per_token: int | None
    stacked: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """In words."""
        many = "an unknown number" if self.per_token is None else str(self.per_token)
        return f"routed already: {self.count} experts, {many} per token"

    def part(self, name: str) -> str | None:
        """Which part of the mixture a module is, in words; None for any other module."""
        if name == self.router:
            return "the router"
        for number, expert in enumerate(self.experts):
            if name == expert or name.startswith(f"{expert}."):
                return "its experts" if self.stacked else f"expert {number}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Mixture:
        experts, stacked = tuple(data["experts"]), tuple(data["stacked"])
        return cls(data["name"], data["router"], experts, data["count"], data["per_token"], stacked)


def stacked_parameters(module: Any) -> tuple[str, ...]:
    """Own parameters of a `torch.nn.Module` that hold its experts along their first axis, by own name; none for other modules.

    A module holds experts if it says how many (``num_experts``) and has a parameter ``[E, …, …]`` of matrices.
    """
    count = getattr(module, "num_experts", None)
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    found = tuple(name for name, shape in own.items() if len(shape) > 1 and shape[0] == count)
    return found if any(len(own[name]) == 3 for name in found) else ()
