"""Are the p-values right? Students trained on teachers whose dependencies are known.

Prints JSON: per setting, optimizer, criterion, null and calibration the area under the curve, and per correction and alpha the mean
false discovery proportion and power over seeds, with standard errors. The rows with other granularities, windows and numbers of
steps are the ablation.

Usage: python benchmarks/planted.py [--seeds 20] [--steps 1500] [--longer 3000 6000] [--workers 2] [--settings sparse groups …]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import print_table, provenance

import gradloc
from gradloc.analyze.correction import CORRECTIONS
from gradloc.analyze.requests import SelectionRequest, groups_of
from gradloc.analyze.support import UNSUPPORTED
from gradloc.analyze.work import Work, score

BATCH = 64
ALPHAS = (0.05, 0.1)


@dataclass
class Task:
    """A student, what teaches it, and which dependencies of which parameter there are in truth, by null."""

    student: nn.Module
    teacher: Callable[[Tensor], Tensor]
    inputs: int
    tested: str
    truth: dict[str, np.ndarray]


def sparse_matrix(rows: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """Entries of random sign and of size .3 to 1, the others exactly 0."""
    size = 0.3 + 0.7 * torch.rand(rows, columns, generator=generator)
    sign = torch.randint(2, (rows, columns), generator=generator) * 2.0 - 1
    return size * sign * (torch.rand(rows, columns, generator=generator) < density)


def sparse(generator: torch.Generator) -> Task:
    """A linear teacher with a tenth of its weights; the student begins at random ones."""
    matrix = sparse_matrix(32, 64, 0.1, generator)
    return Task(nn.Linear(64, 32), lambda x: x @ matrix.T, 64, "weight", {"zero": (matrix != 0).numpy()})


def fine_tune(generator: torch.Generator) -> Task:
    """A dense linear student whose teacher differs from its start in a tenth of the weights."""
    student = nn.Linear(64, 32)
    change = sparse_matrix(32, 64, 0.1, generator)
    matrix = student.weight.detach() + change
    return Task(student, lambda x: x @ matrix.T, 64, "weight", {"init": (change != 0).numpy()})


def grouped(widths: list[int], hub: int = 0, each: int = 16) -> Callable[[torch.Generator], Task]:
    """Independent teachers of `widths` inputs and `each` hidden units, and `hub` inputs that all of them read.

    The student's units belong to a group because its readout is fixed to be blockwise: so it is known which inputs a unit should
    read. Nothing tells the student's first layer.
    """

    def build(generator: torch.Generator) -> Task:
        inputs = sum(widths) + hub
        owner = torch.cat([torch.full((w,), g) for g, w in enumerate(widths)] + [torch.full((hub,), -1)])
        unit_group = torch.arange(len(widths)).repeat_interleave(each)
        output_group = torch.arange(len(widths)).repeat_interleave(4)
        reads = (unit_group[:, None] == owner[None, :]) | (owner[None, :] == -1)
        fan = reads.sum(1, keepdim=True)
        first = torch.randn(len(unit_group), inputs, generator=generator) * reads * (2 / fan).sqrt()
        blocks = output_group[:, None] == unit_group[None, :]
        second = torch.randn(blocks.shape, generator=generator) * blocks * (2 / each) ** 0.5
        student = nn.Sequential(
            nn.Linear(inputs, len(unit_group)), nn.ReLU(), nn.Linear(len(unit_group), len(output_group))
        )
        with torch.no_grad():
            student[2].weight.copy_(torch.randn(blocks.shape, generator=generator) * blocks * (2 / each) ** 0.5)
        student[2].weight.requires_grad_(False)
        return Task(
            student, lambda x: 2 * torch.relu(x @ first.T) @ second.T, inputs, "0.weight", {"zero": reads.numpy()}
        )

    return build


def idle_inputs(generator: torch.Generator) -> Task:
    """Half of the inputs don't matter to the teacher; both layers of the student train."""
    first = torch.randn(32, 32, generator=generator) * (torch.arange(32) < 16) * (2 / 16) ** 0.5
    second = torch.randn(8, 32, generator=generator) * (2 / 32) ** 0.5
    student = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    truth = np.broadcast_to(np.arange(32) < 16, (32, 32)).copy()
    return Task(student, lambda x: 2 * torch.relu(x @ first.T) @ second.T, 32, "0.weight", {"zero": truth})


def beside_frozen(generator: torch.Generator) -> Task:
    """A frozen random layer below one that trains on a teacher with a tenth of the weights over the same features."""
    student = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    student[0].requires_grad_(False)
    matrix = sparse_matrix(32, 64, 0.1, generator)
    frozen = student[0]
    return Task(
        student, lambda x: torch.relu(frozen(x)) @ (3 * matrix).T, 32, "2.weight", {"zero": (matrix != 0).numpy()}
    )


def noise(generator: torch.Generator) -> Task:
    """Nothing to learn: targets are drawn afresh in every step."""
    student = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    return Task(student, lambda x: torch.zeros(len(x), 16), 32, "0.weight", {"init": np.zeros((32, 32), bool)})


def noise_linear(generator: torch.Generator) -> Task:
    """The same for a linear student that begins at the best answer, zero."""
    student = nn.Linear(64, 32)
    nn.init.zeros_(student.weight)
    nn.init.zeros_(student.bias)
    return Task(student, lambda x: torch.zeros(len(x), 32), 64, "weight", {"init": np.zeros((32, 64), bool)})


SETTINGS: dict[str, Callable[[torch.Generator], Task]] = {
    "sparse": sparse,
    "fine_tune": fine_tune,
    "groups": grouped([8, 8, 8, 8]),
    "unequal": grouped([4, 6, 8, 14]),
    "hub": grouped([7, 7, 7, 7], hub=4),
    "idle_inputs": idle_inputs,
    "beside_frozen": beside_frozen,
    "noise": noise,
    "noise_linear": noise_linear,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    # Without decay AdamW is Adam.
    "adamw 0": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "adamw 0.1": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw 1": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1.0),
}
TESTS: list[dict[str, Any]] = [
    {"criterion": "wald", "calibration": "empirical"},
    {"criterion": "wald", "calibration": "theory", "samples_per_step": BATCH},
    {"criterion": "wald", "calibration": "init"},
    {"criterion": "score", "calibration": "theory"},
    {"criterion": "score", "calibration": "empirical"},
    {"criterion": "score", "calibration": "phantom"},
    {"criterion": "drift", "calibration": "theory"},
    {"criterion": "drift", "calibration": "empirical"},
    {"criterion": "wald+score"},
    {"criterion": "events", "calibration": "theory"},
    {"criterion": "events", "calibration": "phantom"},
]


def trained(
    build: Callable[[torch.Generator], Task], optimizer: str, seed: int, steps: int, granularity: str, place: str
) -> Task:
    """Trains a student on fresh samples with unit noise, recorded; the learning rate falls to 0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    task = build(generator)
    parameters = [p for p in task.student.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](parameters)
    gradloc.wrap(
        stepper,
        task.student,
        run=place,
        granularity=granularity,
        every=1,
        update_every=1,
        firings=False,
        phantoms=granularity == "element",
        flush_every=steps // 20,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / steps)
    for _ in range(steps):
        x = torch.randn(BATCH, task.inputs, generator=generator)
        with torch.no_grad():
            target = task.teacher(x)
            target = target + torch.randn(target.shape, generator=generator)
        loss = 0.5 * (task.student(x) - target).square().sum(1).mean()  # the negative log-likelihood at unit noise
        loss.backward()
        stepper.step()
        schedule.step()
        stepper.zero_grad()
    gradloc.recorder_of(stepper).close()
    return task


def auc(statistic: np.ndarray, truth: np.ndarray) -> float:
    """Chance that a true dependency has the larger statistic than a false one."""
    if truth.all() or not truth.any():
        return float("nan")
    ranks = stats.rankdata(statistic)
    positives = int(truth.sum())
    return float((ranks[truth.ravel()].sum() - positives * (positives + 1) / 2) / positives / (truth.size - positives))


def tables(run: gradloc.Run, task: Task, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every test and decision about one training."""
    for null, truth in task.truth.items():
        for test in TESTS:
            name = test["criterion"]
            if null == "zero" and ({"score", "drift"} & set(name.split("+"))):
                continue
            support = gradloc.find_support(run, null=null, include=[task.tested], **test)
            assert set(support.tests) == {task.tested}
            found = support.tests[task.tested]
            row: dict[str, Any] = {
                **extra,
                "criterion": name,
                "null": null,
                "calibration": test.get("calibration", "default"),
            }
            row["auc"] = auc(np.abs(found.spread(found.statistic)).ravel(), truth)
            yield row | {"decisions": decided(support, task.tested, truth)}
            if test is TESTS[0]:  # whole inputs: what nothing should read, and what something should
                columns = support.at("column")
                whole = columns.tests[task.tested]
                inputs = np.broadcast_to(truth.any(axis=0), truth.shape)
                yield row | {
                    "granularity": "column",
                    "auc": auc(whole.statistic.ravel(), truth.any(axis=0)),
                    "decisions": decided(columns, task.tested, inputs),
                }


def decided(support: gradloc.Support, name: str, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """What every correction and alpha makes of the p-values."""
    decisions = {}
    for correction in CORRECTIONS:
        for alpha in ALPHAS:
            outcome = support.tests[name].spread(support.outcomes(alpha, correction)[name])
            supported = outcome > 0
            wrong, right = int((supported & ~truth).sum()), int((supported & truth).sum())
            removed = outcome == UNSUPPORTED
            decisions[f"{correction} {alpha}"] = {
                "fdp": wrong / max(1, wrong + right),
                "power": right / truth.sum() if truth.any() else math.nan,
                "removed_wrongly": int((removed & truth).sum()) / max(1, int(removed.sum())),
            }
    return decisions


def one(job: tuple[str, str, int, int, bool]) -> list[dict[str, Any]]:
    setting, optimizer, seed, steps, longer = job
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        task = trained(SETTINGS[setting], optimizer, seed, steps, "element", f"{place}/e")
        run = gradloc.load_run(f"{place}/e")
        names = {"setting": setting, "optimizer": optimizer, "granularity": "element", "windows": "all", "steps": steps}
        null = next(iter(task.truth))
        default = TESTS[0]
        if longer:
            support = gradloc.find_support(run, null=null, include=[task.tested], **default)  # type: ignore[arg-type]
            rows.append(ablation(support, task, names, default, null))
            return [{**row, "seed": seed} for row in rows]
        rows += tables(run, task, names)
        for baseline in ("saliency", "magnitude", "magnitude_increase", "movement", "random"):
            score = baseline_auc(run, task, baseline, null)
            rows.append({**names, "criterion": baseline, "null": null, "calibration": "", "auc": score})
        if setting in ("groups", "fine_tune") and optimizer in ("sgd momentum", "adamw 0.1"):
            last = len(run.store.windows())
            late = [t for t in TESTS if t["criterion"] == "wald"]
            for test in late:
                support = gradloc.find_support(
                    run, null=null, include=[task.tested], windows=(last * 3 // 4, last), **test
                )
                rows.append(ablation(support, task, {**names, "windows": "last quarter"}, test, null))
            trained(SETTINGS[setting], optimizer, seed, steps, "tile", f"{place}/t")
            for test in late:
                support = gradloc.find_support(f"{place}/t", null=null, include=[task.tested], **test)
                rows.append(ablation(support, task, {**names, "granularity": "tile"}, test, null))
    return [{**row, "seed": seed} for row in rows]


def baseline_auc(run: gradloc.Run, task: Task, criterion: str, null: str) -> float:
    """Of a score without p-values, from how it orders dependencies: the density at which each is kept."""
    scores, _ = score(work_on(run, task.tested, null, criterion))
    return auc(scores[task.tested].ravel(), task.truth[null])


def work_on(run: gradloc.Run, name: str, null: str, criterion: str = "saliency") -> Work:
    """One parameter's."""
    request = SelectionRequest(criterion, null, density=0.5, include=(name,))  # type: ignore[arg-type]
    return Work(run.store, request, tuple(groups_of(run.store, request)))


def ablation(
    support: gradloc.Support, task: Task, names: dict[str, Any], test: dict[str, Any], null: str
) -> dict[str, Any]:
    found, truth = support.tests[task.tested], task.truth[null]
    supported = found.spread(support.outcomes(0.05)[task.tested]) > 0
    wrong, right = int((supported & ~truth).sum()), int((supported & truth).sum())
    decision = {"fdp": wrong / max(1, wrong + right), "power": right / truth.sum(), "removed_wrongly": math.nan}
    return {
        **names, "criterion": test["criterion"], "null": null, "calibration": test["calibration"],
        "auc": auc(np.abs(found.spread(found.statistic)).ravel(), truth), "decisions": {"bh 0.05": decision},
    }  # fmt: skip


def mean_and_error(values: list[float]) -> list[float | None]:
    """Mean and its Monte-Carlo standard error; None where there is no value."""
    known = np.array([v for v in values if not math.isnan(v)])
    if not known.size:
        return [None, None]
    return [
        round(float(known.mean()), 4),
        round(float(known.std(ddof=1) / math.sqrt(known.size)), 4) if known.size > 1 else None,
    ]


KEYS = ("setting", "optimizer", "criterion", "null", "calibration", "granularity", "windows", "steps")


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    table = []
    for key, members in groups.items():
        entry: dict[str, Any] = {
            **dict(zip(KEYS, key, strict=True)),
            "seeds": len(members),
            "auc": mean_and_error([m["auc"] for m in members]),
        }
        for decision in members[0].get("decisions", {}):
            entry[decision] = {
                what: mean_and_error([m["decisions"][decision][what] for m in members])
                for what in ("fdp", "power", "removed_wrongly")
            }
        table.append(entry)
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--longer", type=int, nargs="*", default=[3000, 6000], help="steps, for the default at groups")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    options = parser.parse_args()
    jobs = [
        (setting, optimizer, seed, options.steps, False)
        for setting in options.settings for optimizer in options.optimizers for seed in range(options.seeds)
    ]  # fmt: skip
    if "groups" in options.settings:
        some = [optimizer for optimizer in ("sgd momentum", "adamw 0.1") if optimizer in options.optimizers]
        jobs += [
            ("groups", o, seed, steps, True) for steps in options.longer for o in some for seed in range(options.seeds)
        ]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = [row for found in pool.map(one, jobs) for row in found]
    print_table({**provenance(), "seeds": options.seeds, "steps": options.steps}, summarised(rows))


if __name__ == "__main__":
    main()
