"""Do blocks come out as they were planted? Students trained on teachers that are several networks, grouped by what was recorded.

Prints JSON. Per setting and method: in how many seeds the partition is exact (up to the numbers of blocks), the adjusted Rand index,
the evidence kept on which share of the dependencies, and seconds. Per setting: how often the number of blocks is found and what
the verdict is. Then one operator of 4096 × 16384.

A hidden unit that the student does not use (under a hundredth of its layer's median evidence) has no block that evidence could show;
``exact`` is about the others, ``exact_all`` about all units, ``unused`` how many there are. Hub units must be found as such, and no
others; methods that know no hub are judged by the rest.

Usage: python benchmarks/partition.py [--seeds 20] [--first-seed 100] [--steps 1500] [--parts methods plans wide] [--cache DIRECTORY]
Peers: scikit-learn; pymetis and mtkahypar (``pip install pymetis mtkahypar``) where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import SpectralCoclustering
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from planted import SETTINGS, grouped, mean_and_error, trained

import gradloc
from gradloc.core.kept import kept_share, normalised
from gradloc.core.plan import HUB, OperatorChain
from gradloc.decompose.partition import partition_chain
from gradloc.decompose.structural import plan_structural

BLOCKS = 4
UNUSED = 0.01
PLANTED = {name: SETTINGS[name] for name in ("groups", "unequal", "hub")} | {"dense": grouped([32], each=64)}
Found = tuple[np.ndarray, np.ndarray]


def ours(**settings: Any) -> Callable[[np.ndarray, int], Found]:
    def find(evidence: np.ndarray, seed: int) -> Found:
        labels = partition_chain([evidence], BLOCKS, seed=seed, **settings).labels
        return labels[0], labels[1]

    return find


def spectral(evidence: np.ndarray, seed: int) -> Found:
    """Of the evidence's root, as ours."""
    model = SpectralCoclustering(BLOCKS, random_state=seed).fit(np.sqrt(evidence) + 1e-12)
    return model.column_labels_.astype(np.int64), model.row_labels_.astype(np.int64)


def edges_of(evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, outputs and whole-number weights up to 10^4 of the evidence's root; nodes are inputs, then outputs."""
    root = np.sqrt(evidence)
    weights = np.rint(root / root.max() * 1e4).astype(np.int64)
    outputs, inputs = np.nonzero(weights)
    return inputs, outputs + evidence.shape[1], weights[outputs, inputs]


def metis(evidence: np.ndarray, seed: int) -> Found:
    import pymetis

    one, other, weight = edges_of(evidence)
    source, target, both = np.concatenate([one, other]), np.concatenate([other, one]), np.tile(weight, 2)
    order = np.argsort(source, kind="stable")
    begins = np.searchsorted(source[order], np.arange(sum(evidence.shape) + 1))
    _, labels = pymetis.part_graph(
        BLOCKS,
        pymetis.CSRAdjacency(begins.tolist(), target[order].tolist()),
        eweights=both[order].tolist(),
        options=pymetis.Options(seed=seed),
    )
    return np.split(np.asarray(labels, np.int64), [evidence.shape[1]])  # type: ignore[return-value]


def kahypar(imbalance: float) -> Callable[[np.ndarray, int], Found]:
    def find(evidence: np.ndarray, seed: int) -> Found:
        import mtkahypar

        mtkahypar.set_seed(seed)
        global _KAHYPAR
        _KAHYPAR = _KAHYPAR or mtkahypar.initialize(1)
        context = _KAHYPAR.context_from_preset(mtkahypar.PresetType.DETERMINISTIC_QUALITY)
        context.set_partitioning_parameters(BLOCKS, imbalance, mtkahypar.Objective.CUT)
        context.logging = False
        one, other, weight = edges_of(evidence)
        nodes = sum(evidence.shape)
        graph = _KAHYPAR.create_graph(
            context,
            nodes,
            len(one),
            list(zip(one.tolist(), other.tolist(), strict=True)),
            [1] * nodes,
            weight.tolist(),
        )
        cut = graph.partition(context)
        labels = np.array([cut.block_id(node) for node in range(nodes)], np.int64)
        return np.split(labels, [evidence.shape[1]])  # type: ignore[return-value]

    return find


PARTS = ("methods", "plans", "wide")
_KAHYPAR: Any = None
METHODS: dict[str, Callable[[np.ndarray, int], Found]] = {
    "ours, equal sizes": ours(),
    "ours, free sizes": ours(sizes="free"),
    "ours, free sizes and hub": ours(sizes="free", hub=0.25),
    "spectral co-clustering": spectral,
}
if importlib.util.find_spec("pymetis"):
    METHODS["METIS"] = metis
if importlib.util.find_spec("mtkahypar"):
    METHODS |= {"Mt-KaHyPar, imbalance 3 %": kahypar(0.03), "Mt-KaHyPar, imbalance 60 %": kahypar(0.6)}


def planted_labels(reads: np.ndarray) -> Found:
    """Blocks of inputs and units from which input each unit reads in truth."""
    _, units = np.unique(reads, axis=0, return_inverse=True)
    inputs = np.array([HUB if column.all() else units[column][0] for column in reads.T])
    return (np.zeros_like(inputs), units) if (inputs == HUB).all() else (inputs, units)


def recorded(setting: str, seed: int, steps: int, cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Evidence Σg²·w² of the student's first layer, and which dependencies there are in truth."""
    known = cache / f"{setting}-{seed}-{steps}.npz" if cache is not None else None
    if known is not None and known.exists():
        with np.load(known) as arrays:
            return arrays["evidence"], arrays["truth"]
    with tempfile.TemporaryDirectory() as place:
        task = trained(PLANTED[setting], "adamw 0.1", seed, steps, "element", f"{place}/r")
        run = gradloc.load_run(f"{place}/r")
        evidence = run.evidence(task.tested).mean_grad_sumsq()
        weight = run.weights()[task.tested].astype(np.float64)
    found = evidence * weight**2, task.truth["zero"]
    if known is not None:
        np.savez(known, evidence=found[0], truth=found[1])
    return found


def judged(found: Found, truth: Found, evidence: np.ndarray) -> dict[str, float]:
    labels, planted = np.concatenate(found), np.concatenate(truth)
    sums = [evidence.sum(0), evidence.sum(1)]
    used = np.concatenate([s >= UNUSED * np.median(s) for s in sums])
    if (planted == HUB).any() and not (labels == HUB).any():
        counted = planted != HUB
    else:
        counted = np.ones(len(planted), np.bool_)
    same_hub = bool(((labels == HUB) == (planted == HUB))[used & counted].all())
    into, out = found
    inside = (out[:, None] == into[None, :]) | (out[:, None] == HUB) | (into[None, :] == HUB)
    live = used & counted
    return {
        "exact": float(same_hub and adjusted_rand_score(planted[live], labels[live]) == 1.0),
        "exact_all": float(
            np.array_equal(labels[counted] == HUB, planted[counted] == HUB)
            and adjusted_rand_score(planted[counted], labels[counted]) == 1.0
        ),
        "ari": float(adjusted_rand_score(planted[live], labels[live])),
        "kept": kept_share(normalised([evidence]), found),
        "density": float(inside.mean()),
        "unused": float((~used).sum()),
    }


def planned(evidence: np.ndarray, seed: int) -> dict[str, Any]:
    """What a plan with all choices left open says."""
    chain = OperatorChain("first", ("0",), (), (evidence.shape[1], evidence.shape[0]))
    begin = time.perf_counter()
    plan = plan_structural([chain], {"0.weight": evidence}, sizes="free", hub=0.25, seed=seed)
    found = plan.chains[0]
    return {
        "blocks": found.blocks,
        "verdict": plan.verdict,
        "p_value": found.statistics["p_value"],
        "excess": found.statistics["excess"],
        "seconds": time.perf_counter() - begin,
    }


def wide(threads: int) -> list[dict[str, Any]]:
    """One operator 4096 → 16384 with 8 planted blocks at twice the evidence outside, and one without structure."""
    random = np.random.default_rng(0)
    truth = random.permutation(np.arange(4096) % 8), random.permutation(np.arange(16384) % 8)
    noise = random.exponential(size=(16384, 4096)).astype(np.float32)
    rows = []
    for name, evidence in (("planted", noise * np.where(truth[1][:, None] == truth[0], 2, 1)), ("noise", noise)):
        for sizes, hub in (("equal", 0.0), ("free", 0.0), ("free", 0.25)):
            begin = time.perf_counter()
            found = partition_chain([evidence], 8, sizes=sizes, hub=hub)  # type: ignore[arg-type]
            row = {
                "operator": "4096 x 16384",
                "evidence": name,
                "method": f"ours, {sizes}, hub {hub}",
                "threads": threads,
            }
            scores = [adjusted_rand_score(t, layer) for t, layer in zip(truth, found.labels, strict=True)]
            rows.append(row | {"seconds": round(time.perf_counter() - begin, 1), "ari": round(min(scores), 4)})
            print(rows[-1], file=sys.stderr, flush=True)
    chain = OperatorChain("wide", ("0",), (), (4096, 16384))
    begin = time.perf_counter()
    plan = plan_structural([chain], {"0.weight": noise}, 8)
    rows.append(
        {
            "operator": "4096 x 16384",
            "evidence": "noise",
            "method": "whole plan, 8 blocks, 19 shuffles",
            "threads": threads,
            "seconds": round(time.perf_counter() - begin, 1),
            "verdict": plan.verdict,
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=100, help="thresholds were chosen on seeds below 20")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cache", type=Path, help="directory in which trained evidence is kept")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    plans: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for setting in PLANTED:
            if setting == "dense" and "plans" not in options.parts:
                continue
            evidence, reads = recorded(setting, seed, options.steps, options.cache)
            truth = planted_labels(reads)
            if "plans" in options.parts:
                plans.setdefault(setting, []).append(planned(evidence, seed))
            for name, method in METHODS.items() if "methods" in options.parts and setting != "dense" else ():
                begin = time.perf_counter()
                found = method(evidence, seed)
                seconds = time.perf_counter() - begin
                row = judged(found, truth, evidence) | {"seconds": seconds}
                results.setdefault((setting, name), []).append(row)
            if setting == "groups" and "plans" in options.parts:
                shuffled = np.random.default_rng(seed).permutation(evidence.ravel()).reshape(evidence.shape)
                plans.setdefault("shuffled", []).append(planned(shuffled, seed))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    table: list[dict[str, Any]] = []
    for (setting, name), rows in results.items():
        entry: dict[str, Any] = {"setting": setting, "method": name, "seeds": len(rows)}
        entry |= {key: int(sum(r[key] for r in rows)) for key in ("exact", "exact_all")}
        entry |= {
            key: mean_and_error([r[key] for r in rows]) for key in ("ari", "kept", "density", "unused", "seconds")
        }
        table.append(entry)
    for setting, rows in plans.items():
        entry = {"setting": setting, "method": "plan, all choices open", "seeds": len(rows)}
        entry["blocks"] = {str(b): sum(r["blocks"] == b for r in rows) for b in sorted({r["blocks"] for r in rows})}
        entry["verdicts"] = {v: sum(r["verdict"] == v for r in rows) for v in ("natural", "inducible", "none")}
        entry |= {key: mean_and_error([r[key] for r in rows]) for key in ("p_value", "excess", "seconds")}
        table.append(entry)
    if "wide" in options.parts:
        table += wide(threads)
    about = {"first_seed": options.first_seed, "steps": options.steps, "planted_blocks": BLOCKS}
    print_table({**provenance(), **about}, table)


if __name__ == "__main__":
    main()
