"""``gradloc anneal``: the annealing stage around a training step of the user's own.

``stage=module:function`` names the user's code. The function takes nothing and returns ``(model, optimizer, train_step, validate)``, and
what else a resumed stage needs as a fifth value: ``train_step()``, or ``train_step(annealer)``, takes one optimizer step, ``validate()`` returns
a loss (lower is better), or is None for a stage without a gate.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import rich.progress  # noqa: F401  (importing it draws from Python's random numbers, so it comes before the user's code seeds them)

from gradloc.cli.interrupts import put_off
from gradloc.cli.progress import bar
from gradloc.cli.stage_checkpoint import LOG_FILE, StageCheckpoint, check_out
from gradloc.cli.stage_code import StageCode, stage_code
from gradloc.errors import ConfigError, GradlocError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from gradloc.core.masks import MaskSet
    from gradloc.core.plan import BlockPlan
    from gradloc.pipeline.annealing import Annealer


def anneal_stage(
    made: Any,
    target: MaskSet | BlockPlan,
    out: str | Path,
    console: Console | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Runs a stage to its end, and writes what it ended with.

    Meanwhile the stage is saved at each of its looks, and when Ctrl-C or SIGTERM comes, after the step that is being taken.

    Args:
        made: what the user's function returned.
        target: masks or a plan.
        out: directory for ``model.safetensors``, ``masks.safetensors`` or ``plan.safetensors``, and ``log.jsonl``; until the stage is over also for
            ``state.safetensors``, and ``teacher.safetensors`` with ``distill``.
        console: where the progress bar goes, standard error by default; quiet unless it is a terminal.
        resume: go on with the stage that was interrupted in `out`; where there is nothing it begins.
        settings: of `gradloc.Annealer`.

    Returns:
        The outcome as plain values; ``completed`` is False if the gate stopped the stage at its last good state.

    Raises:
        ConfigError: `made` isn't what the protocol asks for, or `out` holds something already.
        ModelMismatchError: `out` holds another stage.
        GradlocError: the user's code raised an `Exception`; as with all else that ends a stage, what was good until then is written first. What
            is raised before the first annealing step, by us or by the user's code, leaves `out` as it was found.
        KeyboardInterrupt: as it came, with a sentence that says so.
    """
    code, folder = stage_code(made, settings.get("distill", 0.0)), Path(out)
    going_on = check_out(str(out), resume)
    checkpoint = StageCheckpoint(folder, code, target, settings)
    annealer = _begun(code, target, checkpoint, going_on, {**settings, "log": folder / LOG_FILE})
    began, first = perf_counter(), annealer.steps_taken
    with put_off() as interrupts:
        try:
            with annealer, _bar(annealer, settings.get("steps", 1000), console) as advance:
                step = code.step_of(annealer)
                while not annealer.done:
                    step()
                    _check_distilled(annealer, first)
                    annealer.step()
                    advance()
                    if annealer.done:
                        break
                    looked = (
                        annealer.log[-1]["step"] == annealer.steps_taken and annealer.log[-1]["decision"] != "refine"
                    )
                    if looked or interrupts.asked:
                        checkpoint.save(annealer, good=not looked)
                    if interrupts.asked:
                        interrupts.end()
        except BaseException as error:
            if isinstance(error, Exception) and annealer.steps_taken == first and not interrupts.asked:
                annealer.close()
                checkpoint.put_back()
                if isinstance(error, GradlocError):
                    raise
                raise _failure(error, f"in its first step; nothing was annealed, and {folder} is as it was.") from error
            _write(annealer, code.model, folder)
            kept = f"{annealer.outcome}. It is written to {folder}."
            if checkpoint.step is not None:
                kept += f" resume=true goes on from step {checkpoint.step}."
            # What a step raises after the signal may come of it: it ends the processes of a data loader as well.
            if interrupts.asked or isinstance(error, KeyboardInterrupt):  # stays one, so that a sweep ends as well
                raise KeyboardInterrupt(f"interrupted at step {annealer.steps_taken}: {kept}") from None
            if isinstance(error, GradlocError) or not isinstance(error, Exception):
                raise
            raise _failure(error, f"at step {annealer.steps_taken}: {kept}") from error
        seconds, exact = perf_counter() - began, annealer.exact
        written = _write(annealer, code.model, folder)
        checkpoint.remove()
        if interrupts.asked:
            raise KeyboardInterrupt(
                f"interrupted when the stage was over: {annealer.outcome}. It is written to {folder}."
            )
    return {
        **written,
        "completed": annealer.outcome == "completed",
        "outcome": _outcome(annealer),
        "exact": exact,
        "steps": annealer.steps_taken,
        "resumed_from": first if going_on else None,
        "remaining": annealer.factor,
        "validation": _accepted(annealer),
        "limit": annealer.log[0]["limit"],
        "seconds": seconds,
        "steps_per_second": (annealer.steps_taken - first) / seconds,
    }


def _begun(
    code: StageCode, target: MaskSet | BlockPlan, checkpoint: StageCheckpoint, going_on: bool, settings: dict[str, Any]
) -> Annealer:
    """The annealer before its first step, or where the one before it was interrupted."""
    from gradloc.anneal.gate import known_at_first
    from gradloc.pipeline.annealing import Annealer

    if not going_on:
        checkpoint.clear()
    state, validate = checkpoint.read() if going_on else None, code.validate
    if state is not None and validate is not None:
        validate = known_at_first(validate, state["annealer"]["gate"]["reference"], settings.get("validations", 1))
    try:
        annealer = Annealer(code.model, code.optimizer, target, validate=validate, **settings)
    except GradlocError:
        raise
    except Exception as error:
        raise _failure(error, "before annealing began.") from error
    try:
        if state is not None:
            checkpoint.load(state, annealer)
        else:
            checkpoint.save_teacher()
            checkpoint.save(annealer, good=False)
    except BaseException as error:
        annealer.close()
        checkpoint.put_back()
        if isinstance(error, GradlocError) or not isinstance(error, Exception):
            raise
        raise _failure(error, "where it was to be saved or to go on.") from error
    return annealer


def _check_distilled(annealer: Annealer, first: int) -> None:
    """Raises `ConfigError` after the first step of a stage whose loss takes no part of a teacher that it was given."""
    if annealer.distill and annealer.steps_taken == first and not annealer.distilled:
        raise ConfigError(
            f"distill={annealer.distill!r}, but train_step(annealer) didn't ask for annealer.distillation(logits, inputs), which it adds to its loss."
        )


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
    whole = folder / "model.safetensors"
    save_model(own_modules(model), str(whole.with_suffix(".tmp")))
    whole.with_suffix(".tmp").replace(whole)  # what an interruption left isn't lost to another one
    place = result.save(folder / f"{kind}.safetensors")
    annealer.close()
    return {"model": str(whole), kind: str(place), "log": str(folder / LOG_FILE)}


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
