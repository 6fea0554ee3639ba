"""What each command can be told: its settings, with types and defaults that Hydra checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class Demo:
    """Train, record, anneal and route a small GPT on the standard library's source."""

    run: str = "runs/demo"
    quick: bool = False
    json: bool = False


@dataclass
class Report:
    """Summarise a run, and write its page."""

    run: str = MISSING
    html: str | None = None
    masks: str | None = None
    plan: str | None = None
    wandb: bool = False
    tensorboard: str | None = None
    csv: str | None = None
    skip_damaged: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class Compare:
    """Runs of one model side by side, with a page; differences are taken from the first."""

    runs: list[str] = MISSING
    html: str | None = None
    out: str | None = None
    wandb: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class RecordPlan:
    """What recording a model will cost in memory, disk and time, before training."""

    model: str = MISSING
    step_seconds: float | None = None
    granularity: str = "tile"
    every: int | None = None
    overhead: float = 0.01
    flush_every: int = 100
    update_every: int = 16
    json: bool = False


@dataclass
class Analyze:
    """Locality curves of a run, as a table (.csv or .parquet with out=)."""

    run: str = MISSING
    out: str | None = None
    roll_up: bool = False
    skip_damaged: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class Masks:
    """Which dependencies training supported."""

    run: str = MISSING
    preset: str | None = None
    criterion: str | None = None
    null: str = "zero"
    policy: str | None = None
    alpha: float | None = None
    density: float | None = None
    budget: int | None = None
    scope: str = "global"
    granularity: str = "dependency"
    residual_edges: bool = False
    calibration: str | None = None
    samples_per_step: int | None = None
    correction: str | None = None
    include: list[str] | None = None
    engine: str = "local"
    out: str | None = None
    skip_damaged: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class Decompose:
    """Group units into blocks; exit code 1 if there is no structure beyond chance."""

    run: str = MISSING
    preset: str | None = None
    kind: str = "structural"
    blocks: Any = "auto"
    keep: float | None = None
    form: str = "mixed"
    operators: list[str] | None = None
    include: list[str] | None = None
    out: str | None = None
    seed: int = 0
    skip_damaged: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class Search:
    """Which static blocks, or fewer units, each operator should run in: kept evidence and measured latency side by side."""

    run: str = MISSING
    model: str = MISSING
    keep: float | None = None
    latency: float | None = None
    tokens: list[int] | None = None
    forms: list[str] | None = None
    blocks: list[int] | None = None
    hub: float = 0.25
    overlap: float = 1.5
    alpha: float = 0.05
    shuffles: int = 19
    operators: list[str] | None = None
    include: list[str] | None = None
    out: str | None = None
    seed: int = 0
    skip_damaged: bool = False
    overwrite: bool = False
    json: bool = False


@dataclass
class Anneal:
    """Take what masks or a plan leave out away while your own training goes on; exit code 1 if the gate stopped it."""

    stage: str = MISSING
    masks: str | None = None
    plan: str | None = None
    schedule: str = "cubic"
    steps: int = 1000
    budget: float = 0.01
    validations: int = 1
    validate_every: int | None = None
    patience: int = 2
    settle: float | None = None
    distill: float = 0.0
    temperature: float = 2.0
    refine: int | None = None
    penalty: float = 0.0
    out: str = "annealed"
    resume: bool = False
    json: bool = False


@dataclass
class Verify:
    """Build a plan's operators from a run's last weights, or a file's, and check them; exit code 1 if a check fails."""

    plan: str = MISSING
    run: str | None = None
    weights: str | None = None
    json: bool = False


@dataclass
class Doctor:
    """Whether everything that gradloc needs is here and works; exit code 1 if something doesn't."""

    path: str = "runs"
    json: bool = False


@dataclass
class Completion:
    """A script that completes commands, settings and their values with Tab."""

    shell: str = MISSING
    json: bool = False
