"""How often pure noise is called block structure by the shuffle null, and how often planted blocks are. Prints one JSON object.

``same search``: the number of blocks is given. ``number chosen``: it is chosen, as by ``blocks="auto"``; ``form and number chosen``: as by
`search_blocks`, for a share of the weights. The control searches the real evidence longer than its shuffles, which is what the null must not do.
``claimed`` are verdicts other than ``none`` on blocks inside which evidence is so many times what it is elsewhere; 1 is noise.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise

import numpy as np
from common import provenance

from gradloc.core.kept import normalised
from gradloc.core.plan import BlockPlan, ChainPlan, OperatorChain
from gradloc.decompose.partition import partition_chain
from gradloc.decompose.search import search_structural
from gradloc.decompose.significance import shuffle_null, shuffled
from gradloc.decompose.structural import plan_structural

CHAIN = OperatorChain("ffn", ("up", "down"), ("relu",), (16, 64, 16))
BLOCKS, SHUFFLES, RESTARTS, LONGER = 4, 19, 2, 8
STRENGTHS = (1.0, 2.0, 2.4, 3.0)
LEVELS = (0.05, 0.1, 0.2, 0.5, 0.8)


def noise(seed: int) -> list[np.ndarray]:
    """A chain 16 → 64 → 16 whose units differ in scale, and nothing else."""
    random = np.random.default_rng(seed)
    return [
        np.outer(random.pareto(3, o) + 0.2, random.pareto(3, i) + 0.2) * random.exponential(size=(o, i))
        for o, i in ((64, 16), (16, 64))
    ]


def longer_search(evidence: list[np.ndarray], seed: int) -> float:
    """The control's p-value: more restarts for the real evidence than for its shuffles."""
    random = np.random.default_rng(seed)
    shares = normalised(evidence)
    observed = partition_chain(evidence, BLOCKS, restarts=LONGER, seed=seed).excess
    null = [
        partition_chain(
            [shuffled(s, random, scales=True) for s in shares], BLOCKS, restarts=RESTARTS, seed=seed + 1 + n
        ).excess
        for n in range(SHUFFLES)
    ]
    return (1 + sum(excess >= observed for excess in null)) / (1 + SHUFFLES)


def planted(seed: int, strength: float) -> list[np.ndarray]:
    """The same chain with blocks, and units that are alike."""
    random = np.random.default_rng(seed)
    labels = [random.permutation(np.arange(units) % BLOCKS) for units in CHAIN.widths]
    return [
        random.exponential(size=(len(out), len(into))) * np.where(out[:, None] == into, strength, 1.0)
        for into, out in pairwise(labels)
    ]


def number_chosen(evidence: list[np.ndarray], seed: int) -> BlockPlan:
    return plan_structural([CHAIN], dict(zip(CHAIN.weights, evidence, strict=True)), shuffles=SHUFFLES, seed=seed)


def all_chosen(evidence: list[np.ndarray], seed: int) -> BlockPlan:
    by_name = dict(zip(CHAIN.weights, evidence, strict=True))
    return search_structural([CHAIN], by_name, by_weights, keep=1 / BLOCKS, shuffles=SHUFFLES, seed=seed).plan


def by_weights(plan: ChainPlan) -> dict[int, tuple[float, float]]:
    """Time in proportion to the weights: nothing is measured here."""
    return {1: (1e-3, 1e-3 * plan.density)}


def p_value(plan: BlockPlan) -> float:
    return plan.chains[0].statistics["p_value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 seeds instead of 300")
    seeds = range(60 if parser.parse_args().quick else 300)
    p_values = {
        "same search": [shuffle_null(noise(s), BLOCKS, shuffles=SHUFFLES, seed=s + 1000).p_value for s in seeds],
        "number chosen": [p_value(number_chosen(noise(s), s + 1000)) for s in seeds],
        "form and number chosen": [p_value(all_chosen(noise(s), s + 1000)) for s in seeds],
        "control: real evidence searched longer": [longer_search(noise(s), s + 1000) for s in seeds],
    }
    claims = {
        name: {str(strength): shares(np.array([plan(planted(s, strength), s).verdict != "none" for s in some])) for strength in STRENGTHS}
        for name, plan, some in (("number chosen", number_chosen, seeds), ("form and number chosen", all_chosen, seeds[::3]))
    }  # fmt: skip
    found = {
        name: {str(level): shares(np.array(p) <= level + 1e-9) for level in LEVELS} for name, p in p_values.items()
    }
    print(
        json.dumps(
            {**provenance(), "seeds": len(seeds), "share_of_noise_with_p_at_most": found, "claimed": claims}, indent=1
        )
    )


def shares(yes: np.ndarray) -> dict[str, float]:
    return {"share": float(yes.mean()), "standard_error": float(np.sqrt(yes.var() / len(yes)))}


if __name__ == "__main__":
    main()
