"""Does the verdict on co-firing say "inducible" of units that fire independently?

Firings are drawn whose truth is known: units that fire independently, alike or with rates and sizes of their own, for tokens that are alike or not; and
planted groups of units that fire together. Prints JSON: in what share of seeds the test of `plan_conditional` has p ≤ .05 and the verdict isn't "none", beside
what the test against random clusters alone would have said, which knows nothing of rates and sizes.

Usage: python benchmarks/firing_null.py [--seeds 100]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance

from gradloc.core.plan import OperatorChain
from gradloc.decompose.conditional import plan_conditional
from gradloc.decompose.firing_clusters import captured_share

TOKENS, UNITS, BLOCKS, KEEP, CONTROLS, ALPHA = 600, 64, 8, 0.25, 19, 0.05
CHAIN = OperatorChain("ffn", ("up", "down"), ("relu",), (16, UNITS, 16))
KINDS = (
    "alike", "rates", "sizes", "rates and sizes", "busy tokens", "large tokens", "rates, busy tokens",
    "planted, weak", "planted, strong",
)  # fmt: skip


def firings(kind: str, random: np.random.Generator) -> NDArray[np.float64]:
    shape = TOKENS, UNITS
    size = random.exponential(size=shape)
    if kind == "alike":
        return size * (random.random(shape) < 0.2)
    if kind == "rates":
        return size * (random.random(shape) < random.beta(1, 4, UNITS))
    if kind == "sizes":
        return size * (random.pareto(2, UNITS) + 0.1) * (random.random(shape) < 0.2)
    if kind == "rates and sizes":
        return size * (random.pareto(2, UNITS) + 0.1) * (random.random(shape) < random.beta(1, 4, UNITS))
    if kind == "busy tokens":
        return size * (random.random(shape) < random.beta(1, 3, (TOKENS, 1)))
    if kind == "large tokens":
        return size * np.exp(1.5 * random.normal(size=(TOKENS, 1))) * (random.random(shape) < 0.2)
    if kind == "rates, busy tokens":
        chance = random.beta(1, 4, UNITS) * 2 * random.beta(1, 2, (TOKENS, 1))
        return size * (random.random(shape) < np.clip(chance, 0, 1))
    groups = random.permutation(np.arange(UNITS) % BLOCKS)
    on = random.random((TOKENS, BLOCKS)) < 0.15
    return size * (random.random(shape) < np.where(on[:, groups], 0.5 if kind.endswith("weak") else 0.8, 0.1))


def one(job: tuple[str, int]) -> dict[str, Any]:
    kind, seed = job
    energy = firings(kind, np.random.default_rng(seed))
    (chain,) = plan_conditional([CHAIN], {"ffn": energy}, BLOCKS, keep=KEEP, alpha=ALPHA, seed=seed).chains
    random, labels = np.random.default_rng(seed + 1), chain.labels[1]
    drawn = [
        captured_share(energy, random.permutation(labels), chain.active or 1, BLOCKS).mean() for _ in range(CONTROLS)
    ]
    judged = chain.statistics
    alone = float(1 + sum(value >= judged["captured"] for value in drawn)) / (1 + CONTROLS)
    return {
        "kind": kind,
        "seed": seed,
        "p": judged["p_value"],
        "excess": judged["excess"],
        "found": bool(judged["p_value"] <= ALPHA and judged["excess"] >= 0.01),
        "p_random": alone,
        "found_random": bool(alone <= ALPHA and judged["captured"] - np.mean(drawn) >= 0.01),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        shares = {
            name: float(np.mean([bool(row[key]) if key.startswith("found") else row[key] <= ALPHA for row in mine]))
            for name, key in (
                ("p_below_alpha", "p"),
                ("found", "found"),
                ("random_alone_p_below_alpha", "p_random"),
                ("random_alone_found", "found_random"),
            )
        }
        error = {f"{name}_error": (share * (1 - share) / len(mine)) ** 0.5 for name, share in shares.items()}
        found.append({"kind": kind, "seeds": len(mine), **shares, **error})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(kind, seed) for seed in range(arguments.seeds) for kind in KINDS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = list(pool.imap_unordered(one, jobs))
    rows.sort(key=lambda row: (KINDS.index(row["kind"]), row["seed"]))
    about = {"tokens": TOKENS, "units": UNITS, "blocks": BLOCKS, "keep": KEEP, "controls": CONTROLS, "alpha": ALPHA}
    print_table({**provenance(), **about, "summary": summary(rows)}, rows)


if __name__ == "__main__":
    main()
