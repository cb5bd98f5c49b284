"""Static analysis of a source tree: files, imports, private names, state at module level.

For the tests of the layers and for `benchmarks/structure.py`. Nothing here imports sten, except `module_state`.
"""

from __future__ import annotations

import ast
import contextvars
import enum
import functools
import importlib
import inspect
import textwrap
import threading
import weakref
from collections import OrderedDict, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRITES = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove"}
WRITES |= {"setdefault", "update", "setattr"}
# used in PyTorch's documentation of tensor subclasses; and operators, which are public by name
SUBCLASSING = ("torch.utils._pytree", "torch.utils._python_dispatch", "torch.Tensor._make_wrapper_subclass")
SUBCLASSING += ("torch.ops.",)
PLAIN = (dict, list, set, bytearray, deque, OrderedDict)
WEAK = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)


def files(root: Path = ROOT) -> list[Path]:
    """The Python files of the package: `sten` and `kernels`, which `sten/kernels` is a link to."""
    sten = [path for path in (root / "sten").rglob("*.py") if "kernels" not in path.relative_to(root).parts[1:2]]
    return sorted(sten) + sorted((root / "kernels").rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path, root: Path = ROOT) -> str:
    """`sten.ops.linear` for sten/ops/linear.py, `sten.kernels.bsr` for kernels/bsr.py."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("sten", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path: Path, root: Path = ROOT) -> str:
    """The file or folder directly below `sten` that a file belongs to, as a drawing of the layers shows it."""
    parts = module_name(path, root).split(".")
    return parts[1] if len(parts) > 1 else "sten"


@functools.cache
def _modules(root):
    return frozenset(module_name(path, root) for path in files(root))


@functools.cache
def imported_modules(path: Path, root: Path = ROOT, at_import_only: bool = False) -> frozenset[str]:
    """The names of sten's modules that a file imports, without TYPE_CHECKING blocks; with `at_import_only`, without
    imports inside functions."""
    package = module_name(path, root).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    modules, imported = _modules(root), set()
    for node in _statements(tree(path), functions=not at_import_only):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:  # a module, or a name in one
                imported.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return modules & imported


def _statements(module, functions: bool = False):
    """The nodes that run when a file is imported, with `functions` also those in functions; no TYPE_CHECKING blocks."""
    todo = list(module.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def file_arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """{module: modules that it imports when it is imported}."""
    return {module_name(p, root): imported_modules(p, root, True) - {module_name(p, root)} for p in files(root)}


def room_arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """{room: rooms that its files import}; `sten/__init__.py`, the public list, is none."""
    arrows: dict[str, set[str]] = {}
    for path in files(root):
        if room(path, root) != "sten":
            others = {name.split(".")[1] for name in imported_modules(path, root) if "." in name}
            arrows.setdefault(room(path, root), set()).update(others - {room(path, root)})
    return arrows


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """The names along one cycle, or nothing."""
    done: set[str] = set()

    def search(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if path := search(other, [*trail, name]):
                return path
        done.add(name)
        return []

    return next((path for name in sorted(arrows) if (path := search(name, []))), [])


def depths(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The length of the longest chain of imports from each room; a cycle counts once."""

    def depth(name, trail):
        below = [depth(other, trail | {name}) for other in arrows.get(name, ()) if other not in trail]
        return 1 + max(below, default=-1)

    return {name: depth(name, frozenset({name})) for name in arrows}


def private_names(path: Path) -> set[str]:
    """The private names of torch and triton in a file: `torch._C._len_torch_dispatch_stack`, ...

    A name is private if a component begins with an underscore; of triton, everything except its language, tools and
    errors is. What the documentation of tensor subclasses uses is not counted. Private methods of tensors are not
    detected: an attribute of a value has no module.
    """
    names, roots = set(), {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("torch", "triton"):
                    roots[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name[:6]
                    names.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in ("torch", "triton"):
            for alias in node.names:
                roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                names.add(f"{node.module}.{alias.name}")
    inner = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *rest = ast.unparse(node).split(".")
            if first in roots:
                names.add(".".join([roots[first].replace("torch.torch", "torch"), *rest]))
    private = {name for name in names if _private(name) and not name.startswith(SUBCLASSING)}
    return {name for name in private if not any(other.startswith(name + ".") for other in private)}


def _private(name):
    top, *rest = name.split(".")
    if any(part.startswith("_") and not part.endswith("__") for part in rest):
        return True
    public = ("language", "testing", "tools", "runtime.errors", "errors")
    inner = {"runtime", "backends", "compiler", "knobs"}
    return top == "triton" and rest[:1] != [] and rest[0] in inner and not ".".join(rest).startswith(public)


def decisions_by_class(path: Path, classes: set[str]) -> list[str]:
    """Where a file tests for one of these classes: isinstance, issubclass, `type(x) is`, a `case`, a singledispatch."""

    def named(node):
        return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if _is_name(n)} & classes

    decisions = []
    for node in ast.walk(tree(path)):
        tested = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2:
                tested = node.args[1]
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            tested = ast.Tuple(node.comparators)
        elif isinstance(node, ast.MatchClass):
            tested = node.cls
        elif isinstance(node, ast.FunctionDef) and any("register" in ast.unparse(d) for d in node.decorator_list):
            tested = ast.Tuple([*node.decorator_list, *(a.annotation for a in node.args.args if a.annotation)])
        if tested is not None and named(tested):
            decisions.append(f"line {node.lineno}: {', '.join(sorted(named(tested)))}")
    return decisions


def _is_name(node):
    return isinstance(node, (ast.Name, ast.Attribute))


def module_state(root: Path = ROOT) -> dict[str, str]:
    """{name: type} of the objects at module level that change while the program runs.

    Those are containers (dict, list, set, ...) that some function of the tree writes, weak containers, thread-local
    objects, instances of the tree's own classes whose methods write to themselves, and names that a `global` statement
    rebinds. A table that no function writes is a constant. Imports every module of the tree.
    """
    written, state = set().union(*map(_written, files(root))), {}
    for path in files(root):
        name = module_name(path, root)
        if path.stem == "__main__":
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # an extra that is not installed
            continue
        rebound = {name for node in ast.walk(tree(path)) if isinstance(node, ast.Global) for name in node.names}
        for bound in sorted(_bound(tree(path)) - {"__all__"}):
            value = getattr(module, bound, None)
            if bound in rebound or _changes(value, bound in written):
                state[f"{name}.{bound}"] = type(value).__name__
    return state


def _bound(module):
    """The names that the statements of a file assign to."""
    names = set()
    for node in _statements(module):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and not isinstance(node, ast.ClassDef):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _written(path):
    """The names that functions of a file write to: `NAME[...] =`, `NAME.add(...)`, `module.NAME |=`, ..."""
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    targets = [target for function in functions for target in _write_targets(function)]
    return {target.id if isinstance(target, ast.Name) else target.attr for target in targets if _is_name(target)}


def _write_targets(function):
    """The targets that a function writes to: the expression `x` of `x[...] =`, `x.y =`, `x.add(...)`, `x |=`."""
    for node in ast.walk(function):
        target = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            target = node.func.value
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            target = node.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        while isinstance(target, ast.Subscript):  # NAME[key][other] = ...
            target = target.value
        if target is not None:
            yield target


def _writes_itself(kind):
    """Whether a method of the class, except its constructor, writes to `self` or its attributes."""
    classes = [c for c in kind.__mro__ if c.__module__.startswith("sten.")]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(c))).body[0].body for c in classes]
    methods = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
    return any(ast.unparse(t).split(".")[0] == "self" for method in methods for t in _write_targets(method))


def _changes(value, written):
    kind = type(value)
    if isinstance(value, (type, enum.Enum, tuple)):
        return False
    if isinstance(value, PLAIN):
        return written
    if isinstance(value, (*WEAK, threading.local, contextvars.ContextVar)) or kind.__name__ == "WeakIdKeyDictionary":
        return True
    return kind.__module__.startswith("sten.") and _writes_itself(kind)


def memoized(root: Path = ROOT) -> list[str]:
    """The functions and methods with a functools cache."""
    return [
        f"{module_name(path, root)}.{node.name}"
        for path in files(root)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(d) for d in node.decorator_list)
    ]
