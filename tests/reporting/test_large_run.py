"""Thousands of parameters: the page stays small, and is made in seconds."""

from __future__ import annotations

from pathlib import Path

from gradloc.reporting.sinks import MOST_BYTES, rows, sent_modules
from tests.reporting.large_run import measure, write_large_run

MEGABYTES = 5.0
SECONDS = 60.0  # generous: neighbours slow a shared machine down


def test_three_thousand_parameters_are_small_and_quick(tmp_path: Path) -> None:
    place = write_large_run(tmp_path / "run")
    report, found = measure(place)
    assert found["page_megabytes"] < MEGABYTES, found
    # Of processor time: other processes may keep this one waiting.
    assert found["report_processor_seconds"] + found["page_processor_seconds"] < SECONDS, found
    page = (place / "report.html").read_text()
    assert page.count('<th scope="row">weight</th>') == 3000
    assert "500 modules" not in page
    assert len(str(report).splitlines()) <= 24
    assert 0 < len(sent_modules(report.data)) <= 20
    for _, values, histograms in rows(report.data):
        sent = sum(len(name) + 24 for name in values) + sum(16 * len(edges) for _, edges in histograms.values())
        assert sent <= MOST_BYTES
