"""Two kinds of English text that lie on most machines, each cut into calibration and evaluation documents.

`python`: the language reference that every Python carries for `help()` (pydoc_data.topics), one document a topic.
`manuals`: the GNU manuals in /usr/share/info (Debian's coreutils, gettext, gnupg, ...), one document a node. Without
them, the docstrings of numpy, one document a function.

Documents in the order of their names go to calibration and evaluation in turn. An evaluation document that shares
twelve words in a row with any calibration document is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

INFO = Path("/usr/share/info")
SHARED_WORDS = 12


@dataclass(frozen=True)
class Split:
    """Documents of one domain."""

    source: str
    calibration: list[str]
    evaluation: list[str]


def python_topics() -> dict[str, str]:
    import pydoc_data.topics

    return dict(pydoc_data.topics.topics)


def manual_nodes(folder: Path = INFO) -> dict[str, str]:
    """{manual and node: text} without menus, licences and indices."""
    nodes = {}
    for path in sorted(folder.glob("*.info*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        for part in text.split("\x1f\n")[1:]:
            head, _, body = part.partition("\n")
            title = re.search(r"Node: ([^,\t]+)", head)
            if title is None or re.search(r"licen[cs]e|copying|index|^top$", title[1], re.IGNORECASE):
                continue
            nodes[f"{path.name.split('.')[0]}: {title[1]}"] = body.partition("* Menu:")[0].strip()
    return nodes


def numpy_docstrings() -> dict[str, str]:
    import numpy

    modules = numpy, numpy.linalg, numpy.fft, numpy.random, numpy.polynomial, numpy.ma, numpy.char, numpy.testing
    found = {f"{module.__name__}.{name}": value for module in modules for name, value in vars(module).items()}
    texts = {name: inspect.getdoc(value) for name, value in found.items() if callable(value)}
    once = {text: name for name, text in sorted(texts.items()) if text}
    return {name: text for text, name in once.items()}


def halves(source: str, documents: dict[str, str]) -> Split:
    """Every second document for evaluation, if it shares no words with one of the first kind."""
    texts = [documents[name] for name in sorted(documents) if len(documents[name]) > 400]
    calibration = texts[::2]
    seen = set().union(*map(runs_of_words, calibration))
    return Split(source, calibration, [text for text in texts[1::2] if seen.isdisjoint(runs_of_words(text))])


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def splits() -> dict[str, Split]:
    python = halves("pydoc_data.topics of the running Python", python_topics())
    nodes = manual_nodes()
    if nodes:
        manuals = sorted({name.split(":")[0] for name in nodes})
        return {"python": python, "manuals": halves(f"{INFO}: {', '.join(manuals)}", nodes)}
    print(f"No GNU manuals in {INFO} (apt-get install info coreutils-doc): numpy's docstrings take their place.")
    return {"python": python, "manuals": halves("docstrings of numpy", numpy_docstrings())}


def passages(documents: Iterable[str]) -> Iterator[str]:
    """Paragraphs of prose, on one line each, every one once."""
    seen = set()
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            line = " ".join(paragraph.split())
            prose = sum(c.isalpha() or c == " " for c in line) / max(len(line), 1)
            if 60 <= len(line) <= 600 and prose > 0.85 and line not in seen:
                seen.add(line)
                yield line


def fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
