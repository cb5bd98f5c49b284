"""The house: a floor imports only floors below it, layouts never import each other, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {"kernels", "cpp"},
    1: {"layout", "layouts"},
    2: {"tensor", "dispatch"},
    3: {"ops", "native", "scores", "sparsifiers", "allocation", "schedule"},
    4: {
        "convert",
        "engine",
        "report",
        "training",
        "optim",
        "io",
        "testing",
        "targets",
        "state",
        "forms",
        "decision",
        "integrations",
        "__main__",
    },
}
SAME_FLOOR = {1: {"layout", "layouts"}, 2: {"dispatch"}, 3: FLOORS[3], 4: FLOORS[4]}
FILES = sorted(p for p in (ROOT / "sten").rglob("*.py") if "kernels" not in p.parts) + sorted(
    (ROOT / "kernels").rglob("*.py")
)


def room(path: Path) -> str:
    """The first name below `sten` (or `kernels`) that a file belongs to."""
    return (
        path.relative_to(ROOT / "sten").parts[0].removesuffix(".py")
        if "sten" in path.relative_to(ROOT).parts
        else "kernels"
    )


def floor(name: str) -> int:
    found = [number for number, names in FLOORS.items() if name in names]
    assert found, f"sten/{name} stands on no floor: add it to FLOORS and to docs/concepts.md"
    return found[0]


def imports(path: Path) -> set[str]:
    """The rooms of sten that a file imports."""
    package = ("sten", *path.relative_to(ROOT / "sten").parts[:-1]) if room(path) != "kernels" else ("sten", "kernels")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("sten.") and len(name.split(".")) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    if path == ROOT / "sten" / "__init__.py":
        pytest.skip("the public list")
    here = room(path)
    for other in imports(path) - {here}:
        below, same = floor(other) < floor(here), floor(other) == floor(here)
        assert below or (same and other in SAME_FLOOR.get(floor(here), ())), (
            f"{here} (F{floor(here)}) imports {other} (F{floor(other)})"
        )


def test_kernels_never_import_sten():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import sten" not in text and "from sten" not in text, path


def test_layouts_never_import_each_other():
    shared = {"__init__", "base", "checks", "compressed_rows", "padding", "registry", "topk"}
    names = {p.stem for p in (ROOT / "sten" / "layouts").glob("*.py")} - shared
    for path in (ROOT / "sten" / "layouts").glob("*.py"):
        if path.stem == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[-1] not in names, f"{path.name} imports {node.module}"


def test_files_are_small():
    for path in [
        *FILES,
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "csrc").glob("*.*"),
        *(ROOT / "examples").glob("*.py"),
    ]:
        relative = path.relative_to(ROOT)
        limit = {"sten": 400, "examples": 120}.get(relative.parts[0], 500)
        lines = path.read_text().count("\n")
        assert lines <= limit, f"{relative} has {lines} lines, more than {limit}"
