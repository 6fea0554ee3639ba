"""What every benchmark says of itself."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Hardware, versions, date and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit or None,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def print_table(about: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """One JSON object, with a row of the table a line."""
    rows = ",\n".join(json.dumps(row) for row in table)
    print(json.dumps(about)[:-1] + f', "table": [\n{rows}\n]}}')
