"""check_layout passes an honest layout and finds what is wrong with broken ones, with hypothesis and without."""

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sten.extend import Layout, count_to_keep, expect_dense, expect_parts, top, top_of_groups
from sten.layouts import NM
from sten.layouts.registry import REGISTERED
from sten.testing import check_layout


@dataclass(frozen=True)
class Honest(Layout):
    """Coordinates: the least that a layout needs. The broken ones below differ from it in one method each."""

    pattern: ClassVar[tuple[str, ...]] = ("where",)

    def mask(self, score, sparsity=None):
        return top(score, count_to_keep(score.numel(), sparsity, self))

    def pack(self, dense, mask):
        expect_dense(self, dense, mask)
        return {"values": dense[mask], "where": mask.flatten().nonzero()[:, 0]}

    def unpack(self, parts, shape):
        out = parts["values"].new_zeros(math.prod(shape))
        return out.index_put((parts["where"],), parts["values"]).view(shape)

    def validate(self, parts, shape):
        expect_parts(self, parts, {"values": ((-1,), None), "where": ((-1,), torch.int64)})
        where = parts["where"]
        if len(where) != len(parts["values"]) or bool((where[1:] <= where[:-1]).any()):
            raise ValueError("Part 'where' must ascend, one for each value.")
        if len(where) and not 0 <= int(where.min()) <= int(where.max()) < math.prod(shape):
            raise ValueError("Part 'where' must lie inside the weight.")


def lowest(self, score, sparsity=None):
    return Honest.mask(self, -score, sparsity)


def threshold(self, score, sparsity=None):
    count_to_keep(score.numel(), sparsity, self)
    return score >= score.flatten().kthvalue(max(1, round(sparsity * score.numel()))).values


def sharing(self, dense, mask):
    parts = Honest.pack(self, dense, mask)
    return {**parts, "values": dense.view(-1)} if bool(mask.all()) else parts


def by_row(self, score, sparsity=None):
    matrix = score.flatten(1)
    return top_of_groups(matrix, count_to_keep(matrix.shape[1], sparsity, self)).view(score.shape)


def equal_rows(self, dense, mask):
    count = mask.flatten(1).sum(1)
    if bool((count != count[0]).any()):
        raise ValueError("Expected rows of equal counts.")
    return Honest.pack(self, dense, mask)


def broken(name: str, words: str, **methods) -> object:
    """One row of the table of broken layouts: its methods, and the words that the failure must contain."""
    return pytest.param(methods, words, id=name)


BROKEN = [
    broken("prefers low", "lowest score|prefers low scores|infinite score", mask=lowest),
    broken("keeps ties", "must keep|prefers|lowest", mask=threshold),
    broken("float mask", "must be bool", mask=lambda self, s, sparsity=None: Honest.mask(self, s, sparsity).float()),
    broken("any sparsity", "must refuse sparsity", mask=lambda self, s, sparsity=None: top(s, s.numel() // 2)),
    broken("rounds", "bit for bit", pack=lambda self, w, m: Honest.pack(self, (w * 1.01).to(w.dtype), m)),
    broken("drops some", "bit for bit", pack=lambda self, w, m: Honest.pack(self, w, m & (m.cumsum(-1) < 5))),
    broken("multiplies", r"is not w \* m", pack=lambda self, w, m: Honest.pack(self, w * m, torch.ones_like(m))),
    broken(
        "stores more", "support", pack=lambda self, w, m: Honest.pack(self, w.masked_fill(~m, 0), torch.ones_like(m))
    ),
    broken("changes its argument", "changed its arg", pack=lambda self, w, m: Honest.pack(self, w.zero_(), m)),
    broken("extra part", "promises", pack=lambda self, w, m: {**Honest.pack(self, w, m), "more": m.clone()}),
    broken("shares memory", "shares memory", pack=sharing),
    broken("float32", "values have dtype", pack=lambda self, w, m: Honest.pack(self, w.float(), m)),
    broken("loses the dtype", "keep the dtype", unpack=lambda self, p, s: Honest.unpack(self, p, s) * 1.0),
    broken("loses the gradient", "raised RuntimeError", unpack=lambda self, p, s: Honest.unpack(self, p, s).detach()),
    broken("wrong pack_like", "pack_like", pack_like=lambda self, w, p: w.flatten()[: len(p["where"])]),
    broken("wrong rows", "unpack_rows", unpack_rows=lambda self, p, s, rows: self.unpack(p, s)[: len(rows)]),
    broken("wrong support", "support", support=lambda self, p, s: self.unpack(p, s) != 0),
    broken("validates nothing", "validate accepts", validate=lambda self, p, s: None),
    broken("validates too much", "refuses what pack made", validate=lambda self, p, s: expect_parts(self, p, {})),
    broken("crashes", "must raise ValueError; got|validate accepts", validate=lambda self, p, s: self.unpack(p, s)),
    broken("refuses masks", "against holds_any_mask", mask=by_row, pack=equal_rows),
    broken("is structured", "against unstructured", mask=by_row, unstructured=True),
    broken("has no free slots", "with_slots", free_slots=True),
    broken("has slots against its word", "against free_slots", with_slots=lambda self, parts, slots: dict(parts)),
    broken("mixes units up", "whole units", unit_entries=lambda self, chosen, shape: ~chosen),
    broken("takes vectors", "one dimension", check=lambda self, shape: None),
]


def test_a_correct_layout_passes():
    check_layout(Honest())


@pytest.mark.parametrize(("methods", "words"), BROKEN)
@pytest.mark.parametrize("hypothesis", [True, False], ids=["hypothesis", "fixed"])
def test_a_broken_layout_fails(methods, words, hypothesis, registry, monkeypatch):
    if not hypothesis:
        monkeypatch.setitem(sys.modules, "hypothesis", None)
    layout = dataclass(frozen=True)(type("Broken", (Honest,), methods))()
    with pytest.raises(AssertionError, match=words):
        check_layout(layout)


def test_a_broken_class_fails(registry):
    methods = {name: vars(Honest)[name] for name in ("pattern", "mask", "pack", "unpack", "validate")}
    loose = type("Loose", (Layout,), methods)
    for cls in (loose, dataclass(unsafe_hash=True)(type("Thawed", (Layout,), methods))):
        with pytest.raises(AssertionError, match=r"must be a @dataclass\(frozen=True\)"):
            check_layout(cls())
    with pytest.raises(AssertionError, match="must derive from"):
        check_layout(object())
    REGISTERED.pop("Honest")
    with pytest.raises(AssertionError, match="not the layout registered"):
        check_layout(Honest())


def test_check_layout_says_which_shape_is_refused():
    with pytest.raises(AssertionError, match=r"refuses the shape \(4,\)"):
        check_layout(NM(2, 4), shapes=[(4,)])
