"""Every command: its settings, what it does, and how it is described to people, shells and pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradloc.cli import settings as of
from gradloc.cli import stages
from gradloc.cli.answers import Answer
from gradloc.cli.outputs import check_directory, check_file


@dataclass(frozen=True)
class Command:
    """A command, and how it is described.

    Args:
        settings, run: its settings and what it does with them.
        example: a line that works.
        about: what each setting is.
        files: settings that name a file to write, with the suffix that a sweep gives to each job's.
        directories: settings that name a directory to write into.
        reads: settings that name a file or a directory to read.
        choices: values that a setting may have, where they can be listed.
        presets: settings by the name of a preset; what is given beside it wins.
        sweeps: an example of a sweep; empty where one run at a time makes sense only.
    """

    settings: type
    run: Callable[[Any], Answer]
    example: str
    about: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    directories: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweeps: str = ""

    def check_outputs(self, settings: Any) -> None:
        """Refuses outputs that can't be written, or are there already; before any work.

        Raises:
            ConfigError: naming the setting.
        """
        for setting in self.files:
            if place := getattr(settings, setting):
                check_file(setting, place, settings.overwrite)
        for setting in self.directories:
            if place := getattr(settings, setting):
                check_directory(setting, place)


_RUN = "the run's directory, as passed to wrap(run=…)"
_SKIP = "leave damaged shards out and name them, instead of stopping"
_OUT = "write the result to this file; in a sweep, to this new directory"
_HTML = "in a sweep, a new directory of pages"
_OVERWRITE = "replace files that are there already"
_PRESET = "settings that belong together"
_GRANULARITIES = ("element", "tile", "row", "column", "unit")
COMMANDS = {
    "demo": Command(
        of.Demo, stages.demo, "gradloc demo quick=true",
        about={"run": "directory of the run; a number is appended if it is taken", "quick": "the same path in under 90 seconds on an idle machine"},
    ),
    "record-plan": Command(
        of.RecordPlan, stages.record_plan, "gradloc record-plan model=my_package.model:build step_seconds=0.3",
        about={"model": "module:function that returns the model", "step_seconds": "a training step without recording", "granularity": "element, tile, row, column or unit", "every": "a fixed cadence instead of a budget", "overhead": "the budget, a share of training time", "flush_every": "observed steps in a window", "update_every": "observed steps in which every update is measured once"},
        choices={"granularity": _GRANULARITIES},
        sweeps="gradloc record-plan model=my_package.model:build granularity=tile,row,unit --multirun",
    ),
    "report": Command(
        of.Report, stages.report, "gradloc report run=runs/demo",
        about={"run": _RUN, "html": f"the page; <run>/report.html by default; {_HTML}", "masks": "a file from gradloc masks, shown on the page", "plan": "a file from gradloc decompose or search, shown on the page", "wandb": "log curves to W&B", "tensorboard": "write curves for TensorBoard into this directory", "csv": "write curves and tables as CSV into this directory", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"html": ".html"}, directories=("tensorboard", "csv"), reads=("run", "masks", "plan"),
        sweeps="gradloc report run=runs/a,runs/b html=pages --multirun",
    ),
    "compare": Command(
        of.Compare, stages.compare, "gradloc compare runs=[runs/a,runs/b] html=compare.html",
        about={"runs": "two or more runs in brackets", "html": "the page", "out": "every difference, as a .csv file", "wandb": "log curves to W&B", "overwrite": _OVERWRITE},
        files={"html": ".html", "out": ".csv"}, reads=("runs",),
    ),
    "analyze": Command(
        of.Analyze, stages.analyze, "gradloc analyze run=runs/demo out=locality.csv",
        about={"run": _RUN, "out": _OUT, "roll_up": "keep the sums of all windows beside the shards, so that later questions read new shards only", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".csv"}, reads=("run",),
        sweeps="gradloc analyze run=runs/a,runs/b out=curves --multirun",
    ),
    "masks": Command(
        of.Masks, stages.masks, "gradloc masks run=runs/demo density=0.5 out=masks.safetensors",
        about={"run": _RUN, "preset": f"{_PRESET}: half, 2:4, units, tested or revert", "criterion": "wald, score, drift, events or distribution; with density or budget saliency (the default), or magnitude, magnitude_increase, movement, random", "null": "zero (remove) or init (revert)", "policy": "with alpha, conservative (the default) or aggressive", "alpha": "error rate; 0.05 if density isn't given", "density": "share to keep", "budget": "number of parameters to keep", "scope": "global, layer or unit, with density or budget", "granularity": "dependency, element, tile, row, column, unit, or n:m such as 2:4", "residual_edges": "decide both weights of a feed-forward network together, edge by edge", "calibration": "empirical, init or theory; the criterion's own by default", "samples_per_step": "samples whose mean loss a step follows, for the theoretical Wald test", "correction": "with alpha, bh (the default), by, storey, bonferroni, holm or none", "include": "names or globs, e.g. '[blocks.*]'; without it weight matrices and kernels, not embeddings", "engine": "local, or ray for a cluster", "out": _OUT, "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".safetensors"}, reads=("run",),
        choices={"criterion": ("saliency", "magnitude", "magnitude_increase", "movement", "random", "wald", "score", "drift", "events", "distribution"), "null": ("zero", "init"), "policy": ("conservative", "aggressive"), "scope": ("global", "layer", "unit"), "granularity": ("dependency", *_GRANULARITIES, "2:4"), "calibration": ("empirical", "init", "theory"), "correction": ("bh", "by", "storey", "bonferroni", "holm", "none"), "engine": ("local", "ray")},
        presets={
            "half": {"density": 0.5},
            "2:4": {"granularity": "2:4"},
            "units": {"density": 0.5, "granularity": "unit"},
            "tested": {"alpha": 0.05, "policy": "conservative"},
            "revert": {"null": "init", "density": 0.05},
        },
        sweeps="gradloc masks run=runs/demo density=0.3,0.5,0.7 out=masks --multirun",
    ),
    "decompose": Command(
        of.Decompose, stages.decompose, "gradloc decompose run=runs/demo kind=conditional blocks=16 out=plan.safetensors",
        about={"run": _RUN, "preset": f"{_PRESET}: static, overlapping or routed", "kind": "structural or conditional", "blocks": "a number, or auto", "keep": "share that runs per token (conditional)", "form": "mixed, disjoint or overlapping (structural)", "operators": "kinds to plan for (structural): [chain, gated, attention, conv, recurrent, linear, embedding]", "include": "names or globs of modules", "out": _OUT, "seed": "of the search", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".safetensors"}, reads=("run",),
        choices={"kind": ("structural", "conditional"), "blocks": ("auto",), "form": ("mixed", "disjoint", "overlapping")},
        presets={
            "static": {"kind": "structural", "blocks": "auto", "form": "mixed"},
            "overlapping": {"kind": "structural", "blocks": "auto", "form": "overlapping"},
            "routed": {"kind": "conditional", "blocks": 16, "keep": 0.25},
        },
        sweeps="gradloc decompose run=runs/demo kind=conditional blocks=8,16,32 out=plans --multirun",
    ),
    "search": Command(
        of.Search, stages.search, "gradloc search run=runs/demo model=my_package.model:build keep=0.25 out=plan.safetensors",
        about={"run": _RUN, "model": "module:function that returns the model; it gets the run's last weights, and latency is measured where it is", "keep": "the target: largest share of an operator's weights", "latency": "or: largest share of the dense operator's time", "tokens": "numbers of tokens that are measured; [1,16,256] by default", "forms": "of blocks: [mixed, disjoint, overlapping]; all by default", "blocks": "numbers of blocks to try, such as [2,4,8]", "hub": "largest share of units in all blocks; 0 for none", "overlap": "of overlapping blocks: units that they take together, over all", "alpha": "level of the test against shuffles", "shuffles": "of that test", "operators": "kinds to plan for: [chain, gated, attention, conv, recurrent, linear, embedding]", "include": "names or globs of modules", "out": _OUT, "seed": "of the search", "skip_damaged": _SKIP, "overwrite": _OVERWRITE},
        files={"out": ".safetensors"}, reads=("run",),
        sweeps="gradloc search run=runs/demo model=my_package.model:build keep=0.25,0.5 out=plans --multirun",
    ),
    "anneal": Command(
        of.Anneal, stages.anneal, "gradloc anneal stage=my_package.training:stage masks=masks.safetensors steps=1000",
        about={"stage": "module:function of yours that returns (model, optimizer, train_step, validate): train_step() takes one optimizer step, validate() returns a loss or is None; a fifth value may name what resume=true needs besides", "masks": "a file from gradloc masks", "plan": "a file from gradloc decompose or search", "schedule": "linear, cosine, cubic or exponential", "steps": "optimizer steps if the gate never objects", "budget": "allowed relative increase of validate()", "validations": "calls of validate() at each look; above 1 their standard error counts against the stage", "validate_every": "steps between looks; a tenth of steps by default", "patience": "rollbacks in a row before it stops", "settle": "share of the steps at the exact result", "distill": "weight of distillation from the model as it was, which a train_step(annealer) adds to its loss; 0 for none", "temperature": "of the two distributions that distillation compares", "refine": "steps between refinements of a structural plan's blocks; none by default", "penalty": "of a group lasso on what hidden units have outside their blocks (structural)", "out": "a new directory for the weights, the masks or the plan with its routers, and the log of decisions; in a sweep, of one for each job", "resume": "go on with the stage that was interrupted in out"},
        directories=("out",), reads=("masks", "plan"),
        choices={"schedule": ("linear", "cosine", "cubic", "exponential")},
        sweeps="gradloc anneal stage=my_package.training:stage masks=masks.safetensors schedule=linear,cubic --multirun",
    ),
    "verify": Command(
        of.Verify, stages.verify, "gradloc verify plan=plan.safetensors run=runs/demo",
        about={"plan": "a file from gradloc decompose, search or anneal, or plan.save(…)", "run": _RUN, "weights": "instead, a safetensors file of the model, such as gradloc anneal's"},
        reads=("plan", "run", "weights"),
        sweeps="gradloc verify plan=a.safetensors,b.safetensors run=runs/demo --multirun",
    ),
    "doctor": Command(
        of.Doctor, stages.doctor, "gradloc doctor path=runs",
        about={"path": "where runs would be written: a directory, or s3://bucket/prefix"}, reads=("path",),
    ),
    "completion": Command(
        of.Completion, stages.completion, "gradloc completion bash",
        about={"shell": "bash, zsh or fish"}, choices={"shell": ("bash", "zsh", "fish")},
    ),
}  # fmt: skip
