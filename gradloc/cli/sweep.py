"""A sweep: one command with every combination of the values that were given, its outputs apart, and the answers side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradloc.cli.answers import Answer, plain
from gradloc.cli.outputs import check_directory
from gradloc.cli.progress import bar, bars
from gradloc.cli.words import Job
from gradloc.core.names import printable
from gradloc.errors import GradlocError

if TYPE_CHECKING:
    from gradloc.cli.commands import Command

LONGEST_LABEL = 80
PAGE, SUMMARY = "compare.html", "sweep.json"


def run_sweep(name: str, command: Command, jobs: Sequence[Job]) -> Answer:
    """Runs all jobs, one after another. One that is refused is named in its row and doesn't stop the others.

    A setting that names a file becomes a new directory with a file for each job, named after the values that were swept, and beside them
    ``sweep.json``, which is written after each job, so that it is there whatever ends the sweep; where runs were swept, ``compare.html`` as
    well.

    Args:
        name, command: the command.
        jobs: two or more.

    Returns:
        The table. The exit code is 2 if a job was refused, else 1 if an answer is no, else 0.

    Raises:
        ConfigError: an output can't be written; nothing was run.
    """
    placed, folders = _apart(command, jobs)
    labels = [" ".join(f"{key}={value}" for key, value in job.swept.items()) for job in jobs]
    summary = str(Path(folders[0]) / SUMMARY) if folders else None
    answers: list[Answer | str] = []
    first: Any = None
    with bars(), bar(f"{name}, {len(jobs)} jobs") as tell:
        tell(0, len(jobs))
        for done, (job, label) in enumerate(zip(placed, labels, strict=True), 1):
            try:
                answer = command.run(job.settings)
            except GradlocError as error:
                answers.append(" ".join(str(error).split()))
            else:
                first = first if first is not None else answer.result
                agreement = _agreement(first, answer.result)
                answers.append(replace(answer, row={**answer.row, **agreement}, result=None))
            values = {**_found(name, jobs, answers), "compare": None, "summary": summary}
            if summary is not None:
                _write(summary, values)
            tell(done, len(jobs), f", done with {label}")
    comparison = _compared(jobs, folders)
    if comparison is not None:
        values["compare"] = comparison
        if summary is not None:
            _write(summary, values)
    text = [_as_text(values["table"])]
    if comparison is not None:
        text += ["", comparison["text"], *([f"page  {comparison['page']}"] if comparison["page"] else [])]
    text += [f"written to {folder}" for folder in folders]
    code = max(2 if isinstance(answer, str) else answer.code for answer in answers)
    return Answer(values, "\n".join(text), code)


def _found(name: str, jobs: Sequence[Job], answers: Sequence[Answer | str]) -> dict[str, Any]:
    """The answers so far beside their jobs, and the jobs that are left."""
    answered = list(zip(jobs[: len(answers)], answers, strict=True))
    return {
        "command": name,
        "jobs": [
            {"swept": job.swept, "code": 2, "refused": answer}
            if isinstance(answer, str)
            else {"swept": job.swept, "code": answer.code, "answer": answer.values}
            for job, answer in answered
        ],
        "left": [job.swept for job in jobs[len(answers) :]],
        "table": [
            {**job.swept, **({"refused": answer} if isinstance(answer, str) else answer.row)}
            for job, answer in answered
        ],
    }


def _apart(command: Command, jobs: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """The jobs with outputs of their own, and the directories that hold them."""
    settings = [setting for setting in (*command.files, *command.directories) if getattr(jobs[0].settings, setting)]
    folders = {setting: str(getattr(jobs[0].settings, setting)) for setting in settings if setting not in jobs[0].swept}
    for setting, folder in folders.items():
        check_directory(setting, folder, empty=True)
    placed = [
        replace(
            job,
            settings=replace(
                job.settings,
                **{s: str(Path(folder) / (label + command.files.get(s, ""))) for s, folder in folders.items()},
            ),
        )
        for job, label in zip(jobs, file_labels([job.swept for job in jobs]), strict=True)
    ]
    for job in placed:
        command.check_outputs(job.settings)
    return placed, list(folders.values())


def file_labels(swept: Sequence[dict[str, str]]) -> list[str]:
    """A name for each job's files, from the values that were swept; numbered where they are alike.

    Examples:
        >>> file_labels([{"run": "runs/a", "density": "0.3"}, {"run": "runs/b", "density": "0.3"}])
        ['a-0.3', 'b-0.3']
    """
    found: list[str] = []
    for values in swept:
        parts = [re.sub(r"[^\w.+-]+", "_", Path(value).name or value) for value in values.values()]
        label = "-".join(parts)[:LONGEST_LABEL].lstrip(".-") or "job"
        alike = sum(1 for known in found if known == label or re.fullmatch(rf"{re.escape(label)}\.\d+", known))
        found.append(f"{label}.{alike + 1}" if alike else label)
    return found


def _agreement(first: Any, this: Any) -> dict[str, float]:
    """The share of weights on which masks say the same as the first job's, where both are of one model."""
    if first is None or this is None:
        return {}
    both = [name for name in this if name in first and first.array(name).shape == this.array(name).shape]
    weights = sum(this.array(name).size for name in both)
    if not weights:
        return {}
    return {"as the first": sum(int((first.array(n) == this.array(n)).sum()) for n in both) / weights}


def _compared(jobs: Sequence[Job], folders: Sequence[str]) -> dict[str, Any] | None:
    """The runs of a sweep side by side, as ``gradloc compare`` does; the page goes where outputs go."""
    runs = list(dict.fromkeys(job.settings.run for job in jobs if "run" in job.swept))
    if len(runs) < 2:
        return None
    from gradloc.pipeline.reports import report_comparison

    try:
        with bar("comparing runs") as progress:
            made = report_comparison(runs, show=False, progress=progress)
        page = str(made.save_html(Path(folders[0]) / PAGE)) if folders else None
    except GradlocError as error:  # runs of different models can be swept, too
        return {"runs": runs, "findings": [], "text": f"The runs can't be compared: {error}", "page": None}
    return {"runs": runs, "findings": [f.__dict__ for f in made.findings], "text": str(made), "page": page}


def _write(place: str, values: dict[str, Any]) -> None:
    """Whole or not at all: a disk that is full leaves what was written after the job before."""
    from gradloc.store.folder import LocalFolder

    text = json.dumps(plain(values), indent=1, allow_nan=False)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    LocalFolder(Path(place).parent).write(Path(place).name, lambda file: file.write(text.encode()))


def _as_text(table: Sequence[dict[str, Any]]) -> str:
    """Rows as columns of text; what is the same in all rows and says nothing is left to ``json=true``."""
    import pandas as pd

    frame = pd.DataFrame(list(table))
    frame = frame[[column for column in frame.columns if frame[column].notna().any()]]
    shown = frame.apply(lambda column: column.map(_cell))
    return str(shown.to_string(index=False, max_colwidth=60))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return printable(str(value))


__all__ = ["file_labels", "run_sweep"]
