"""The layers: what imports what, who may keep state, who may decide by a layout's class, who may use private names.

Each rule has its table; `AT_WORK` beside it lists the places that still break it, each to be deleted when it no longer
does. A test warns of entries that are not needed any more.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sten
from benchmarks import source_tree

ROOT = source_tree.ROOT
FILES = source_tree.files()
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# from the bottom to the top: a room imports rooms of earlier rows only, beside itself
LAYERS = [
    ("L0", "_torch_private", "errors", "kernels", "markup"),
    ("L0", "atomic_file"),
    ("L0", "tensor_file"),
    ("L1", "layouts", "read_only"),
    ("L2", "rule", "caller"),
    ("L2", "kernel_table"),
    ("L2", "pattern_cache"),
    ("L2", "checked", "sealed"),
    ("L2", "dispatch"),
    ("L2", "tensor"),
    ("L3", "ops"),
    ("L3", "backends", "sparsifiers"),
    ("L4", "training"),
    ("L4", "calibration"),
    ("L4", "conversion"),
    ("L4", "explanation", "io", "interchange", "recovery", "testing"),
    ("L4", "integrations"),
    ("L4", "extend", "command"),
    ("L4", "__main__"),
]
# the files of sten/layouts that are no layout
SHARED = {
    "__init__",
    "assignment",
    "base",
    "bitmap",
    "checks",
    "compiled",
    "compressed_rows",
    "construct",
    "padding",
    "patterns",
    "registry",
    "topk",
}
UPWARDS_AT_WORK: set[str] = set()

# registries, what is loaded once for the process, and the tuner's choices
STATE = {
    "sten.kernel_table.KERNELS",
    "sten.kernel_table.OPERATORS",
    "sten.layouts.registry.REGISTERED",
    "sten.tensor.ATEN",
    "sten.tensor.FUNCTIONS",
    "sten.dispatch._strict",  # a ContextVar: `sten.strict` in this thread or task
    "sten.backends.cpp._library",
    "sten.backends.cpp._load_error",
    "sten.kernels.autotune.TUNER",
}
# caches of launches and of what is derived from a pattern: docs/performance/host_path.md has key, limit, invalidation
STATE |= {
    "sten.kernels.launch_cache._launches",
    "sten.kernels.pattern_cache._constants",
    "sten.kernels.pattern_cache._entries",
    "sten.kernels.split_k.workspace",
}
# what was warned of once, and the lists that `observe()` fills while it is on
STATE |= {"sten.training.reminders.REMINDERS"}  # weak: of the weights in training, for torch's hook of all optimizers
STATE |= {"sten.kernel_table._warned", "sten.dispatch._observers", "sten._torch_private.PATHS"}
STATE_AT_WORK: set[str] = set()

PRIVATE = {"sten/_torch_private.py", "kernels/_triton_private.py"}
PRIVATE_AT_WORK: set[str] = set()

BY_CLASS: set[str] = set()
BY_CLASS_AT_WORK: set[str] = set()


def room(module: str) -> str:
    """The row of LAYERS that a module, as `sten.ops.linear`, belongs to by name."""
    parts = module.split(".")[1:]
    return parts[0]


def height(module: str) -> int:
    heights = [number for number, (_, *rooms) in enumerate(LAYERS) if room(module) in rooms]
    assert heights, f"{module} is in no layer: add {room(module)!r} to LAYERS and to docs/architecture.md"
    return heights[0]


def upwards(path: Path) -> set[str]:
    """The imports of a file that do not go down."""
    here, found = source_tree.module_name(path), set()
    for other in source_tree.imported_modules(path) - {here, "sten"}:
        if room(other) != room(here) and height(other) >= height(here):
            found.add(f"{here} -> {other}")
    return found


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


LAYOUTS = {c for c in subclasses(sten.Layout) if c.__module__.startswith("sten.")} - {sten.Layout}


def decisions(path: Path) -> list[str]:
    """Where a file decides by a class of layouts that it does not define itself."""
    module = source_tree.module_name(path)
    return source_tree.decisions_by_class(path, {c.__name__ for c in LAYOUTS if c.__module__ != module})


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@every_file
def test_imports_go_down(path):
    if path == ROOT / "sten" / "__init__.py":
        pytest.skip("the public list")
    assert not upwards(path) - UPWARDS_AT_WORK


def test_no_cycle_of_files():
    assert not source_tree.cycle(source_tree.file_arrows())


def test_no_cycle_of_files_in_functions_either():
    """An import inside a function may be late for the sake of time, not to hide a cycle."""
    arrows = {source_tree.module_name(path): source_tree.imported_modules(path) for path in FILES}
    assert not source_tree.cycle({name: others - {name, "sten"} for name, others in arrows.items() if name != "sten"})


def test_kernels_never_import_sten():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import sten" not in text and "from sten" not in text, path


def test_layouts_never_import_each_other():
    names = {path.stem for path in (ROOT / "sten" / "layouts").glob("*.py")} - SHARED
    for path in (ROOT / "sten" / "layouts").glob("*.py"):
        others = {module.split(".")[-1] for module in source_tree.imported_modules(path)} - {path.stem}
        assert path.stem == "__init__" or not others & names, f"{path.name} imports {others & names}"


def test_tests_never_import_tests():
    """What two of them need lies in a module of its own, which is no test."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            taken = [module for module in modules if module.split(".")[-1].startswith("test_")]
            assert not taken, f"{path.name} imports {taken}"


@functools.cache
def state() -> dict[str, str]:
    """What `import sten` leaves at module level; in a process of its own, because tests write there too."""
    program = "import json, benchmarks.source_tree as s; print(json.dumps(s.module_state()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_module_level_state_is_registries_and_the_tuner():
    found = {name: kind for name, kind in state().items() if name not in STATE | STATE_AT_WORK}
    assert not found, f"objects that outlive every model: {found}; keep them with the weight, the layer or the engine"


@every_file
def test_private_names_lie_in_one_file_a_folder(path):
    """So that a new torch or Triton is met in three files, each name with a fallback."""
    if name(path) not in PRIVATE | PRIVATE_AT_WORK:
        assert not source_tree.private_names(path)


@every_file
def test_no_decision_by_the_class_of_a_layout(path):
    """A layout says by its traits what the others need to know; a method about one layout says `layouts = (...)`."""
    if name(path) not in BY_CLASS | BY_CLASS_AT_WORK:
        assert not decisions(path)


def test_the_rules_see_what_they_forbid(tmp_path):
    for folder, text in {
        "sten/a.py": "from . import b\nKEPT, TABLE = {}, {}\n\ndef f(x):\n    KEPT[x] = TABLE[x]\n",
        "sten/b.py": "import sten.ops.c\nimport torch as t\nn = t._C._get_tracing_state\nok = t.nn.Linear\n",
        "sten/ops/c.py": "from ..a import f\nfrom triton.backends.nvidia import driver\nimport triton.language as tl\n",
        "sten/ops/d.py": "def g(x):\n    from . import c\n    return isinstance(x, (str, m.CSR)) or type(x) is BSR\n",
        "sten/ops/e.py": "from torch import Tensor, _C\n@f.register\ndef _(x: NM): ...\n",
    }.items():
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).write_text(text)
    paths = {path.stem: path for path in source_tree.files(tmp_path)}
    assert source_tree.cycle(source_tree.file_arrows(tmp_path)) == ["sten.a", "sten.b", "sten.ops.c", "sten.a"]
    assert source_tree.room_arrows(tmp_path) == {"a": {"b"}, "b": {"ops"}, "ops": {"a"}}
    assert source_tree.private_names(paths["b"]) == {"torch._C._get_tracing_state"}
    assert source_tree.private_names(paths["c"]) == {"triton.backends.nvidia.driver"}
    assert source_tree.private_names(paths["e"]) == {"torch._C"}
    classes = {"CSR", "BSR", "NM"}
    found = [source_tree.decisions_by_class(paths[stem], classes) for stem in "ade"]
    assert found == [[], ["line 3: CSR", "line 3: BSR"], ["line 3: NM"]]
    assert source_tree._written(paths["a"]) == {"KEPT"}


def test_files_are_small():
    more = [*(ROOT / "tests").glob("*.py"), *(ROOT / "csrc").glob("*.*"), *(ROOT / "examples").glob("*.py")]
    for path in [*FILES, *more]:
        limit = {"sten": 400, "examples": 120}.get(path.relative_to(ROOT).parts[0], 500)
        lines = path.read_text().count("\n")
        assert lines <= limit, f"{name(path)} has {lines} lines, more than {limit}"


def test_what_is_at_work_is_still_needed():
    """Only warns: an entry of the tables above that nothing needs any more should be deleted."""
    needed = set().union(*map(upwards, FILES[1:])), set(state())
    needed += {name(p) for p in FILES if source_tree.private_names(p)}, {name(p) for p in FILES if decisions(p)}
    tables = UPWARDS_AT_WORK, STATE | STATE_AT_WORK, PRIVATE | PRIVATE_AT_WORK, BY_CLASS | BY_CLASS_AT_WORK
    for table, still in zip(tables, needed, strict=True):
        if table - still:
            warnings.warn(f"delete from test_layers.py: {sorted(table - still)}", stacklevel=1)
