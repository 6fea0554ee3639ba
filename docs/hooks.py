"""What MkDocs does for these pages beyond Markdown: included code, formulas as pictures, and the settings of commands from the code.

Formulas are drawn while the site is built, by matplotlib, so that no script has to be fetched to read them.
"""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import mathtext, rc_context
from matplotlib.font_manager import FontProperties

from gradloc.cli.commands import COMMANDS

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DOCS = Path(__file__).parent
_INCLUDE = re.compile(r"^( *)# include: (snippets/\S+)$", re.MULTILINE)
_FETCHED = re.compile(
    r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(?:https?:)?//[^"]*"'
)
_PRESETS = re.compile(r"^<!-- presets: (\S+) -->$", re.MULTILINE)
_SETTINGS = re.compile(r"^<!-- settings: (\S+) -->$", re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Draws the formulas of a page."""
    return _FORMULA.sub(lambda found: _picture(html.unescape(found[2]), found[1] == "div"), content)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts code and tables of settings where a page asks for them."""
    settled = _SETTINGS.sub(lambda found: settings_table(found[1]), included(markdown))
    return _PRESETS.sub(lambda found: presets_table(found[1]), settled)


def included(text: str) -> str:
    """Text with files of docs/ in place of the comments that name them, indented like these.

    ``pymdownx.snippets`` does the same, with a line that is no Python and that formatters take apart.
    """

    def code(found: re.Match[str]) -> str:
        lines = (DOCS / found[2]).read_text().splitlines()
        return "\n".join(found[1] + line if line else line for line in lines)

    return _INCLUDE.sub(code, text)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuses a site that would load anything from elsewhere."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        if found := _FETCHED.search(page.read_text()):
            raise ValueError(f"{page}: loads {found[0]}; everything a page needs must be in the site.")


def settings_table(name: str) -> str:
    """The settings of ``gradloc NAME`` with defaults and meanings."""
    command = COMMANDS[name]
    about = {**command.about, "json": "print one JSON object"}
    rows = ["| setting | default | |", "|---|---|---|"]
    for setting in fields(command.settings):
        default = "required" if str(setting.default) == "???" else f"`{setting.default}`"
        rows.append(f"| `{setting.name}` | {default} | {about.get(setting.name, '')} |")
    return "\n".join(rows)


def presets_table(name: str) -> str:
    """The presets of ``gradloc NAME`` and what each stands for."""
    rows = ["| preset | the same as |", "|---|---|"]
    for preset, chosen in COMMANDS[name].presets.items():
        rows.append(f"| `{preset}` | `{' '.join(f'{key}={value}' for key, value in chosen.items())}` |")
    return "\n".join(rows)


@lru_cache(None)
def _picture(formula: str, display: bool) -> str:
    drawn = io.BytesIO()
    plain = " ".join(formula.split())
    with rc_context({"svg.fonttype": "path", "mathtext.fontset": "cm", "svg.hashsalt": "gradloc"}):
        mathtext.math_to_image(f"${_known(plain)}$", drawn, FontProperties(size=11), format="svg")
    image = base64.b64encode(drawn.getvalue()).decode()
    shown = f'<img class="formula" alt="{html.escape(plain)}" src="data:image/svg+xml;base64,{image}">'
    return f"<p>{shown}</p>" if display else shown


def _known(formula: str) -> str:
    """The same in the words that matplotlib's mathtext has."""
    for word, known in ((r"\lVert", r"\Vert "), (r"\rVert", r"\Vert "), (r"\tfrac", r"\frac")):
        formula = formula.replace(word, known)
    return formula
