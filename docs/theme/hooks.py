"""What `mkdocs build` does beyond mkdocs.yml: files outside docs/, notebooks, and links from names to the reference."""

import json
import re
from pathlib import Path

from docstrings import linked
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # file of the repository -> page
SHOWN = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py") if path.name != "setup.py"}
OUTSIDE |= {name: name.removesuffix(".py") + ".md" for name in SHOWN}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def on_files(files, config):
    """Add pages for the changelog and its like, and for the examples; notebooks become pages."""
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text()
        if name in SHOWN:
            text = f"# {name}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = file.src_uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, page, content=notebook(json.loads(file.content_string))))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ lead to the pages above; names of sten, to the reference."""
    name = page.file.src_uri
    origin = next((source for source, target in OUTSIDE.items() if target == name), f"docs/{name}")

    def moved(match):
        target, anchor = match[1], match[2] or ""
        try:
            path = (ROOT / origin).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        except ValueError:
            return match[0]
        if path.startswith("docs/") and origin.startswith("docs/"):
            return match[0].replace(".ipynb", ".md")
        path = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"]({'../' * name.count('/')}{path}{anchor})"

    def outside_of_code(text):
        text = re.sub(r"\]\(([^)#:\s]+)(#[^)]*)?\)", moved, text)
        return text if name.startswith("reference/") else linked(text)

    pieces, start = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [outside_of_code(markdown[start : fence.start()]), fence[0].replace("```python no-run", "```python")]
        start = fence.end()
    return "".join(pieces) + outside_of_code(markdown[start:])


def notebook(content):
    """A notebook that was executed, as Markdown."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                parts.append(f"```{{.text .output}}\n{text}\n```" if text else "")
    return "\n\n".join(parts) + "\n"
