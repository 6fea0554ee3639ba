"""Every code block of the documentation and the README runs, page by page, in one namespace and a directory of its own.

A fenced block of Python is executed, the ``gradloc …`` lines of a shell block go through the command line, and SQL through
DuckDB; a ``text`` block that says ``<!-- printed -->`` is what the block before it prints (``…`` for anything; ``<!-- printed, up to
numbers -->`` lets numbers differ). What can't run here says why in ``<!-- not run: … -->``, and there may be only so many of these.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import socket
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
import torch
from pyarrow import fs

import gradloc
from docs.hooks import included
from gradloc.cli.commands import COMMANDS
from gradloc.cli.main import main
from gradloc.pipeline import recording
from tests.object_server import KEY, SECRET, Server

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in DOCS.rglob("*.md"))]
MOST_NOT_RUN = 2
RUN, SHOWN = {"python", "bash", "sql"}, {"text", "json"}

README_NEEDS = """
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


torch.manual_seed(0)
teacher = Model()
data = [torch.randn(32, 16) for _ in range(60)]
loader = [SimpleNamespace(x=x, y=teacher(x).detach()) for x in data]
loss_fn = nn.functional.mse_loss
other_model = Model()
optimizer = torch.optim.AdamW(other_model.parameters(), lr=3e-4)
gradloc.wrap(optimizer, other_model, run="runs/b")
for batch in loader:
    loss_fn(other_model(batch.x), batch.y).backward()
    optimizer.step()
    optimizer.zero_grad()
gradloc.recorder_of(optimizer).close()
other = gradloc.find_masks("runs/b", density=0.5)

model = Model()
base_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def validation_loss():
    with torch.no_grad():
        return float(loss_fn(model(loader[0].x), loader[0].y))


Path("my_package").mkdir()
Path("my_package/model.py").write_text("import torch\\n\\n\\ndef build():\\n    return torch.nn.Linear(64, 64)\\n")
"""
"""What the README's blocks stand in the middle of."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, its line, and what a comment before it says."""

    language: str
    code: str
    line: int
    says: str


_FENCE = re.compile(
    r"^(?:(?P<mark>[ \t]*)<!-- (?P<says>[^\n]*?) -->\n\s*?)?^(?P<indent>[ \t]*)(?P<ticks>`{3,})(?P<language>[\w]*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)(?P=ticks)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a page, those inside of admonitions and lists as well."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("ticks")) + 2
        code = textwrap.dedent(re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE))
        found.append(Block(match["language"], included(code), line, match["says"] or ""))
    return found


def commands_of(code: str) -> list[list[str]]:
    """The words of each ``gradloc …`` line, goes-on lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "gradloc"]


class Page:
    """Runs a page's blocks one after another."""

    def __init__(self, path: str) -> None:
        self.path, self.text = path, (ROOT / path).read_text()
        self.namespace: dict[str, Any] = {"__name__": "page", "gradloc": gradloc}
        self.printed = ""

    def run(self) -> None:
        for block in blocks_of(self.text):
            if not block.says.startswith("not run: "):
                self.one(block)
        if self.path == "README.md":
            for line in re.findall(r"^    (gradloc .*)$", self.text, re.MULTILINE):
                self.commands(Block("bash", line, 1, ""))

    def one(self, block: Block) -> None:
        if block.language == "python":
            self.python(block.code, block.line)
        elif block.language == "bash":
            self.commands(block)
        elif block.language == "sql":
            for query in filter(str.strip, block.code.split(";")):
                assert not duckdb.sql(query).df().empty, f"{self.path}:{block.line}: no rows"
        elif block.says.startswith("printed"):
            expected, printed = (" ".join(text.split()) for text in (block.code, self.printed))
            if block.says == "printed, up to numbers":
                expected, printed = (re.sub(r"-?\d[\d.]*(e-?\d+)?", "#", text) for text in (expected, printed))
            pattern = ".*".join(re.escape(piece) for piece in expected.split("…"))
            assert re.fullmatch(pattern, printed), f"{self.path}:{block.line}: printed was\n{self.printed}"

    def python(self, code: str, line: int) -> None:
        placed = "\n" * (line - 1) + code
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(placed, self.path, "exec"), self.namespace)
        self.printed = out.getvalue()

    def commands(self, block: Block) -> None:
        expected = int(block.says.removeprefix("exits ")) if block.says.startswith("exits ") else 0
        found = commands_of(block.code)
        assert found, f"{self.path}:{block.line}: a shell block without a gradloc command"
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            codes = [main(words) for words in found]
        self.printed = out.getvalue()
        assert codes[-1] == expected, f"{self.path}:{block.line}: exit codes {codes}\n{self.printed}"
        assert not any(codes[:-1]), f"{self.path}:{block.line}: exit codes {codes}\n{self.printed}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to be in; what a page changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    filters, random = warnings.filters[:], torch.get_rng_state()
    yield tmp_path
    warnings.filters[:] = filters
    torch.set_rng_state(random)
    recording._close_all()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """``s3://my-bucket`` is a bucket of a server on this machine."""
    endpoint = f"http://127.0.0.1:{server.ports[3]}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    made, _ = fs.FileSystem.from_uri(server.uri("x"))
    made.create_dir("my-bucket")


@pytest.fixture
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun would set for the only process of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))


NEEDS = {
    "docs/how-to/s3.md": ("bucket",),
    "docs/how-to/distributed.md": ("one_of_one",),
    "docs/how-to/trainers.md": ("fresh_accelerate",),
    "docs/how-to/accelerate.md": ("fresh_accelerate",),
}


@pytest.mark.parametrize("path", [path for path in PAGES if blocks_of((ROOT / path).read_text())])
def test_every_block_runs(path: str, place: Path, request: pytest.FixtureRequest) -> None:
    for fixture in NEEDS.get(path, ()):
        request.getfixturevalue(fixture)
    page = Page(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if path in ("docs/how-to/trainers.md", "docs/how-to/accelerate.md"):
            warnings.simplefilter("ignore")  # of the trainers
        if path == "README.md":
            warnings.simplefilter("ignore", gradloc.errors.WeakEvidenceWarning)  # after 60 steps
            # Its first stage says "train on" where a loop would be.
            warnings.filterwarnings("ignore", r"gradloc: finish\(\): no annealing step was taken", RuntimeWarning)
            page.python(README_NEEDS, 1)
        page.run()
    assert pd.get_option("display.max_rows") is not None, "a page changed how pandas prints"


def test_what_is_not_run_says_why_and_is_little() -> None:
    left = [
        (path, block.line, block.says)
        for path in PAGES
        for block in blocks_of((ROOT / path).read_text())
        if block.says.startswith("not run: ")
    ]
    assert all(len(says) > len("not run: ") + 10 for *_, says in left)
    assert len(left) <= MOST_NOT_RUN, left


def test_every_block_is_of_a_language_that_is_run_or_shown() -> None:
    for path in PAGES:
        for block in blocks_of((ROOT / path).read_text()):
            assert block.language in RUN | SHOWN, f"{path}:{block.line}: {block.language!r}"
        fences = re.findall(r"^[ \t]*`{3,}", (ROOT / path).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of((ROOT / path).read_text())), f"{path}: a fence isn't closed"


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: gradloc\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert set(gradloc.__all__) - {"GradlocError", "__version__"} <= shown


def test_examples_are_a_section_that_the_reference_shows_as_code() -> None:
    """Under another heading their lines are taken for quotations and references."""
    for path in (ROOT / "gradloc").rglob("*.py"):
        assert not re.search(r"^ +Example:$", path.read_text(), re.M), path


def test_every_command_is_described_and_run() -> None:
    page = (DOCS / "cli.md").read_text()
    assert set(re.findall(r"^<!-- settings: (\S+) -->$", page, re.MULTILINE)) == set(COMMANDS)
    examples = {line[0] for block in blocks_of(page) if block.language == "bash" for line in commands_of(block.code)}
    assert set(COMMANDS) <= examples


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} == named


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def short(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def test_the_numbers_of_the_claims_are_those_of_the_results() -> None:
    said = " ".join((DOCS / "concepts" / "claims.md").read_text().replace("**", "").split())
    masks, kill, rollback, clusters = (results(name) for name in ("masks", "kill", "rollback", "clusters"))
    expected = [
        f"Killed at {kill['kills']} random moments",
        f"{kill['steps_lost_on_average']} steps lost on average, {kill['steps_lost_at_most']} at most, windows of {kill['flush_every']}",
        f"{rollback['within']} of {rollback['runs']} hostile stages",
        f"looked at once, {rollback['control_within']} of 10",
    ]
    assert kill["wrong_windows"] == kill["unreadable_runs"] == 0
    assert all(results("identical")["bit_identical"].values())
    found = {
        method: [
            row["exact"]
            for row in results("partition")["table"]
            if (row.get("method"), row["seeds_from"]) == (method, 0)
        ]
        for method in ("ours, free sizes", "METIS", "spectral co-clustering")
    }
    fresh = {
        method: [
            row["exact"]
            for row in results("partition")["table"]
            if (row.get("method"), row["seeds_from"], row.get("seeds")) == (method, 100, 20)
        ]
        for method in ("ours, free sizes", "ours, free sizes and hub")
    }
    expected += [
        "in {} of 20 students of equal groups, {} of 20 of unequal ones, {} of 20 with".format(
            *found["ours, free sizes"]
        ),
        "METIS: {}, {}, {};".format(*found["METIS"]),
        "on 20 fresh ones {}, {}, {}, and {} where a hub is looked for".format(
            *fresh["ours, free sizes"], fresh["ours, free sizes and hub"][2]
        ),
        "spectral co-clustering: {}, {}, {} ".format(*found["spectral co-clustering"]),
    ]
    students = {row["variant"]: row for row in results("students")["table"]}
    routed, random = students["routed"], students["random"]
    assert routed["verdict"] == {"natural": 20}
    assert routed["blocks"] == {"4": 20}
    ratio = {key: short(value) for key, value in routed["loss_over_dense"].items()}
    expected += [
        f"grouped exactly, in {routed['exact']} of {routed['seeds']} seeds",
        f"{ratio['median']} of the dense student's (median; {ratio['lowest']} to {ratio['highest']}; no larger in {routed['as_good_as_dense']} of 20)",
        f"a random partition's is {random['loss_over_dense']['median']:.0f} times as large",
    ]
    speeds = [
        row["over_dense"]["routed"]["median"] for row in results("route")["table"] if row["part"] == "conditional"
    ]
    expected.append(f"Conditional ×{short(min(speeds))}–{short(max(speeds))} against dense")
    static = {
        row["blocks"]: short(row["geometric_mean"]) for row in results("route")["summary"] if row["side"] == "routed"
    }
    expected.append("2 blocks ×{equal, 2}, 4 ×{equal, 4}, 8 ×{equal, 8}".format(**static))
    whole = {
        (row["width"], row["batch"], row["tokens"]): row["over_dense"]["median"] for row in results("whole")["table"]
    }
    expected.append(f"width 1024 ×{whole[1024, 1, 1]:.1f} at one token, ×{whole[1024, 16, 2048]:.1f} at 16 sequences")
    lost = {row["variant"]: f"+{row['percent_over_dense']:.1f} %" for row in results("quality")["summary"]}
    expected += [
        f"conditional {lost['conditional']} (3 seeds)",
        f"random clusters {lost['random clusters'].replace('+-', '−')} (3 seeds); all blocks, weighed alike, {lost['all blocks'].replace('+-', '−')}; with blocks that count once {lost['conditional, unweighted']} and {lost['random clusters, unweighted']}",
        f"Removing units {lost['units']}, small dense net {lost['small']} (3 seeds each), static blocks {lost['structural mixed']}, a random partition {lost['structural random']} (3 seeds each; of one stream {lost['structural disjoint']} and {lost['structural random disjoint']})",
    ]
    after = {
        variant: ", ".join(
            f"+{row['percent_over_dense']:.1f}" for row in results("stages")["summary"] if row["variant"] == variant
        )
        for variant in ("conditional", "random clusters", "units")
    }
    expected.append(
        f"conditional {after['conditional']} %, random clusters {after['random clusters']} %, removing units {after['units']} %"
    )
    wide = {row["variant"]: f"+{row['percent_over_dense']:.1f} %" for row in results("quality-h200")["summary"]}
    expected.append(
        f"conditional {wide['conditional']}, random clusters {wide['random clusters']}, removing units {wide['units']}, small dense net {wide['small']}"
    )
    gpu_whole = {(row["width"], row["tokens"]): row for row in results("whole-h200")["table"]}
    expected.append(
        f"whole transformer of width 4096 ×{gpu_whole[4096, 2048]['as_graph']['median']:.1f} at 16 sequences, ×{gpu_whole[4096, 1]['as_graph']['median']:.1f} at one token"
    )
    places = results("places")
    by_place = {row["variant"]: f"+{row['percent_over_dense']:.1f} %" for row in places["summary"]}
    expected.append(
        f"conditional {by_place['conditional']}, random clusters {by_place['random clusters']}, small dense net {by_place['small']}, accuracy alike"
    )
    assert max(row["accuracy"] for row in places["summary"]) - min(row["accuracy"] for row in places["summary"]) < 0.01
    shares = {
        side: [100 * row[side] for row in places["table"] if row["part"] == "evidence"]
        for side in ("captured", "chance")
    }
    ends = {side: f"{min(found):.0f}–{max(found):.0f} %" for side, found in shares.items()}
    expected.append(f"the best quarter hold {ends['captured']} of a place's energy, random clusters' {ends['chance']}")
    of_width: dict[int, list[float]] = {}
    for row in places["table"]:
        if row["part"] == "speed":
            of_width.setdefault(row["width"], []).append(row["over_dense"])
    expected.append(", ".join(f"{width} ×{short(min(found))}–{short(max(found))}" for width, found in of_width.items()))
    columns = [("removed", 0.5), ("removed", 0.3), ("reverted", 0.5), ("reverted", 0.3)]
    for steps in (1500, 400, 100):
        for text, name in (("code", "source code"), ("descriptions", "descriptions")):
            rows = {row["density"]: row for row in masks["ratios"] if (row["steps"], row["text"]) == (steps, text)}
            cells = [
                " ".join(map(short, rows[density][f"{action}, saliency over best baseline"]))
                for action, density in columns
            ]
            expected.append(f"| {steps:,}, {name} | {' | '.join(cells)} |")
    captured = {row["method"]: row["captured"] for row in clusters["summary"] if row["blocks"] == 16}
    expected += [f"hold {captured['balanced k-means']:.0%}", f"random clusters' {captured['random']:.0%}"]
    cpu, gpu = results("overhead-cpu"), results("overhead-h100")

    def share(cost: dict[str, Any], variant: str) -> float:
        return 100 * float(cost["cost"][variant]["extra_share"]["median"])

    expected += [
        f"+{share(cpu, 'tile, every step'):.1f} %", f"+{share(gpu, 'tile, every step'):.1f} %",
        f"+{share(cpu, 'element, every step'):.1f} % CPU; +{share(gpu, 'element, every step'):.0f} % H100",
        f"`wandb.watch` +{share(cpu, 'wandb.watch, every step'):.0f} %, cockpit +{share(cpu, 'cockpit, every step'):.1f} %",
        f"+{short(100 * cpu['default']['extra_share']['median'], 1)} % (quartiles", f"+{short(100 * gpu['default']['extra_share']['median'], 1)} % (0 to",
        f"tiles {100 * cpu['cost']['tile, every step']['memory_share_of_parameters']:.1f} % of",
    ]  # fmt: skip
    plain = said.replace(" %", "%")
    missing = [text for text in expected if text.replace(" %", "%") not in plain]
    assert not missing, missing


def test_a_block_that_fails_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: code is run, what was printed is compared, exit codes count, and comments leave blocks out."""
    monkeypatch.setattr("tests.test_docs.ROOT", place)
    good = "```python\nprint('one two')\n```\n\n<!-- printed -->\n\n```text\none …\n```\n"
    for text, error in (
        (good, None),
        (good.replace("one …", "two"), AssertionError),
        (good.replace("one two", "1 two").replace("one …", "2.5 two"), AssertionError),
        (
            good.replace("one two", "1 two").replace("one …", "2.5 two").replace("printed", "printed, up to numbers"),
            None,
        ),
        ("??? note\n\n    ```python\n    1 / 0\n    ```\n", ZeroDivisionError),
        ("<!-- not run: it divides by zero -->\n\n```python\n1 / 0\n```\n", None),
        ("```bash\ngradloc report run=nowhere\n```\n", AssertionError),
        ("<!-- exits 2 -->\n```bash\ngradloc report run=nowhere\n```\n", None),
        ("```bash\nls\n```\n", AssertionError),
        ("```sql\nSELECT 1 WHERE false\n```\n", AssertionError),
    ):
        Path("page.md").write_text(text)
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            Page("page.md").run()
    assert "MASTER_PORT" not in os.environ


def test_the_false_claims_of_co_firing_are_those_that_were_measured() -> None:
    found = {row["kind"]: row for row in results("firing_null")["summary"]}

    def percent(kind: str, what: str) -> str:
        return f"{100 * found[kind][what]:.0f} ± {100 * found[kind][f'{what}_error']:.0f} %"

    said = (ROOT / "docs/decisions/0001-architecture.md").read_text()
    assert f"in {percent('rates', 'random_alone_found')} of 100 seeds" in said
    three = [percent(kind, "found").removesuffix(" %") for kind in ("rates", "rates and sizes", "rates, busy tokens")]
    assert f"Now it is {three[0]}, {three[1]} and {three[2]} %" in said
    assert max(found[kind]["found"] for kind in ("alike", "sizes", "busy tokens", "large tokens")) <= 0.01
    assert (
        f"{percent('planted, weak', 'found')} (weak; {percent('planted, weak', 'random_alone_found')} before)" in said
    )
