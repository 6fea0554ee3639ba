"""Recording: an optimizer in a loop, a forward pass, and what it will cost."""

from __future__ import annotations

import atexit
import datetime
import itertools
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradloc.core.names import meant
from gradloc.core.run_info import ParameterInfo, RunInfo
from gradloc.core.wrappers import inner_model, plain_name, torch_optimizer
from gradloc.errors import AlreadyWrappedError, ConfigError, NotRecordingError
from gradloc.record.config import RecordConfig
from gradloc.record.estimate import RecordEstimate, estimate
from gradloc.record.forward import ForwardRecorder
from gradloc.record.parameters import foreign_parameters, new_parameters, parameter_infos
from gradloc.record.processes import World
from gradloc.record.recorder import Recorder, find_recorder
from gradloc.record.schedule import AIM
from gradloc.record.sites import COMPILED, firing_sites
from gradloc.route.find import find_operators
from gradloc.route.mixtures import find_mixtures
from gradloc.store.folder import absolute
from gradloc.store.schema import cell_bytes
from gradloc.store.writer import RunDirectoryWriter
from gradloc.version import __version__

# Held strongly, so that a recorder whose optimizer went out of scope still flushes at exit. A closed one holds no tensors.
RECORDINGS: dict[Recorder, str | Path] = {}


def wrap(optimizer: Any, model: nn.Module, run: str | Path, **settings: Any) -> Any:
    """Records where `optimizer` changes `model`. Returns the same optimizer; the training loop stays as it is.

    Args:
        optimizer: a torch optimizer, Accelerate's or Opacus's wrapper around one, or a list of those that train one model
            (a GAN's two, or one per parameter when the optimizer runs inside backward).
        model: gives the parameters their names. With several processes, wrap on every one of them, after the model has been
            made distributed.
        run: directory of the run, new or empty; it is made. Or a prefix in an object store, ``s3://bucket/prefix``.
        **settings: every field of `RecordConfig`, e.g. ``granularity="tile"``, ``every=None``, ``overhead=0.01``.

    Returns:
        `optimizer` itself, with hooks attached.

    Raises:
        UnsupportedError: not a torch optimizer.
        AlreadyWrappedError: it has a recorder.
        ConfigError: a setting isn't allowed; all faults are named.
        ModelMismatchError: the optimizer has no parameter of `model`. Where it has others besides, a warning says so. Or `resume` names
            a run of another model.
        RunExistsError: `run` holds a run already, or another process writes it.
        StoreError: `run` can't be written.

    Examples:
        >>> import tempfile
        >>> model = nn.Linear(4, 2)
        >>> optimizer = wrap(torch.optim.AdamW(model.parameters()), model, run=tempfile.mkdtemp())
        >>> model(torch.ones(1, 4)).sum().backward(); optimizer.step()
        >>> recorder_of(optimizer).close()
    """
    optimizers = [torch_optimizer(one) for one in _as_list(optimizer)]
    if not optimizers:
        raise ConfigError("optimizer is an empty list; pass the optimizers that train the model.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass the torch.nn.Module that the optimizer trains.")
    if any(find_recorder(one) is not None for one in optimizers):
        raise AlreadyWrappedError(
            "this optimizer is wrapped already; gradloc.recorder_of(optimizer).close() ends its recorder."
        )
    config = _config(settings)
    foreign = foreign_parameters(optimizers, model)
    world = World.current()
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in optimizers))
    info = _describe(model, config, kinds, new_parameters(optimizers, model), world.size)
    writer = _open_writer(run, info, config.resume, world)
    try:
        recorder = Recorder(optimizers, model, config, writer, writer.info, world)
    except BaseException:
        writer.abandon()
        raise
    try:
        for problem in (foreign, COMPILED if COMPILED in info.notes else None):
            if problem and world.rank == 0:
                recorder.remark(problem)
    except Warning:  # where warnings are errors, nothing stays attached
        recorder.close()
        writer.abandon()
        raise
    if not RECORDINGS:
        atexit.register(_close_all)
    for earlier in [known for known in RECORDINGS if known.closed]:
        del RECORDINGS[earlier]
    RECORDINGS[recorder] = absolute(run)
    return optimizer


def _describe(
    model: nn.Module, config: RecordConfig, optimizer: str, parameters: tuple[ParameterInfo, ...], world_size: int
) -> RunInfo:
    """A new run's description."""
    chains, _ = find_operators(model)
    sites, notes = firing_sites(model, chains, config)
    return RunInfo(
        run_id=uuid.uuid4().hex[:12],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        gradloc_version=__version__,
        torch_version=torch.__version__,
        optimizer=optimizer,
        granularity=config.granularity,
        rules=config.rules_named,
        config=config.to_dict(),
        parameters=parameters,
        chains=chains,
        sites=sites,
        mixtures=find_mixtures(model),
        notes=notes,
        world_size=world_size,
    )


def record_forward(model: nn.Module, run: str | Path, **settings: Any) -> ForwardRecorder:
    """Records which units are active for which token while `model` is used, without training it.

    Use it as a context, or call ``.close()`` on what it returns. The run holds firings only: `plan_blocks` with
    ``kind="conditional"`` can use it, masks need a training.

    Args:
        model: the model; every forward pass counts as a step.
        run: directory or prefix of a new run.
        **settings: of `RecordConfig`: ``every``, ``flush_every``, ``firing_tokens``, ``firing_modules``, ``firing_heads``, ``seed``, ``on_error``.

    Raises:
        ConfigError: a setting isn't allowed, or the model has nothing to watch.

    Examples:
        >>> import tempfile, gradloc
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> place = tempfile.mkdtemp()
        >>> with record_forward(model, place):
        ...     _ = model(torch.randn(5, 4))
        >>> gradloc.load_run(place).firings("0").shape
        (5, 8)
    """
    config = _config(settings)
    described = parameter_infos({plain_name(n): p for n, p in inner_model(model).named_parameters()}, model)
    info = _describe(model, config, "", described, 1)
    if not info.sites:
        raise ConfigError("; ".join(info.notes) + ".")
    return ForwardRecorder(model, config, _open_writer(run, info, config.resume, World()), info)


def record_plan(model: nn.Module, step_seconds: float | None = None, **settings: Any) -> RecordEstimate:
    """What recording `model` with these settings will cost in memory, disk and time, before training.

    Builds the accumulators on the model's device and times them on random gradients; the model stays as it is.

    Args:
        model: every parameter that requires a gradient is counted.
        step_seconds: a training step without recording, to say how often the budget allows an observation.
        **settings: as for `wrap`.

    Raises:
        ConfigError: a setting isn't allowed, or nothing can be trained.

    Examples:
        >>> record_plan(nn.Linear(64, 64), granularity="element").cells
        4160
    """
    config = _config(settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass the torch.nn.Module that you will train.")
    if step_seconds is not None and not (step_seconds > 0 and math.isfinite(step_seconds)):
        raise ConfigError(f"step_seconds={step_seconds!r} must be a number of seconds above 0.")
    chosen = {plain_name(name): p for name, p in inner_model(model).named_parameters() if p.requires_grad}
    if not chosen:
        raise ConfigError("the model has no parameter that requires a gradient, so there is nothing to record.")
    described = list(zip(parameter_infos(chosen, model), chosen.values(), strict=True))
    return estimate(described, config, AIM, step_seconds, cell_bytes(config.rules_named))


def _config(settings: Mapping[str, Any]) -> RecordConfig:
    unknown = set(settings) - set(RecordConfig.__dataclass_fields__)
    if unknown:
        raise ConfigError(
            f"unknown setting {', '.join(f'{name}{meant(name, RecordConfig.__dataclass_fields__)}' for name in sorted(unknown))}; settings: {', '.join(RecordConfig.__dataclass_fields__)}."
        )
    return RecordConfig(**settings)


def _as_list(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


_ATTACHED = itertools.count()


def _open_writer(path: str | Path, info: RunInfo, resume: bool | int, world: World) -> RunDirectoryWriter:
    """This process's writer; the first process makes the run, and tells the others its name and where it goes on."""
    word = f"attach/{next(_ATTACHED)}"
    if world.rank == 0:
        writer = RunDirectoryWriter(path, info, resume)
        world.say(word, json.dumps([writer.info.run_id, writer.next_window, writer.last_step, writer.resumed]))
        return writer
    run_id, window, step, resumed = json.loads(world.agree(word, ""))
    return RunDirectoryWriter(path, replace(info, run_id=run_id), resumed and resume, world.rank, (window, step))


def _close_all() -> None:
    """Closes every recorder, whatever becomes of the others; what failed first is raised at the end."""
    failed: BaseException | None = None
    for recorder in RECORDINGS:
        try:
            recorder.close()
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed


def recorder_of(optimizer: Any) -> Recorder:
    """The recorder that `wrap` attached; ``.close()`` flushes and detaches it, ``.flush()`` only flushes.

    Raises:
        NotRecordingError: the optimizer has none.
    """
    recorder = find_recorder(optimizer)
    if recorder is None:
        raise NotRecordingError("this optimizer has no recorder; call gradloc.wrap(optimizer, model, run=…) first.")
    return recorder
