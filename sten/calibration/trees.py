"""Arguments and outputs of modules as trees of tuples, lists and dictionaries; the rest are leaves, with paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

Path = tuple[Any, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of every leaf, in order."""
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, (tuple, list)):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, child in items:
        yield from leaves(child, (*path, key))


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with `function` of each leaf."""
    return placed(lambda path, leaf: function(leaf), tree)


def placed(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The tree with `function` of each path and leaf."""
    if isinstance(tree, Mapping):
        new = {} if type(tree) is dict else copy(tree)  # a class of outputs, which has attributes, too
        for key, child in tree.items():
            new[key] = placed(function, child, (*path, key))
        return new
    if isinstance(tree, (tuple, list)):
        children = [placed(function, child, (*path, i)) for i, child in enumerate(tree)]
        if hasattr(tree, "_fields"):
            return type(tree)(*children)
        return children if isinstance(tree, list) else tuple(children)
    return function(path, tree)


def at(tree: Any, path: Path) -> Any:
    """The part of a tree at a path."""
    for key in path:
        tree = tree[key]
    return tree
