"""English text that a Debian system has without a download beyond its package lists: what packages say of themselves."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

import numpy as np

from gradloc.cli.demo.corpus import Corpus, corpus_of


@dataclass(frozen=True)
class Description:
    """A package's description, and the archive section it is filed under."""

    text: str
    section: str


def package_descriptions() -> list[Description]:
    """All different descriptions of the packages that `apt-cache` knows, in a fixed order.

    Raises:
        RuntimeError: this isn't a Debian system, or it has no package lists yet.
    """
    try:
        listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"apt-cache dumpavail failed ({error}): the benchmark needs a Debian system.") from error
    found = {}
    for paragraph in listing.split("\n\n"):
        said = re.search(r"^Description(?:-en)?: (.*(?:\n .*)*)", paragraph, re.MULTILINE)
        section = re.search(r"^Section: (.*)", paragraph, re.MULTILINE)
        if said and section:
            text = re.sub(r"\n ", "\n", re.sub(r"\n \.", "\n", said[1]))
            found.setdefault(text, Description(text, section[1].rpartition("/")[2]))
    if len(found) < 10_000:
        raise RuntimeError(f"apt-cache knows {len(found)} packages only; run apt-get update first.")
    return [found[text] for text in sorted(found)]


def descriptions_corpus(most_bytes: int = 6_000_000, seed: int = 0) -> Corpus:
    """Descriptions as characters, whole ones held out."""
    texts = [f"{one.text}\n\n".encode() for one in package_descriptions() if one.text.isascii()]
    np.random.default_rng(seed).shuffle(texts)  # type: ignore[arg-type]  # a list shuffles in place
    sizes = np.cumsum([len(text) for text in texts])
    return corpus_of(texts[: int(np.searchsorted(sizes, most_bytes))])
