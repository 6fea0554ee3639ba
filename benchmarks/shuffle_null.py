"""How often pure noise is called block structure by the shuffle null. Prints one JSON object.

The control searches the real evidence longer than its shuffles, which is what the null must not do.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from common import provenance

from gradloc.core.kept import normalised
from gradloc.decompose.partition import partition_chain
from gradloc.decompose.significance import shuffle_null, shuffled

BLOCKS, SHUFFLES, RESTARTS, LONGER = 4, 19, 2, 8
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 seeds instead of 300")
    seeds = range(60 if parser.parse_args().quick else 300)
    p_values = {
        "same search": np.array(
            [shuffle_null(noise(s), BLOCKS, shuffles=SHUFFLES, restarts=RESTARTS, seed=s + 1000).p_value for s in seeds]
        ),
        "control: real evidence searched longer": np.array([longer_search(noise(s), s + 1000) for s in seeds]),
    }
    found = {
        name: {
            str(level): {
                "share": float((p <= level).mean()),
                "standard_error": float(np.sqrt((p <= level).var() / len(p))),
            }
            for level in LEVELS
        }
        for name, p in p_values.items()
    }
    print(json.dumps({**provenance(), "seeds": len(seeds), "share_of_noise_with_p_at_most": found}, indent=1))


if __name__ == "__main__":
    main()
