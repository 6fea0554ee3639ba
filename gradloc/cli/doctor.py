"""``gradloc doctor``: whether what gradloc needs is here and works, tried out and not only looked up. Nothing leaves this machine
unless ``path=`` is in an object store."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from gradloc.cli.outputs import existing_parent, write_state
from gradloc.core.names import counted, without_credentials
from gradloc.errors import GradlocError

LEAST_FREE = 1 << 30
"""Free bytes below which a disk is called full: a run of a small model fits, one of a large model doesn't."""
WIDTH, STEPS = 512, 60
"""Of the network that recording is timed on, and its steps."""
EXTRAS = {
    "ray": "engine=ray",
    "transformers": "the callback for the Hugging Face Trainer",
    "accelerate": "recording under Accelerate",
    "lightning": "the callback for Lightning",
    "tensorboard": "report tensorboard=…",
}
_EXTRA_OF = {"transformers": "hf", "accelerate": "hf"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` says what to do, and is empty where nothing is wrong."""

    name: str
    found: str
    remedy: str = ""


@dataclass
class Examination:
    """Everything that was found.

    Args:
        details: plain values for ``json=true``.
        checks: lines for people, in order.
    """

    details: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.remedy]

    def text(self) -> str:
        """A line for each check, and what to do about each problem."""
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"{'FAIL' if c.remedy else 'ok  '} {c.name:<{width}}  {c.found}" + (f": {c.remedy}" if c.remedy else "")
            for c in self.checks
        ]
        count = len(self.problems)
        verdict = "all is well" if not count else f"{counted(count, 'thing')} to mend"
        return "\n".join([*lines, verdict])

    def values(self) -> dict[str, Any]:
        """The same as plain values."""
        problems = [{"name": c.name, "found": c.found, "remedy": c.remedy} for c in self.problems]
        return {**self.details, "healthy": not problems, "problems": problems}


def examine(path: str) -> Examination:
    """Versions, devices, whether runs can be written at `path` and read back, what recording costs here, and the mode of W&B.

    Args:
        path: where runs would be written. What is tried there is deleted again, and a directory that isn't there isn't made.
    """
    from gradloc.version import __version__

    made = Examination({"gradloc": __version__})
    for part in (_versions, _devices, lambda seen: _place(seen, path), _recording, _wandb, _extras):
        part(made)
    return made


def _versions(seen: Examination) -> None:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    seen.checks.append(Check("gradloc", f"{seen.details['gradloc']}, Python {found['python']}, {platform.platform()}"))
    wrong = {}
    for name, allowed, needed in _requirements():
        have = _version(name)
        found.setdefault(name, have or "missing")
        if have is None or not allowed(have):
            wrong[name] = f"pip install '{needed}'"
    seen.details |= {"system": platform.platform(), "versions": found}
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if name != "python" and name not in wrong)
    seen.checks.append(Check("packages", listed))
    for name, remedy in wrong.items():
        seen.checks.append(Check(name, f"{found[name]}, which gradloc can't work with", remedy))


def _requirements() -> list[tuple[str, Callable[[str], bool], str]]:
    """What gradloc needs: name, whether a version will do, and the requirement."""
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in metadata.requires("gradloc") or ()]
    except metadata.PackageNotFoundError:  # not installed, run from its sources
        stated = [Requirement(name) for name in ("torch", "numpy", "pandas", "pyarrow", "hydra-core", "wandb")]
    needed = [one for one in stated if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        (one.name, lambda have, one=one: one.specifier.contains(have, prereleases=True), str(one)) for one in needed
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(seen: Examination) -> None:
    import torch

    devices = [{"device": "cpu", "name": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    remedy = ""
    try:
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            torch.ones(8, device=f"cuda:{index}").sum().item()
            devices.append({"device": f"cuda:{index}", "name": about.name, "memory_bytes": about.total_memory})
        if torch.backends.mps.is_available():
            devices.append({"device": "mps", "name": "Apple"})
    except RuntimeError as error:
        remedy = f"the GPU doesn't answer ({str(error).splitlines()[0]}); check its driver, or hide it with CUDA_VISIBLE_DEVICES="
    seen.details["devices"] = devices
    cpu = devices[0]
    shown = [f"{cpu['name']}, {counted(cpu['cores'], 'core')}, {counted(cpu['threads'], 'thread')}"]
    shown += [f"{d['device']} {d['name']}" + (f", {d['memory_bytes'] / 1e9:,.0f} GB" if "memory_bytes" in d else "") for d in devices[1:]]  # type: ignore[operator]  # fmt: skip
    seen.checks.append(Check("devices", "; ".join(shown), remedy))


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _place(seen: Examination, path: str) -> None:
    """A run of three steps, written and read back."""
    began = perf_counter()
    shown = without_credentials(path)
    found: dict[str, Any] = {"path": shown, "free_bytes": None, "written_and_read": False}
    seen.details["path"] = found
    elsewhere = "://" in path
    there = Path(path) if elsewhere else existing_parent(Path(path))
    if not elsewhere:
        state = write_state(Path(path))
        if state != "writable":
            seen.checks.append(Check("path", state, "name another with path=, and give it to wrap(run=…)"))
            return
        found["free_bytes"] = free = shutil.disk_usage(there).free
        remedy = (
            ""
            if free >= LEAST_FREE
            else f"less than {LEAST_FREE / 1e9:.0f} GB; make room, or name another disk with path="
        )
        seen.checks.append(Check("disk", f"{free / 1e9:,.1f} GB free at {there}", remedy))
    try:
        if elsewhere:
            _write_object(path)
        else:
            with tempfile.TemporaryDirectory(prefix=".gradloc-doctor-", dir=there) as folder:
                _write_run(Path(folder) / "run")
    except (GradlocError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        remedy = (
            "check the address and the credentials"
            if elsewhere
            else "check the permissions and the file system, or name another"
        )
        seen.checks.append(Check("path", f"{shown}: {reason}", f"{remedy} with path="))
        return
    found |= {"written_and_read": True, "seconds": perf_counter() - began}
    what = "an object" if elsewhere else "a run of three steps"
    seen.checks.append(Check("path", f"{shown}: {what} was written, read back and deleted in {found['seconds']:.2f} s"))


def _write_run(place: Path) -> None:
    """Records a small model, and compares what comes back.

    Raises:
        GradlocError: it can't be written or read.
        ValueError: something else came back.
    """
    import torch

    import gradloc

    model = torch.nn.Linear(8, 4)
    optimizer = gradloc.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, run=place, every=1, flush_every=2, on_error="raise"
    )
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradloc.recorder_of(optimizer).close()
    # Gradients of three steps of two ones each.
    total = float(gradloc.load_run(place).evidence("weight").grad_sum.sum())
    if abs(total - 3 * 2 * 32) > 1e-3:
        raise ValueError(f"a sum of gradients came back as {total}, not {3 * 2 * 32}")


def _write_object(path: str) -> None:
    """Writes, reads and deletes an object.

    Raises:
        GradlocError, OSError, ValueError: something of it failed.
    """
    from gradloc.store.folder import open_folder

    folder = open_folder(path)
    name, content = f".gradloc-doctor-{os.getpid()}", b"gradloc"
    folder.write(name, lambda stream: stream.write(content))
    try:
        with folder.open(name) as file:
            if file.read() != content:
                raise ValueError("an object came back changed")
    finally:
        folder.delete(name)


def _recording(seen: Examination) -> None:
    """What an observed step costs here: the same steps of one network with and without a recorder, taken in turns."""
    import torch

    import gradloc

    plain, watched = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (plain, watched)]
    times: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory(prefix="gradloc-doctor-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradloc.wrap(optimizers[1], watched, run=Path(folder) / "run", every=1, snapshots=False, firings=False)
        for model in (plain, watched):
            model.weight.grad = torch.randn(WIDTH, WIDTH)
        for _ in range(STEPS):
            for which, optimizer in enumerate(optimizers):
                began = perf_counter()
                optimizer.step()
                times[which].append(perf_counter() - began)
        gradloc.recorder_of(optimizers[1]).close()
    alone, recorded = (statistics.median(series[STEPS // 4 :]) * 1e6 for series in times)
    seen.details["recording"] = {
        "weights": WIDTH * WIDTH,
        "step_microseconds": alone,
        "observed_step_microseconds": recorded,
        "added_microseconds": recorded - alone,
    }
    seen.checks.append(
        Check(
            "recording",
            f"an observed step of {WIDTH * WIDTH:,} weights takes {recorded - alone:,.0f} µs more on the CPU than the "
            f"optimizer's {alone:,.0f} µs; gradloc record-plan says it of your model",
        )
    )


def _wandb(seen: Examination) -> None:
    from gradloc.reporting.wandb_sink import expected_mode, logged_in

    mode, known = expected_mode(), logged_in()
    remedy = ""
    if mode not in ("online", "offline", "disabled", "shared"):
        remedy = "WANDB_MODE must be online, offline or disabled"
    elif mode == "online" and not known:
        remedy = "WANDB_MODE asks for online, and there is no key: wandb login, or WANDB_MODE=offline"
    seen.details["wandb"] = {"mode": mode, "logged_in": known}
    seen.checks.append(Check("W&B", f"{mode}, {'logged in' if known else 'not logged in'}", remedy))


def _extras(seen: Examination) -> None:
    found = {name: {"version": _version(name), "for": use} for name, use in EXTRAS.items()}
    seen.details["extras"] = found
    for name, about in found.items():
        have = about["version"] or f"not installed (pip install 'gradloc[{_EXTRA_OF.get(name, name)}]')"
        seen.checks.append(Check(name, f"{have}, for {about['for']}"))


__all__ = ["Check", "Examination", "examine"]
