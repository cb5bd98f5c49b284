"""The documentation: every program of its pages runs and prints what they show, notebooks are as executed, and the site
builds without a broken link or anything from outside."""

import contextlib
import copy
import io
import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import sten

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NEEDS = {
    "tasks/prune-cnn.md": ["sklearn"],
    "tasks/prune-llm.md": ["transformers"],
    "tasks/fine-tune-trainer.md": ["transformers", "accelerate"],
    "tasks/export-serve.md": ["onnx", "onnxscript", "onnxruntime"],
    "from/compressed-tensors.md": ["safetensors"],
    "recovery.md": ["transformers"],
    "notebooks/layouts.ipynb": ["matplotlib"],
    "notebooks/training.ipynb": ["matplotlib", "sklearn"],
}
TOGETHER = ("tasks/write-layout.md", "tasks/write-kernel.md")  # the second imports the file of the first
ELSEWHERE = {"training.md", "huggingface.md"}  # test_table.py, test_hf_trainer.py, and the list of test_docs.py
ELSEWHERE |= set(re.findall(r'"docs/([\w/-]+\.md)"', (ROOT / "tests" / "test_docs.py").read_text()))
PAGES = [
    path
    for path in sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    if "```python\n" in (DOCS / path).read_text() and path not in ELSEWHERE | set(TOGETHER)
]
BLOCK = re.compile(r"^```(python|text)([^\n]*)\n(.*?)^```", re.S | re.M)


class Blocks(nn.Module):
    """Two blocks and a last layer, as calibration and distillation find them in a language model."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def space_of(page):
    """What a page takes for granted: a model, and data."""
    torch.manual_seed(0)
    found = {"model": Blocks(), "batches": [torch.randn(32, 16) for _ in range(2)]}
    if page == "calibration.md":
        return found | {"texts": ["one", "two"], "tokenizer": lambda text, return_tensors: torch.randn(64, 16)}
    if page != "recovery.md":
        return {}
    from transformers import Trainer

    found |= {"copy": copy, "torch": torch, "sten": sten, "Trainer": Trainer}
    student = sten.trainable(sten.sparsify(copy.deepcopy(found["model"]), sten.NM(2, 4)))
    optimizer = torch.optim.AdamW(student.parameters())
    return found | {"teacher": found["model"], "student": student, "optimizer": optimizer}


def masked(text):
    """Numbers depend on machine and version; what stands around them does not."""
    return " ".join(re.sub(r"-?\d[\d.,]*(e-?\d+)?%?", "#", text).split())


def play(page, space):
    """The python blocks in order, as one program. A text block after one is the end of what was printed so far."""
    printed = ""
    for language, flags, code in BLOCK.findall((DOCS / page).read_text()):
        title = re.search(r'title="([\w.]+)"', flags)
        if language == "text":
            assert masked(printed).endswith(masked(code)), f"{page} shows\n{code}\nbut was printed\n{printed}"
            continue
        if page == "recovery.md":  # its runs are long
            code = re.sub(r"steps=\d{3}", "steps=3", code)
        program = compile(code, page, "exec")
        if title:
            Path(title[1]).write_text(code)
        elif "no-run" not in flags:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(program, space)
            printed += out.getvalue()


@pytest.mark.parametrize("pages", [*((page,) for page in PAGES), TOGETHER], ids=lambda pages: pages[0])
@pytest.mark.filterwarnings("ignore")
def test_programs(pages, tmp_path, monkeypatch, registry, one_thread):
    for name in NEEDS.get(pages[0], ()):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "diagonals", raising=False)
    for page in pages:
        play(page, {"__name__": "page"} | space_of(page))


@pytest.mark.parametrize("page", ["notebooks/layouts.ipynb", "notebooks/training.ipynb"])
def test_notebooks(page, monkeypatch, one_thread):
    """Executed without an error; the cells run, and print now what is stored."""
    for name in NEEDS[page]:
        pytest.importorskip(name)
    monkeypatch.setenv("MPLBACKEND", "agg")
    space = {"__name__": "notebook"}
    for cell in json.loads((DOCS / page).read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] and all(o["output_type"] != "error" for o in cell["outputs"])
            stored = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
            out = io.StringIO()
            with contextlib.redirect_stdout(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile("".join(cell["source"]), page, "exec"), space)
            assert masked(out.getvalue()).startswith(masked(stored)), out.getvalue()


def test_commands(capsys, monkeypatch):
    """Options of `python -m sten` that the pages use exist."""
    from sten.__main__ import main

    text = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    commands = set(re.findall(r"python -m sten (\w+)((?: [-\w./]+)*)", text))
    assert len(commands) > 3
    for command, rest in commands:
        monkeypatch.setattr(sys, "argv", ["sten", command, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr().out
        assert not end.value.code and all(option in shown for option in re.findall(r"--\w+", rest)), command + rest


def test_the_pictures_are_drawn_from_the_results(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "headline.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, timeout=60)
    for name in ("speed_gpu.svg", "speed_cpu.svg"):
        drawn = (tmp_path / name).read_text()
        assert len(re.findall(r"\d\.\dx</text>", drawn)) >= 9
        assert drawn == (DOCS / "images" / name).read_text(), "run python benchmarks/headline.py"


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    found = re.findall(r"^::: (\S+)$", text, re.M)
    modules = {"extend", "testing", "optim", "schedule", "scores"}
    names = [f"sten.{name}" for name in set(sten.__all__) - modules]
    shared = {name for name in sten.extend.__all__ if name in sten.__all__} | {"OPERATORS", "Parts", "State"}
    names += [f"sten.extend.{name}" for name in set(sten.extend.__all__) - shared]
    names += [f"sten.testing.{name}" for name in sten.testing.__all__]
    missing, twice = sorted(set(names) - set(found)), {name for name in found if found.count(name) > 1}
    assert not missing, f"add `::: {missing[0]}` to a page of docs/reference (and {missing[1:]})"
    assert not twice


class Links(HTMLParser):
    """The addresses of a page, its anchors, and what it loads."""

    def __init__(self):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        address = attributes.get("href") if tag in ("a", "link") else attributes.get("src")
        if address and not address.startswith("data:"):
            (self.links if tag == "a" else self.loaded).append(address)


def test_the_site(tmp_path):
    """It builds in strict mode; no link is broken, and no page loads anything from outside."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in tmp_path.rglob("*.html"):
        pages[path] = Links()
        text = path.read_text()
        assert not re.search(r"<p>[^<]*\n[-*|] ", text), f"{path.name}: a list or table needs an empty line before it"
        pages[path].feed(text)
    assert len(pages) > 50
    for path, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"https?:|//", address), f"{path.name} loads {address}"
        for address in page.links + page.loaded:
            if re.match(r"[a-z]+:", address) or path.name == "404.html":
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.exists(), f"{path.relative_to(tmp_path)}: {address}"
            if anchor and target in pages and not anchor.startswith("__"):
                assert unquote(anchor) in pages[target].anchors, f"{path.relative_to(tmp_path)}: {address}"
