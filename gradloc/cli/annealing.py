"""``gradloc anneal``: the annealing stage around a training step of the user's own.

``stage=module:function`` names the user's code. The function takes nothing and returns ``(model, optimizer, train_step, validate)``:
``train_step()`` takes one optimizer step, ``validate()`` returns a loss (lower is better), or is None for a stage without a gate.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gradloc.cli.outputs import check_directory
from gradloc.cli.progress import bar
from gradloc.errors import ConfigError, GradlocError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from gradloc.anneal.annealer import Annealer
    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan

Parts = tuple["nn.Module", Any, Callable[[], Any], Callable[[], float] | None]


def anneal_stage(
    made: Any, target: MaskSet | BlockPlan, out: str | Path, console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """Runs a stage to its end, and writes what it ended with.

    Args:
        made: what the user's function returned.
        target: masks or a plan.
        out: directory for ``model.safetensors``, ``masks.safetensors`` or ``plan.safetensors``, and ``log.jsonl``.
        console: where the progress bar goes, standard error by default; quiet unless it is a terminal.
        settings: of `gradloc.Annealer`.

    Returns:
        The outcome as plain values; ``completed`` is False if the gate stopped the stage at its last good state.

    Raises:
        ConfigError: `made` isn't what the protocol asks for, or `out` holds a result already.
        GradlocError: the user's code raised an `Exception`; as with all else that ends a stage, what was good until then is written first.
        KeyboardInterrupt: as it came, with a sentence that says so.
    """
    from gradloc.anneal.annealer import Annealer

    model, optimizer, train_step, validate = _parts(made)
    folder = Path(out)
    check_directory("out", str(out), empty=True)
    try:
        annealer = Annealer(model, optimizer, target, validate=validate, log=folder / "log.jsonl", **settings)
    except GradlocError:
        raise
    except Exception as error:
        raise _failure(error, "before annealing began.") from error
    began = perf_counter()
    try:
        with annealer, _bar(annealer, settings.get("steps", 1000), console) as advance:
            while not annealer.done:
                train_step()
                annealer.step()
                advance()
    except BaseException as error:
        _write(annealer, model, folder)
        kept = f"{annealer.outcome}. It is written to {folder}."
        if isinstance(error, KeyboardInterrupt):  # stays one, so that a sweep ends as well
            raise KeyboardInterrupt(f"interrupted at step {annealer.steps_taken}: {kept}") from None
        if isinstance(error, GradlocError) or not isinstance(error, Exception):
            raise
        raise _failure(error, f"at step {annealer.steps_taken}: {kept}") from error
    seconds = perf_counter() - began
    return {
        **_write(annealer, model, folder),
        "completed": annealer.outcome == "completed",
        "outcome": _outcome(annealer),
        "exact": annealer.exact,
        "steps": annealer.steps_taken,
        "remaining": annealer.factor,
        "validation": _accepted(annealer),
        "limit": annealer.log[0]["limit"],
        "seconds": seconds,
        "steps_per_second": annealer.steps_taken / seconds,
    }


def _parts(made: Any) -> Parts:
    from torch import nn

    wanted = "(model, optimizer, train_step, validate)"
    if not isinstance(made, (tuple, list)) or len(made) != 4:
        raise ConfigError(f"stage: the function returned a {type(made).__name__}; it must return {wanted}.")
    model, optimizer, train_step, validate = made
    faults = []
    if not isinstance(model, nn.Module):
        faults.append(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not callable(train_step):
        faults.append(f"train_step is a {type(train_step).__name__}, not a function")
    if validate is not None and not callable(validate):
        faults.append(f"validate is a {type(validate).__name__}, neither a function nor None")
    if faults:
        raise ConfigError(f"stage: of {wanted}, {'; '.join(faults)}.")
    return model, optimizer, train_step, validate


def _failure(error: Exception, when: str) -> GradlocError:
    """The one line about what the user's code raised, with its traceback on standard error, from where that code begins."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    rooms = [str(frame.f_globals.get("__name__", "")).split(".")[0] for frame in frames]
    if set(rooms) - {"gradloc", "torch"}:  # otherwise the fault may be ours
        while error.__traceback__ is not None and rooms.pop(0) == "gradloc":
            error.__traceback__ = error.__traceback__.tb_next
    traceback.print_exception(error)
    return GradlocError(f"your stage raised {type(error).__name__} {when}")


def _write(annealer: Annealer, model: nn.Module, folder: Path) -> dict[str, Any]:
    """The weights, and the masks or the plan with its routers."""
    from safetensors.torch import save_model

    from gradloc.core.plan import BlockPlan
    from gradloc.core.wrappers import own_modules

    folder.mkdir(parents=True, exist_ok=True)
    result = annealer.result
    kind = "plan" if isinstance(result, BlockPlan) else "masks"
    save_model(own_modules(model), str(folder / "model.safetensors"))
    place = result.save(folder / f"{kind}.safetensors")
    annealer.close()
    return {"model": str(folder / "model.safetensors"), kind: str(place), "log": str(folder / "log.jsonl")}


def _outcome(annealer: Annealer) -> str:
    """How the stage ended, and what that means for the file of masks or of a plan beside the weights."""
    from gradloc.core.masks import MaskSet

    if annealer.factor == 0.0:
        return annealer.outcome
    rest = f"{annealer.outcome} (the weights still hold what the"
    if isinstance(annealer.result, MaskSet):
        return f"{rest} masks leave out)"
    return f"{rest} plan leaves out: don't route it with them)"


def _accepted(annealer: Annealer) -> float | None:
    """The last loss that the gate let pass."""
    passed = [entry["validation"] for entry in annealer.log if entry["decision"] in ("start", "continue", "finish")]
    return passed[-1] if passed else None


@contextmanager
def _bar(annealer: Annealer, steps: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Progress in steps of a stage that never rolls back. A rollback sets it back."""
    with bar("annealing", console) as tell:

        def advance() -> None:
            tell(round(annealer.share_done * steps), steps, f", {annealer.factor:.1%} of the unsupported part left")

        yield advance
