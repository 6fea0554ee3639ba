"""Where firings are watched."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SiteKind = Literal["features", "channels", "recurrent", "heads"]


@dataclass(frozen=True)
class FiringSite:
    """Units whose error signal is sampled per token.

    Args:
        module: the module, by its name in the model.
        kind: ``"features"``: last axis of the output (linear, FFN, router logits); ``"channels"``: those of a
            convolution's output, every position a token; ``"recurrent"``: last axis of a recurrent layer's output sequence; ``"heads"``:
            groups of the module's *input*, such as the heads that an attention's output projection reads.
        activation: the function that follows, where it is known; ``"relu"`` means that a unit that doesn't fire has an error
            signal of exactly zero.
        groups: number of heads.
    """

    module: str
    kind: SiteKind = "features"
    activation: str = ""
    groups: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FiringSite:
        return cls(**data)
