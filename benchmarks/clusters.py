"""Which clustering of units captures a token's energy in few blocks? Prints JSON.

Firings of a character GPT on real text, half of the sampled tokens for finding clusters and half for judging. Ours is balanced
k-means; beside it scikit-learn's k-means and spectral clustering (made equal in size by the same assignment), the exact partition by
firing rate, and random clusters. ``captured`` is the share of a held-out token's energy in its best quarter of the blocks.

Usage: python benchmarks/clusters.py [--steps 200] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans, SpectralClustering

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from quality import Training

import gradloc
from gradloc.cli.demo.corpus import standard_library
from gradloc.core.assignment import assign_balanced
from gradloc.decompose.firing_clusters import captured_share, cluster_units

Labels = NDArray[np.int64]


def vectors_of(energy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Firing vectors of length 1, one a unit."""
    vectors = np.sqrt(np.asarray(energy, np.float64)).T
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def made_equal(vectors: NDArray[np.float64], labels: Labels, blocks: int) -> Labels:
    """Clusters of any sizes into blocks of one size: every unit to the nearest centre that has room."""
    centres = np.stack(
        [vectors[labels == b].sum(0) if (labels == b).any() else np.zeros(vectors.shape[1]) for b in range(blocks)]
    )
    return assign_balanced(vectors @ (centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)).T)


def by_kmeans(energy: NDArray[np.floating], blocks: int, seed: int) -> Labels:
    vectors = vectors_of(energy)
    return made_equal(vectors, KMeans(blocks, n_init=3, random_state=seed).fit_predict(vectors), blocks)


def by_spectrum(energy: NDArray[np.floating], blocks: int, seed: int) -> Labels:
    vectors = vectors_of(energy)
    similarity = np.clip(vectors @ vectors.T, 0, 1)
    found = SpectralClustering(
        blocks, affinity="precomputed", random_state=seed, assign_labels="cluster_qr"
    ).fit_predict(similarity)
    return made_equal(vectors, found, blocks)


def by_rate(energy: NDArray[np.floating], blocks: int, seed: int) -> Labels:
    order = np.argsort(-(energy > 0).mean(0), kind="stable")
    labels = np.empty(len(order), np.int64)
    labels[order] = np.arange(len(order)) * blocks // len(order)
    return labels


def at_random(energy: NDArray[np.floating], blocks: int, seed: int) -> Labels:
    return np.random.default_rng(seed).permutation(np.arange(energy.shape[1]) % blocks)


METHODS: dict[str, Callable[[NDArray[np.floating], int, int], Labels]] = {
    "balanced k-means": lambda energy, blocks, seed: cluster_units(energy, blocks, seed=seed),
    "scikit-learn k-means": by_kmeans,
    "scikit-learn spectral": by_spectrum,
    "by firing rate": by_rate,
    "random": at_random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        training = Training(standard_library(), seed, arguments.steps, 512)
        with tempfile.TemporaryDirectory() as place:
            gradloc.wrap(training.optimizer, training.model, run=place, every=4, flush_every=10)
            training.go_on(arguments.steps)
            gradloc.recorder_of(training.optimizer).close()
            run = gradloc.load_run(place)
            firings = {chain.name: run.firings(chain.fires_at) for chain in run.info.chains if chain.kind == "chain"}
        for name, energy in firings.items():
            learn, judge = energy[::2], energy[1::2]
            for blocks in (8, 16, 64):
                for method, cluster in METHODS.items():
                    began = perf_counter()
                    labels = cluster(learn, blocks, seed)
                    seconds = perf_counter() - began
                    captured = float(captured_share(judge, labels, blocks // 4, blocks).mean())
                    rows.append(
                        {
                            "seed": seed,
                            "chain": name,
                            "blocks": blocks,
                            "method": method,
                            "captured": captured,
                            "seconds": seconds,
                            "tokens": len(energy),
                        }
                    )
    summary = [
        {
            "blocks": blocks,
            "method": method,
            "captured": statistics.mean(r["captured"] for r in rows if (r["blocks"], r["method"]) == (blocks, method)),
            "seconds": statistics.median(r["seconds"] for r in rows if (r["blocks"], r["method"]) == (blocks, method)),
        }
        for blocks in (8, 16, 64)
        for method in METHODS
    ]
    print_table({**provenance(), "steps": arguments.steps, "summary": summary}, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
