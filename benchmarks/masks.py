"""What does a one-shot mask cost? Loss increase after removing or reverting weights of a trained GPT, without recovery.

A character GPT (d=128, 4 layers) is trained on the standard library's source and on Debian's package descriptions. At every
length of training, evidence masks (recorded by tile, no calibration data) compete with magnitude, movement, Wanda and SparseGPT
(the last two get calibration data; SparseGPT also updates what it keeps) at each scope. "removed" sets weights to 0, "reverted"
to their initial values. An ablation on element cells says which part of the evidence matters.

Prints JSON: the loss increase in nats of every mask, and the ratio of ours to the best baseline without SparseGPT.

Usage: python benchmarks/masks.py [--seeds 3] [--steps 100 400 1500] [--workers 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from texts import descriptions_corpus

import gradloc
from gradloc.cli.demo.corpus import Corpus, standard_library
from gradloc.cli.demo.gpt import GPT, loss_of, validation_loss
from gradloc.cli.demo.training import _rate
from gradloc.core.layout import CellGrid

TEXTS = {"code": standard_library, "descriptions": descriptions_corpus}
DENSITIES = (0.5, 0.3)
SCOPES = ("global", "layer", "unit")
SEQUENCES, LENGTH = 16, 128


class Trained:
    """A model, its run, and what only a benchmark may keep beside."""

    def __init__(self, text: str, seed: int, steps: int, granularity: str, place: Path) -> None:
        self.corpus: Corpus = TEXTS[text]()
        torch.manual_seed(seed)
        self.model = GPT(self.corpus.vocabulary, LENGTH)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        gradloc.wrap(
            optimizer,
            self.model,
            run=place,
            every=1,
            firings=False,
            granularity=granularity,
            flush_every=max(5, steps // 20),
        )
        batches = torch.Generator().manual_seed(seed + 1)
        pruned = {name: p for name, p in self.model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
        self.movement = {name: torch.zeros_like(p) for name, p in pruned.items()}
        for _ in range(steps):
            loss_of(self.model, self.corpus.batch(batches, SEQUENCES, LENGTH)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for name, p in pruned.items():
                self.movement[name] -= p.grad * p.detach()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        gradloc.recorder_of(optimizer).close()
        self.adam = {name: optimizer.state[p]["exp_avg_sq"].numpy() for name, p in pruned.items()}
        self.run = gradloc.load_run(place)
        self.names = list(pruned)
        self.weights = {name: p.detach().clone() for name, p in pruned.items()}
        self.calibration = [self.corpus.batch(batches, SEQUENCES, LENGTH)[:, :-1] for _ in range(16)]
        self.held_out = self.corpus.held_out_batches(16, SEQUENCES, LENGTH)
        self.loss = validation_loss(self.model, self.held_out)

    def increase(self, change: Mapping[str, Tensor]) -> float:
        """Loss with other weights, over the loss as trained."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in change.items():
                parameters[name].copy_(weight)
            loss = validation_loss(self.model, self.held_out)
            for name in change:
                parameters[name].copy_(self.weights[name])
        return loss - self.loss

    def masked(self, masks: gradloc.MaskSet) -> dict[str, Tensor]:
        return {n: torch.where(masks[n], w, masks.null_tensor(n, w)) for n, w in self.weights.items()}

    def by_score(self, scores: Mapping[str, np.ndarray], density: float) -> dict[str, Tensor]:
        """Removes all but the highest scores of all layers together."""
        pooled = np.concatenate([scores[name].ravel() for name in self.names])
        least = np.quantile(pooled, 1 - density)
        return {n: torch.where(torch.from_numpy(scores[n] >= least), w, 0.0) for n, w in self.weights.items()}


def peers(trained: Trained) -> Iterator[dict[str, Any]]:
    """Masks by the public interface at every density and scope, and SparseGPT."""
    norms = gradloc.input_norms(trained.model, trained.calibration)
    hessians = input_products(trained)
    for density in DENSITIES:
        for criterion in ("saliency", "wald", "magnitude", "wanda", "movement", "random"):
            for scope in SCOPES if criterion not in ("random", "wald") else ("global",):
                masks = gradloc.find_masks(
                    trained.run, criterion, density=density, scope=scope, include=trained.names, inputs=norms
                )
                yield row("removed", criterion, scope, density, trained.increase(trained.masked(masks)))
        accumulated = {name: score.numpy() for name, score in trained.movement.items()}
        yield row(
            "removed",
            "movement, accumulated",
            "global",
            density,
            trained.increase(trained.by_score(accumulated, density)),
        )
        reconstructed = {n: sparse_gpt(w, hessians[n], 1 - density) for n, w in trained.weights.items()}
        yield row("removed", "SparseGPT", "layer", density, trained.increase(reconstructed))
        for criterion in ("saliency", "wald", "magnitude", "random"):
            masks = gradloc.find_masks(trained.run, criterion, "init", density=density, include=trained.names)
            yield row("reverted", criterion, "global", density, trained.increase(trained.masked(masks)))


def row(action: str, criterion: str, scope: str, density: float, increase: float) -> dict[str, Any]:
    return {"action": action, "criterion": criterion, "scope": scope, "density": density, "increase": increase}


def input_products(trained: Trained) -> dict[str, Tensor]:
    r"""$XX^\top$ of each linear layer's inputs over the calibration data."""
    products: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).double()
            products[name] = products.get(name, 0.0) + x.T @ x

        return hook

    modules = dict(trained.model.named_modules())
    hooks = [modules[n.removesuffix(".weight")].register_forward_pre_hook(watch(n)) for n in trained.names]
    with torch.no_grad():
        for batch in trained.calibration:
            trained.model(batch)
    for hook in hooks:
        hook.remove()
    return products


def sparse_gpt(weight: Tensor, product: Tensor, sparsity: float, block: int = 64) -> Tensor:
    """Prunes a layer column by column, and makes up for each in the columns to come.

    Source: Frantar and Alistarh, "SparseGPT" (2023): blocks of columns, thresholds a block, damping of a hundredth.
    """
    w, hessian = weight.double().clone(), product.clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for begin in range(0, w.shape[1], block):
        columns = slice(begin, min(begin + block, w.shape[1]))
        scores = (w[:, columns] / inverse.diagonal()[columns]) ** 2
        prune = scores <= scores.flatten().kthvalue(max(1, round(sparsity * scores.numel()))).values
        errors = torch.zeros_like(w[:, columns])
        for column in range(columns.start, columns.stop):
            keep = torch.where(prune[:, column - begin], 0.0, w[:, column])
            error = (w[:, column] - keep) / inverse[column, column]
            w[:, column] = keep
            w[:, column + 1 : columns.stop] -= error[:, None] * inverse[column, column + 1 : columns.stop]
            errors[:, column - begin] = error
        w[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    return w.to(weight.dtype)


def ablation(trained: Trained) -> Iterator[dict[str, Any]]:
    """From element cells: what is lost by coarser cells, other powers, later windows; and Adam's own state."""
    last = len(trained.run.store.windows())
    ranges = {"all": None, "last half": (last // 2, last), "last quarter": (last * 3 // 4, last)}
    evidence = {(w, n): trained.run.evidence(n, r) for w, r in ranges.items() for n in trained.names}

    def squares(name: str, cells: str, windows: str = "all") -> np.ndarray:
        found = evidence[windows, name]
        mean = found.grad_sumsq / found.exposure
        if cells == "layer":
            return np.full(mean.shape, mean.mean())
        if cells == "row x column":
            return np.asarray(np.outer(mean.sum(1), mean.sum(0)) / mean.sum())
        grid = CellGrid(found.cells.layout, cells)
        return np.asarray(grid.expand(grid.reduce(mean) / grid.cell_sizes()))

    cases = [
        (cells, power, "all")
        for cells in ("element", "tile", "row", "column", "row x column", "layer")
        for power in (0.25, 0.5, 0.75, 1.0)
    ]
    cases += [("tile", power, windows) for windows in ("last half", "last quarter") for power in (0.5, 1.0)]
    for density in DENSITIES:
        for cells, power, windows in cases:
            scores = {
                n: squares(n, cells, windows) ** power * trained.weights[n].numpy().astype(float) ** 2
                for n in trained.names
            }
            name = f"(w^2)(g^2)^{power}, {cells} cells, {windows} windows"
            yield row("removed", name, "global", density, trained.increase(trained.by_score(scores, density)))
        adam = {n: np.sqrt(trained.adam[n]) * trained.weights[n].numpy() ** 2 for n in trained.names}
        yield row(
            "removed", "(w^2)(Adam's v)^0.5", "global", density, trained.increase(trained.by_score(adam, density))
        )
        events = {n: trained.run.evidence(n).events.astype(float) for n in trained.names}
        yield row("removed", "events", "global", density, trained.increase(trained.by_score(events, density)))


def one(job: tuple[str, int, int, str]) -> list[dict[str, Any]]:
    text, seed, steps, granularity = job
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        trained = Trained(text, seed, steps, granularity, Path(place) / "run")
        found = peers(trained) if granularity == "tile" else ablation(trained)
        about = {"text": text, "steps": steps, "seed": seed, "recorded": granularity, "loss": trained.loss}
        rows = [{**about, **item} for item in found]
    print(f"{text} {steps} steps seed {seed} {granularity}: done", file=sys.stderr, flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours over the best of magnitude, Wanda and movement, each at its better scope, seed by seed."""
    keys = sorted({(r["text"], r["steps"], r["density"]) for r in rows if r["recorded"] == "tile"})
    for text, steps, density in keys:
        here = [
            r for r in rows if (r["text"], r["steps"], r["density"], r["recorded"]) == (text, steps, density, "tile")
        ]
        entry: dict[str, Any] = {"text": text, "steps": steps, "density": density}
        for action, baselines in (
            ("removed", ("magnitude", "wanda", "movement", "movement, accumulated")),
            ("reverted", ("magnitude",)),
        ):
            for ours in ("saliency", "wald"):
                found = []
                for seed in sorted({r["seed"] for r in here}):
                    of = [r for r in here if r["seed"] == seed and r["action"] == action]
                    own = next(r["increase"] for r in of if (r["criterion"], r["scope"]) == (ours, "global"))
                    found.append(own / min(r["increase"] for r in of if r["criterion"] in baselines))
                entry[f"{action}, {ours} over best baseline"] = [round(value, 3) for value in found]
        yield entry


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 400, 1500])
    parser.add_argument("--texts", nargs="*", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        (text, seed, steps, "tile")
        for steps in sorted(options.steps, reverse=True)
        for seed in range(options.seeds)
        for text in options.texts
    ]
    jobs += [(text, 0, steps, "element") for steps in sorted(options.steps, reverse=True) for text in options.texts]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(one, jobs) for row in found]
    for r in rows:
        r["increase"], r["loss"] = round(r["increase"], 4), round(r["loss"], 4)
    print_table({**provenance(), "seeds": options.seeds, "ratios": list(ratios(rows))}, rows)


if __name__ == "__main__":
    main()
