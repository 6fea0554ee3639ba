"""An annealing stage on disk, so that it can go on after it was interrupted."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradloc.cli.outputs import check_directory, existing_parent
from gradloc.cli.stage_code import StageCode
from gradloc.core.checkpoint import load_state, save_state
from gradloc.core.masks import MaskSet
from gradloc.core.names import printable
from gradloc.errors import ConfigError, GradlocError, ModelMismatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline.annealing import Annealer

STATE_FILE, TEACHER_FILE, LOG_FILE = "state.safetensors", "teacher.safetensors", "log.jsonl"
KIND, TEACHER_KIND = "annealing stage", "teacher"


def check_out(out: str, resume: bool) -> bool:
    """Whether there is a stage to go on with in the directory `out`; the directory is new otherwise, or holds what a stage left that was killed
    before it was saved, if that is to be resumed.

    Raises:
        ConfigError: something else is there, or a stage that isn't to be resumed.
    """
    if not (Path(out) / STATE_FILE).is_file():
        check_directory("out", out, empty=not resume)
        if Path(out).is_dir() and set(Path(out).iterdir()) - set(_of_beginning(Path(out))):
            raise ConfigError(
                f"out={out!r} holds something, but no interrupted stage; name the directory of one, or a new one."
            )
        return False
    if not resume:
        raise ConfigError(
            f"out={out!r} holds an interrupted stage; add resume=true to go on with it, or name a new directory for the result."
        )
    check_directory("out", out)
    return True


def _of_beginning(folder: Path) -> list[Path]:
    """What a stage leaves that is killed before it is saved for the first time, or while it is saved."""
    parts = [path for name in (STATE_FILE, TEACHER_FILE) for path in folder.glob(f".{name}.*.tmp")]
    return [path for path in (folder / LOG_FILE, folder / TEACHER_FILE, *parts) if path.is_file()]


class StageCheckpoint:
    """Saves a stage as it is between two steps, and brings it back.

    What comes back: the model's parameters and buffers, the optimizers, the annealer with its last good state, what `StageCode.kept` holds,
    and the states of torch's, NumPy's and Python's global random generators. Whatever else the user's code remembers begins anew.

    Args:
        folder: of the stage.
        code: the user's.
        target: masks or a plan.
        settings: of `gradloc.Annealer`.
    """

    def __init__(self, folder: Path, code: StageCode, target: MaskSet | BlockPlan, settings: Mapping[str, Any]) -> None:
        self._folder, self._code = folder, code
        self._above, log = existing_parent(folder), folder / LOG_FILE
        self._log = log.read_bytes() if log.is_file() else None
        self._stage, self._has_teacher = _description(code, target, settings), bool(settings.get("distill"))
        self.step: int | None = None
        """That was saved last."""

    # ---- going on

    def read(self) -> dict[str, Any]:
        """What was saved, for `load`; and gives the model the weights that its teacher is to have.

        Raises:
            StoreError: a file is damaged.
            ModelMismatchError: it is of another stage; with all differences.
        """
        state = load_state(self._folder / STATE_FILE, KIND)
        differences = _differences(state["stage"], self._stage)
        if differences:
            raise ModelMismatchError(
                f"out={str(self._folder)!r} holds another stage: {'; '.join(differences)}. Go on with what that one began with, or name "
                "a new directory."
            )
        if self._has_teacher:
            _put(self._code.model, load_state(self._folder / TEACHER_FILE, TEACHER_KIND))
        return state

    def load(self, state: dict[str, Any], annealer: Annealer) -> None:
        """Puts everything where it was; the log's file too, which an interruption has added to."""
        from gradloc.core.wrappers import torch_optimizer

        _put(self._code.model, state["model"])
        for optimizer, saved in zip(_listed(self._code.optimizer), state["optimizers"], strict=True):
            torch_optimizer(optimizer).load_state_dict(saved)
        for name, thing in self._code.kept.items():
            _give(thing, state["kept"][name])
        annealer.load_state_dict(state["annealer"])
        annealer.write_log()
        self.step = annealer.steps_taken
        _set_random(state["random"])  # last: whatever came before may have drawn numbers

    # ---- saving

    def save_teacher(self) -> None:
        """Before the first step, what the teacher of a resumed stage is made from."""
        if self._has_teacher:
            self._write(TEACHER_FILE, TEACHER_KIND, _tensors(self._code.model))

    def save(self, annealer: Annealer, good: bool) -> None:
        """Replaces what was saved. A failure is said and doesn't end the stage: what was saved before is still there.

        Args:
            good: with the last good state; at a look, the stage is in it.
        """
        from gradloc.core.wrappers import torch_optimizer

        state = {
            "stage": self._stage,
            "model": _tensors(self._code.model),
            "optimizers": [torch_optimizer(one).state_dict() for one in _listed(self._code.optimizer)],
            "kept": {name: _taken(thing) for name, thing in self._code.kept.items()},
            "annealer": annealer.state_dict(good=good),
            "random": _random(),
        }
        if self._write(STATE_FILE, KIND, state):
            self.step = annealer.steps_taken

    def clear(self) -> None:
        """Before a stage begins: without what another left that got no further."""
        for path in _of_beginning(self._folder):
            path.unlink(missing_ok=True)
        self._log = None

    def remove(self) -> None:
        """When the stage is over."""
        for path in (self._folder / STATE_FILE, *_of_beginning(self._folder)):
            if path.name != LOG_FILE:
                path.unlink(missing_ok=True)
        self.step = None

    def put_back(self) -> None:
        """Leaves the directory as it was found, where nothing has been annealed: a stage that begins found it new, and one that goes on has
        added to the log alone.
        """
        if (going_on := self._log) is not None:
            (self._folder / LOG_FILE).write_bytes(going_on)
            return
        for name in (STATE_FILE, TEACHER_FILE, LOG_FILE):
            (self._folder / name).unlink(missing_ok=True)
        for folder in (self._folder, *self._folder.parents):
            if folder.absolute() == self._above.absolute() or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()

    def _write(self, name: str, kind: str, state: dict[str, Any]) -> bool:
        try:
            save_state(self._folder / name, kind, state)
        except GradlocError as error:
            since = "can't be resumed" if self.step is None else f"can only be resumed from step {self.step}"
            warnings.warn(f"gradloc: the stage goes on, but {since}: {error}", RuntimeWarning, stacklevel=3)
            return False
        return True


def _description(code: StageCode, target: MaskSet | BlockPlan, settings: Mapping[str, Any]) -> dict[str, str]:
    """What a stage must have in common with another to go on with its state, in words."""
    from gradloc.anneal.stage_state import digest_of
    from gradloc.core.wrappers import torch_optimizer

    optimizers = [torch_optimizer(one) for one in _listed(code.optimizer)]
    kinds = (
        f"{type(one).__name__} of {sum(len(g['params']) for g in one.param_groups)} parameters" for one in optimizers
    )
    return {
        **{name: _words(value) for name, value in settings.items()},
        "masks" if isinstance(target, MaskSet) else "plan": f"with digest {digest_of(target)}",
        "validate": "None" if code.validate is None else "a function",
        "optimizer": ", ".join(kinds),
        "kept": ", ".join(sorted(code.kept)) or "nothing",
        **{f"parameter {name}": f"{_kind(weight)}" for name, weight in code.model.named_parameters()},
    }


def _words(value: Any) -> str:
    return json.dumps(value)


def _kind(weight: Tensor) -> str:
    return f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}"


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    names = [*theirs, *(name for name in ours if name not in theirs)]
    return [
        f"{printable(name)}: {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def _listed(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict leaves out among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _put(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """In place, as optimizers hold parameters. A buffer may have got another shape since, or be new."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
        for name, buffer in list(model.named_buffers()):
            if name in saved and saved[name].shape == buffer.shape:
                buffer.copy_(saved[name])
            elif name in saved:
                place, _, own = name.rpartition(".")
                model.get_submodule(place)._buffers[own] = saved[name].to(buffer.device)


def _taken(thing: Any) -> Any:
    from torch import Generator

    return thing.get_state() if isinstance(thing, Generator) else thing.state_dict()


def _give(thing: Any, state: Any) -> None:
    from torch import Generator

    if isinstance(thing, Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)


def _random() -> dict[str, Any]:
    """Of the global generators."""
    import torch

    numpy = np.random.get_state(legacy=False)
    words = {name: np.asarray(value).tolist() for name, value in numpy["state"].items()}
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": words},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random(state: Mapping[str, Any]) -> None:
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


__all__ = ["StageCheckpoint", "check_out"]
