"""The annealer: two lines in a training loop that end in an exact mask or a routed plan, or say why not."""

from __future__ import annotations

import copy
import gc
import json
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gradloc.anneal.arguments import GATED, check_gated, check_planned, check_stage
from gradloc.anneal.distillation import distillation_loss, logits_of, teacher_of
from gradloc.anneal.gate import Decision, Gate, keeping_modes
from gradloc.anneal.masked import MaskTarget
from gradloc.anneal.pace import Pace
from gradloc.anneal.processes import is_first
from gradloc.anneal.schedule import remaining
from gradloc.anneal.stage_state import DIGEST, check_state, digest_of
from gradloc.anneal.stepping import StepWatch
from gradloc.anneal.target import target_of
from gradloc.core.arguments import check_kind
from gradloc.core.masks import MaskSet
from gradloc.core.plan import BlockPlan
from gradloc.core.wrappers import (
    inner_model,
    refuse_flat_parameters,
    refuse_foreign_optimizers,
    reshard,
    torch_optimizer,
)
from gradloc.errors import AlreadyWrappedError, ConfigError, NotRecordingError, UnsupportedError

INTERRUPTED = "stopped by "
"""What the outcome of a stage begins with that an exception ended."""
SCHEDULED = ("lr", "initial_lr", "momentum", "betas", "weight_decay")
"""What schedulers set in an optimizer's groups. They go on counting, so a rollback must not set these back."""
_ANNEALERS: weakref.WeakSet[Annealer] = weakref.WeakSet()
"""Those that there are; see `_refuse_second`."""
SETTLE = {"masks": 0.3, "plans": 0.8}
"""Share of a stage's steps at the exact mask; ``benchmarks/quality.py`` and ``benchmarks/students.py`` have what others cost."""


class Annealer:
    """Moves unsupported dependencies to their null value while the model trains on.

    Call `step` after each ``optimizer.step()``. Over the first ``1 - settle`` of `steps` the factor falls from 1 to 0; over
    the rest the model adapts to the exact mask. The gate looks at ``validate()`` every `validate_every` steps: within the budget
    the state is kept as the last good one, beyond it model and optimizer go back to that state and the pace halves, until looks are good for a
    while (`gradloc.anneal.pace`).

    As a context (``with Annealer(…) as annealer:``) a stage that an exception ends, Ctrl-C among them, leaves the model at its last
    good state. `state_dict` and `load_state_dict` carry a stage, an interrupted one as well, through a checkpoint; with several processes all of them call
    `step`, and decide together.

    Args:
        model: the model in training; compiled and distributed ones, too.
        optimizer: its torch optimizer, Accelerate's wrapper around one, or a list of those that train the model.
        masks: a `MaskSet`, or a `BlockPlan`: structural (its masks are annealed) or conditional (blocks that a token
            doesn't pick fade, and routers are trained).
        schedule: ``"linear"``, ``"cosine"``, ``"cubic"`` or ``"exponential"``.
        steps: optimizer steps the whole stage takes if the gate never objects.
        validate: returns the validation loss, lower is better (of an accuracy give ``1 - accuracy``); None runs without a gate. It may set
            the model to ``eval()``; each part's mode is put back.
        budget: allowed increase of that loss relative to the start (0.01 = 1 %).
        validations: how often `validate` is called at each look. Above 1, three standard errors of the mean count against the stage:
            for validation on random samples, or with dropout.
        validate_every: steps between looks; a tenth of `steps` by default.
        patience: rollbacks in a row before the stage stops at the last good state; when every pace has failed it stops as well.
        settle: share of `steps` spent at the exact mask. By default 0.8 for plans, which do best when the model trains long with its
            blocks alone, and 0.3 for masks and with `refine`.
        distill: weight of `distillation`; above 0 the model as it is now is kept as its own teacher. ``annealer.distill`` is that weight, and
            ``annealer.distilled`` says whether a loss has asked for it.
        temperature: of the two distributions that `distillation` compares.
        refine: steps between refinements of a structural plan's blocks, while at least `REFINE_ABOVE` of what is outside is left: units change
            blocks where that keeps more of the evidence that the optimizer holds now, blocks keep their sizes. None keeps the plan's
            blocks. With several processes the first one's choice counts for all. `result` has the blocks that it came to.
        penalty: of a group lasso on what each hidden unit has outside its block, while that fades: in every step the root mean square of each
            such group falls by ``penalty * lr`` (`shrink_groups`). For structural plans, not for sharded weights.
        log: a file that each decision is appended to, one JSON object a line: ``step``, ``factor`` and ``validation`` as they were at the look,
            ``limit``, ``decision``, of masks and structural plans how much of what fades is ``left``, and after a rollback the factor that it went ``back_to``, and ``left_back``; of a conditional plan also how its routers do. What isn't finite is null.

    Raises:
        ConfigError: an argument isn't allowed.
        ModelMismatchError: masks or plan belong to another model, or the optimizer trains none of this one's parameters.
        NonFiniteError: the validation loss at the start, or a weight that is annealed, isn't finite.
        UnsupportedError: an optimizer, a sharding or a compiled model that a stage can't reach into, or operators that compute something else than
            was planned, such as another activation.
        AlreadyWrappedError: another annealer of this model is at work.

    Examples:
        >>> import numpy as np, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> annealer = Annealer(model, optimizer, MaskSet({"weight": np.array([[True, False]])}), steps=2, settle=0.5)
        >>> while not annealer.done:
        ...     _ = model(torch.ones(1, 2)).sum().backward(); optimizer.step(); annealer.step()
        >>> float(model.weight.detach()[0, 1]), annealer.outcome
        (0.0, 'completed')
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        masks: MaskSet | BlockPlan,
        *,
        schedule: str = "cubic",
        steps: int = 1000,
        validate: Callable[[], float] | None = None,
        budget: float = 0.01,
        validations: int = 1,
        validate_every: int | None = None,
        patience: int = 2,
        settle: float | None = None,
        distill: float = 0.0,
        temperature: float = 2.0,
        refine: int | None = None,
        penalty: float = 0.0,
        log: str | Path | None = None,
    ) -> None:
        check_stage(
            masks, schedule=schedule, steps=steps, settle=settle, validate_every=validate_every, budget=budget, patience=patience,
            validations=validations, refine=refine, penalty=penalty, distill=distill, temperature=temperature,
        )  # fmt: skip
        gate = dict(zip(GATED, (budget, validations, patience), strict=True))
        check_gated(validate, gate, Annealer.__init__.__kwdefaults__ or {})
        steps, validate_every = int(steps), validate_every and int(validate_every)  # NumPy's numbers among them
        # Blocks that are refined need their time, too: they move while the rest fades.
        fixed = isinstance(masks, BlockPlan) and refine is None
        settle = SETTLE["plans" if fixed else "masks"] if settle is None else float(settle)
        self._validate_every = validate_every if validate_every is not None else max(1, steps // 10)
        self._log_file = None if log is None else _log_file(log)
        check_kind(model, nn.Module, "model", "a torch.nn.Module", "Annealer(model, optimizer, masks).")
        refuse_flat_parameters(model)
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        if not optimizers:
            raise ConfigError("optimizer is an empty list; pass the optimizers that train the model.")
        self._optimizers = [torch_optimizer(one) for one in optimizers]
        refuse_foreign_optimizers(self._optimizers, model)
        self._model, self._schedule = inner_model(model), schedule
        _refuse_second(self._model)
        check_planned(self._model, masks)
        self.distill, self.distilled = distill, False
        self._temperature, self._teacher = temperature, teacher_of(self._model) if distill else None
        if callable(validate):
            validate = keeping_modes(model, validate)
        self._gate = Gate(validate, float(budget), int(patience), int(validations)) if validate is not None else None
        self._target, self._masks = target_of(model, self._optimizers, masks, refine, penalty, self._tell)
        self._digest = digest_of(self._masks)
        self._steps, self._settle_steps = steps, min(round(settle * steps), steps - 1)
        self._pace = Pace(1.0 / max(1, steps - self._settle_steps))
        self.steps_taken, self.progress, self.settled = 0, 0.0, 0
        self.done, self.outcome = False, "running"
        self.log: list[dict[str, Any]] = []
        self._entered = self._closed = False
        self._watch = StepWatch(self._optimizers)
        try:
            self._good = self._state() if self._gate else None
            self._write("start", self._gate.reference if self._gate else None)
        except BaseException:
            self.close()
            raise
        _ANNEALERS.add(self)

    # ---- in the loop

    @property
    def factor(self) -> float:
        """What is left of unsupported dependencies, 1 to 0."""
        return remaining(self._schedule, self.progress)

    @property
    def left(self) -> float:
        """How much of the unsupported part there is, of what there was: of masks and structural plans by its norm, where training goes on while it
        fades. With several processes all of them must ask.
        """
        return self._target.left()

    @property
    def settling_left(self) -> int:
        """Steps at the exact mask that the stage still has to take."""
        return 0 if self.done else self._settle_steps - self.settled

    @property
    def share_done(self) -> float:
        """How much of the stage is over, 0 to 1; a rollback sets it back."""
        if self.done:
            return 1.0
        settling = self._settle_steps / self._steps
        settled = self.settled / self._settle_steps if self._settle_steps else 0.0
        return self.progress * (1.0 - settling) + settled * settling

    def step(self) -> None:
        """Takes one annealing step. Once done, it keeps the mask exact while training goes on.

        Warns once if the optimizer doesn't step between calls, or only between every few.

        Raises:
            UnsupportedError: no forward pass reaches the blocks of a conditional plan, or the optimizer keeps moments as codes.
        """
        if self.outcome.startswith("stopped"):
            return
        if self._closed and not self.done:
            raise ConfigError("annealer.close() ended this stage before it was over; make another Annealer to go on.")
        if self._teacher is not None and not (self.distilled or self.steps_taken):
            warnings.warn(
                f"gradloc: distill={self.distill} does nothing by itself, and no loss has had annealer.distillation(…) so far. Add it to the loss: "
                "loss = loss + annealer.distillation(logits, inputs).",
                RuntimeWarning,
                stacklevel=2,
            )
        self._target.check_watched()
        self._watch.begin()
        self.steps_taken += 1
        if self.progress < 1.0:
            # Steps are added up in floating point: the last one must land on 1 exactly.
            self.progress = min(1.0, self.progress + self._pace.now)
            self.progress = 1.0 if self.progress > 1.0 - 1e-9 else self.progress
        else:
            self.settled += 1
        self._target.apply(self.factor)
        if self.done:
            return
        finished = self.progress >= 1.0 and self.settled >= self._settle_steps
        if finished or self.steps_taken % self._validate_every == 0:
            self._look(finished)
        said = self._watch.end(self.done)
        if said is not None and is_first():
            warnings.warn(said, RuntimeWarning, stacklevel=2)

    def _look(self, finished: bool) -> None:
        if self._gate is None:
            account = self._target.account()
            self._good = self._state(account) if self._entered else None
            self._write("finish" if finished else "continue", None, account)
        else:
            loss, decision = self._judge(self._gate)
            measured, account = self.factor, self._target.account()
            if decision == "continue":
                self._good = self._state(account)
                self._pace.passed()
            else:
                finished = False
                self._roll_back()
                self._pace.failed()
                # A gate that lets the stage pass only now and then would roll back for ever.
                decision = "stop" if self._pace.exhausted else decision
            back = {} if decision == "continue" else {"factor": measured, "back_to": self.factor}
            if back and "left" in account:
                back["left_back"] = self._good["left"]
            self._write("finish" if finished else decision, loss, account | back)
            if decision == "stop":
                self.done = True
                attempts = "every pace was tried" if self._pace.exhausted else f"{self._gate.failures} attempts"
                self.outcome = (
                    f"stopped: validation {loss:.4g} stayed above its limit {self._gate.limit:.4g} after {attempts}; the model "
                    f"is back {self._good['is']}, where {_percent(self._good['left'])} of the unsupported part is left"
                )
        if finished:
            self.done, self.outcome = True, "completed"

    def _judge(self, gate: Gate) -> tuple[float, Decision]:
        try:
            return gate.judge()
        except BaseException as error:
            if not self._entered:  # the context does it otherwise
                self._abandon(f"{INTERRUPTED}{type(error).__name__} in validate()")
            raise

    def _abandon(self, why: str) -> None:
        """Goes back to the last good state and ends the stage there."""
        back = {}
        if self._good is not None:
            back["factor"] = self.factor
            self._roll_back()
            back["back_to"] = self.factor
            why += f"; the model is back {self._good['is']}, where {_percent(self._good['left'])} of the unsupported part is left"
        self.done, self.outcome = True, why
        self._write("abandon", None, back)

    def __enter__(self) -> Annealer:
        self._entered = True
        self._good = self._good or self._state()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not self.done:
            self._abandon(f"{INTERRUPTED}{kind.__name__ if kind else 'an error'}")
        self._entered = False

    def distillation(self, outputs: Any, *inputs: Any, **keywords: Any) -> Tensor:
        r"""$\text{distill}\cdot\tau^2\,\mathrm{KL}(p_\text{teacher} \Vert p)$ over the last axis of logits, to add to the loss.

        Args:
            outputs: the model's logits, ``[…, V]``, or what holds them as ``logits``, as Hugging Face's models return.
            *inputs, **keywords: what the model was called with.

        Raises:
            ConfigError: the annealer was made without ``distill``, or the model returns no logits.

        Source:
            Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).
        """
        self.distilled = True
        if self._teacher is None:
            raise ConfigError("there is no teacher: pass distill=, e.g. Annealer(…, distill=1.0).")
        with torch.no_grad():
            target = self._teacher(*inputs, **keywords)
        return self.distill * distillation_loss(logits_of(outputs), logits_of(target), self._temperature)

    def finish(self) -> MaskSet | BlockPlan:
        """Ends the stage and returns what holds now: the exact masks, or the plan with its routers.

        Before the schedule's end the rest is taken away at once; a warning says so if the gate doesn't allow what comes of it, or if no
        annealing step was taken. A stage that was stopped stays as it is, and a warning says how far its masks or plan are.

        Raises:
            NotTrainedError: routers that no step has trained.
        """
        wrong = None
        if not self.done:
            self._target.check_trained(self.steps_taken)
            self._watch.close()
            self.progress = 1.0
            self._target.apply(0.0)
            self.done, self.outcome = True, "completed early by finish()"
            wrong = self._finished_early()
        elif self.factor > 0.0:  # stopped
            how = "masks.apply(model)" if isinstance(self._masks, MaskSet) else "gradloc.route_model(model, plan)"
            wrong = (
                f"the stage was stopped with {_percent(self.left)} of the unsupported part left, and stays there: what is returned doesn't "
                f"hold, and {how} would cut the rest at once"
            )
        elif isinstance(self._target, MaskTarget):
            self._target.apply(0.0)  # an optimizer step may have come since
        wrong = "; ".join(filter(None, (wrong, self._target.faults())))
        if wrong and is_first():
            warnings.warn(f"gradloc: finish(): {wrong}.", RuntimeWarning, stacklevel=2)
        return self.result

    def _finished_early(self) -> str:
        """Looks at what came of taking the rest at once; returns what is wrong with it."""
        loss, wrong = None, []
        if not self.steps_taken and isinstance(self._target, MaskTarget):
            wrong.append("no annealing step was taken, and everything was cut at once")
        if self._gate is not None:
            loss, decision = self._gate.judge()
            if decision != "continue":
                wrong.append(f"validation {loss:.4g} isn't within its limit {self._gate.limit:.4g}")
        said = "; ".join(wrong)
        self.outcome += f": {said}" if said else ""
        self._write("finish early", loss)
        return said

    @property
    def result(self) -> MaskSet | BlockPlan:
        """The masks, or the plan with its blocks and routers as they are now."""
        return self._masks if isinstance(self._masks, MaskSet) else self._target.plan()  # type: ignore[attr-defined]

    @property
    def exact(self) -> bool:
        """Whether the model holds the mask exactly, or runs only the picked blocks."""
        return self._target.exact()

    def close(self) -> None:
        """Takes hooks off the model and lets another annealer have it. Safe to call twice."""
        self._closed = True
        self._watch.close()
        self._target.close()

    # ---- state

    def state_dict(self, good: bool = False) -> dict[str, Any]:
        """All that a resumed stage needs beside the model and its optimizer: plain values, and tensors of routers.

        A stage that an exception ended, Ctrl-C among them, goes on from its last good state where this is loaded; one that its gate
        stopped, or that is complete, stays as it is.

        Args:
            good: with the last good state, which is as large as model and optimizer. Without it a resumed stage goes back no further than the
                state it is resumed in.
        """
        return {
            **({"good": copy.deepcopy(self._good)} if good else {}),
            "stage": self._description(),
            "steps_taken": self.steps_taken,
            "progress": self.progress,
            "settled": self.settled,
            "pace": self._pace.state_dict(),
            "done": self.done,
            "outcome": self.outcome,
            "log": copy.deepcopy(self.log),
            "gate": self._gate.state_dict() if self._gate else None,
            "target": copy.deepcopy(self._target.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Load the model and the optimizer first.

        Raises:
            ConfigError: it is no state of a stage, or of one with other steps, another schedule or kind of target, or without a gate where this
                one has it.
            ModelMismatchError: it is another plan's.
            AlreadyWrappedError: this stage was over, and another annealer of the model is at work since.
        """
        check_state(state, self._description())
        if self.done and (not state["done"] or state["outcome"].startswith(INTERRUPTED)):
            _refuse_second(self._model)
        self._target.load_state_dict(state["target"])
        for name in ("steps_taken", "progress", "settled", "done", "outcome"):
            setattr(self, name, state[name])
        if self.outcome.startswith(INTERRUPTED):  # what broke off says nothing of the stage, unlike its gate
            self.done, self.outcome = False, "running"
        self._pace.load_state_dict(state["pace"])
        self.log = list(state["log"])
        if self._gate is not None:
            self._gate.load_state_dict(state["gate"])
        if state.get("good") is not None:
            now = self._tensors()
            held = {name: saved.to(now[name].device) for name, saved in state["good"]["model"].items() if name in now}
            self._good = {**copy.deepcopy(state["good"]), "model": held}
            return
        self._good = self._state() if self._gate or self._entered else None
        looked = [entry["step"] for entry in self.log if entry["decision"] != "refine"]
        if self._good is not None and self._gate is not None and not self.done and looked[-1:] != [self.steps_taken]:
            self._good["is"] = "in the state that it was resumed in, which no validation has judged"

    def _description(self) -> dict[str, Any]:
        """What a stage must have in common with another to go on with its state."""
        kind = "masks" if isinstance(self._masks, MaskSet) else f"a {self._masks.kind} plan"
        return {
            "annealed": kind,
            "schedule": self._schedule,
            "steps": self._steps,
            "settling steps": self._settle_steps,
            "gate": "yes" if self._gate else "no",
            DIGEST: self._digest,
        }

    def _state(self, account: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
        """All that a rollback needs; `account` is the target's, where it has just been taken."""
        return {
            "model": {name: tensor.detach().clone() for name, tensor in self._tensors().items()},
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers],
            "target": copy.deepcopy(self._target.state_dict()),
            "progress": self.progress,
            "settled": self.settled,
            "is": "at its last good state",
            "left": account["left"] if "left" in account else self._target.left(),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """All that the model holds: a state dict may lack some, by hooks of its own."""
        reshard(self._model)
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    @torch.no_grad()
    def _roll_back(self) -> None:
        assert self._good is not None
        for optimizer, state in zip(self._optimizers, self._good["optimizers"], strict=True):
            held = [len(group["params"]) for group in optimizer.param_groups]
            if held != [len(group["params"]) for group in state["param_groups"]]:
                raise UnsupportedError(
                    "the optimizer has got or lost parameters since the last good state, which can't be put back any more. Make another Annealer "
                    "when the parameters that are trained change."
                )
        for name, tensor in self._tensors().items():
            if name in self._good["model"]:  # others came since
                self._put_back(name, tensor, self._good["model"][name])
        for optimizer, state in zip(self._optimizers, self._good["optimizers"], strict=True):
            now = [{key: group[key] for key in SCHEDULED if key in group} for group in optimizer.param_groups]
            optimizer.load_state_dict(copy.deepcopy(state))
            for group, settings in zip(optimizer.param_groups, now, strict=True):
                group.update(settings)
        # Routers go back as well: what they learned since was judged together with these weights.
        self._target.load_state_dict(copy.deepcopy(self._good["target"]))
        self.progress, self.settled = self._good["progress"], self._good["settled"]

    def _put_back(self, name: str, tensor: Tensor, saved: Tensor) -> None:
        """In place, as optimizers and compiled code hold parameters; a buffer may have got another shape, or be a view that can't be written to."""
        if isinstance(tensor, nn.Parameter):
            tensor.copy_(saved)
        elif tensor.shape != saved.shape or not torch.equal(tensor, saved):
            try:
                tensor.copy_(saved)
            except RuntimeError:
                place, _, own = name.rpartition(".")
                self._model.get_submodule(place)._buffers[own] = saved.clone()

    def _tell(self, account: dict[str, float]) -> None:
        """Of a refinement."""
        self._write("refine", None, account)

    def _write(self, decision: str, loss: float | None, account: dict[str, float] | None = None) -> None:
        entry: dict[str, Any] = {
            "step": self.steps_taken,
            "factor": self.factor,
            "validation": loss,
            "limit": self._gate.limit if self._gate else None,
            "decision": decision,
        }
        if decision == "start":
            entry["fades"] = self._target.fades()
        if self._gate is not None and self._gate.validations > 1:
            entry["margin"] = self._gate.margin
        entry |= account or {}
        self.log.append(entry)
        if self._log_file is not None and is_first():
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            with self._log_file.open("a") as file:
                file.write(_line(entry))

    def write_log(self) -> None:
        """Writes the log's file anew: after `load_state_dict` it has what another annealer wrote, of steps that this one takes again."""
        if self._log_file is not None and is_first():
            self._log_file.write_text("".join(map(_line, self.log)))


def _log_file(log: str | Path) -> Path:
    """Raises `ConfigError` where no file can be; nothing is made yet."""
    path = Path(log)
    if path.is_dir():
        raise ConfigError(f"log={str(log)!r} is a directory; name a file in it, such as {str(path / 'log.jsonl')!r}.")
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise ConfigError(f"log={str(log)!r} can't be written: {above} is not a directory.")
    return path


def _line(entry: dict[str, Any]) -> str:
    """Of the log's file."""
    return json.dumps({name: _written(value) for name, value in entry.items()}) + "\n"


def _written(value: Any) -> Any:
    """A value of the log as JSON knows it: it has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _refuse_second(model: nn.Module) -> None:
    """Two stages at once would each move the weights, roll back and judge what the other does.

    Raises:
        AlreadyWrappedError: an annealer whose stage isn't over has a parameter of the model.
    """
    if (other := _at_work(model)) is not None:
        gc.collect()  # one that nobody holds any more may live on in a circle of references
        other = _at_work(model)
    if other is not None:
        raise AlreadyWrappedError(
            f"another annealer is at work on this model, at step {other.steps_taken} of {other._steps}. End its stage first, with "
            "gradloc.annealer_of(model): .finish() keeps what it does, .close() leaves the model as it is now. Masks of several parameters go into one MaskSet."
        )


def _at_work(model: nn.Module) -> Annealer | None:
    parameters = set(model.parameters())
    active = (other for other in _ANNEALERS if not (other.done or other._closed))
    return next((other for other in active if parameters & set(other._model.parameters())), None)


def annealer_of(model: nn.Module) -> Annealer:
    """The annealer whose stage on a model isn't over, for example after an error in a notebook.

    Args:
        model: as it is in training.

    Raises:
        NotRecordingError: there is none.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> masks = MaskSet({"weight": torch.tensor([[True, False], [True, True]])})
        >>> one = Annealer(model, optimizer, masks, steps=4)
        >>> annealer_of(model) is one
        True
        >>> one.close()
    """
    found = _at_work(inner_model(model))
    if found is None:
        raise NotRecordingError("no annealer is at work on this model.")
    return found
