"""The project's docstrings as Markdown: examples are shown as code, and names of sten are linked to the reference."""

import re
from pathlib import Path

import griffe

REFERENCE = Path(__file__).parent.parent / "reference"
NAMES = {name for page in REFERENCE.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


def linked(text):
    """`sten.NM(2, 4)` in a text becomes a link to the entry of `sten.NM`; in headings and links it stays."""

    def link(match):
        name = re.match(r"[\w.]+", match[1])[0]
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        return f"[{match[0]}][{name}]" if name else match[0]

    pattern = re.compile(r"(?<![\[`\w])`(sten\.[^`\n]+)`(?![`\]])")
    return "\n".join(line if line.startswith("#") else pattern.sub(link, line) for line in text.split("\n"))


class Docstrings(griffe.Extension):
    """Rewrite what Markdown would read in another way than the source does."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text, *examples = text.split("\nExamples:\n")
            obj.docstring.value = "\nExamples:\n".join([linked(text), *examples])
