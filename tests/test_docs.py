"""Every public name has a docstring whose example runs; the README's figures and table are those of the code."""

import doctest
import inspect
import re
import warnings
from pathlib import Path

import pytest

import sten

ROOT = Path(__file__).parent.parent
DATA = {"OPERATORS"}
PUBLIC = sorted(
    n for n in vars(sten) if not n.startswith("_") and not inspect.ismodule(getattr(sten, n)) and n not in DATA
)
# Contracts and records that are read, not called; their use is shown where they are made.
WITHOUT_EXAMPLE = {"Allocation", "DensifyError", "Edit", "Layout", "Sparsifier", "View"}


PROMISED = """
    Masked CSR BSR NM GroupedNM VectorNM from_dense sparsify attach plan trainable finalize densify summary which
    save load explain compare Layout kernel Sparsifier strict Magnitude Random Uniform ERK Global Gradual STE SRSTE
    DecayingMask
    Static SET RigL SRigL SparseMomentum CAST
"""


def test_the_promised_names_exist():
    promised = PROMISED.split()
    assert not [name for name in promised if not hasattr(sten, name)]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = getattr(sten, name)
    text = inspect.getdoc(value) or ""
    assert len(text.split()) >= 5, f"sten.{name} has no docstring of its own"
    if callable(value) and name not in WITHOUT_EXAMPLE:
        assert ">>>" in text, f"sten.{name} has no example"


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name):
    value = getattr(sten, name)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in finder.find(value, name):
            runner.run(test)
    assert runner.failures == 0


PAGES = [
    "README.md",
    "docs/activations.md",
    "docs/architecture.md",
    "docs/concepts.md",
    "docs/explain.md",
    "docs/extending.md",
    "docs/formats.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, registry):
    """The python blocks of a page, in order, as one program; a block marked `python no-run` is only compiled."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python([^\n]*)\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks, f"{page} shows no code"
    space: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for flags, code in blocks:
            program = compile(code, page, "exec")
            if "no-run" not in flags:
                exec(program, space)


def test_links_of_the_pages():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
