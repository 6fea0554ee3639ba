"""A summary for the terminal that fits one screen."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

from gradloc.core.names import printable
from gradloc.reporting.data import ReportData
from gradloc.reporting.findings import cost_sentence, findings, percent

if TYPE_CHECKING:
    from rich.console import Console

MOST_FINDINGS = 5
MOST_MODULES = 5


def print_summary(data: ReportData, console: Console | None = None) -> None:
    """Findings, the modules where most of the gradient energy landed, and what recording cost.

    Names are printed as text: neither markup nor control characters in them have an effect.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    out.rule(Text(printable(f"gradloc · {data.location} · step {data.final_step}")))
    found = findings(data)
    for finding in found[:MOST_FINDINGS]:
        out.print(
            Text("! " if finding.problem else "• ", style="bold red" if finding.problem else "bold")
            + Text(printable(finding.text))
            + Text(f"  [{finding.more}]", style="dim")
        )
    if len(found) > MOST_FINDINGS:
        out.print(Text(f"  … and {len(found) - MOST_FINDINGS} more on the page", style="dim"))
    last = data.last_modules.head(MOST_MODULES)
    steps = f"{last['first_step'].min():.0f} to {last['last_step'].max():.0f}" if len(last) else ""
    table = Table(
        title=f"In the last window, steps {steps}" if steps else None,
        title_justify="left",
        title_style="dim",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for heading in ("module", "energy", "parameters", "events/step", "half in", "drift/path"):
        table.add_column(heading, justify="left" if heading == "module" else "right", no_wrap=heading != "module")
    for _, row in last.iterrows():
        table.add_row(
            Text(printable(str(row["module"])) or "(root)"),
            percent(row["energy_share"]),
            f"{row['parameters']:,}",
            percent(row["event_rate"]),
            percent(row["core_fraction"]),
            "–" if row["drift_path_ratio"] != row["drift_path_ratio"] else f"{row['drift_path_ratio']:.2f}",
        )
    out.print(table)
    out.print(Text(cost_sentence(data), style="dim"))


def summary_text(data: ReportData, width: int | None = None) -> str:
    """The same as plain text, as wide as the terminal or, without one, as ``COLUMNS`` says or 100 characters."""
    from rich.console import Console

    width = width or shutil.get_terminal_size((100, 24)).columns

    buffer = io.StringIO()
    print_summary(data, Console(file=buffer, width=width, no_color=True, highlight=False))
    return buffer.getvalue()
