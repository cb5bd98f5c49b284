"""The classifier, on operators of which each does one thing right or wrong."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import sten
from tests.conformance.classify import Verdict, judge, judge_gradients
from tests.conformance.forms import ALL, Form
from tests.conformance.operators import Attempt
from tests.conformance.runner import rows_of, run


def pair(seed: int = 0):
    torch.manual_seed(seed)
    sparse = Form(sten.CSR()).store(torch.randn(4, 6))
    return [sparse.to_dense()], [sparse]


def outcome(call, **options) -> str:
    with torch.no_grad():
        return judge(lambda arguments: call(arguments[0]), *pair(), **options).outcome


def is_sparse(w) -> bool:
    return isinstance(w, sten.SparseTensor)


def raises(error):
    raise error


@pytest.mark.parametrize("form", ALL, ids=str)
def test_a_form_stores_some_but_not_all_entries_of_a_matrix(form):
    mask = form.store(torch.randn(16, 32)).mask()
    assert 0 < int(mask.sum()) < mask.numel()


def test_right_and_wrong_results():
    assert outcome(lambda w: w.to_dense() + 1 if is_sparse(w) else w + 1) == "right"
    assert outcome(lambda w: w.mask() + w.to_dense() if is_sparse(w) else w + 1) == "wrong"
    assert outcome(lambda w: torch.zeros(2) if is_sparse(w) else w) == "wrong"


def test_lost_writes_and_writes_that_arrive():
    assert outcome(lambda w: w.mul_(2), writes=True) == "right"
    assert outcome(lambda w: None if is_sparse(w) else w.mul_(2), writes=True) == "lost"
    assert outcome(lambda w: w.mul_(3) if is_sparse(w) else w.mul_(2), writes=True) == "wrong"


def test_a_write_that_cannot_be_represented_is_refused_or_documented():
    ones = torch.ones(4, 6)
    assert outcome(lambda w: w.copy_(ones), writes=True) == "refused"
    assert outcome(lambda w: w.add_(1), writes=True, scalar=True) == "documented"
    assert outcome(lambda w: w.add_(1), writes=True) == "wrong"


def test_a_refusal_after_a_change_is_wrong():
    def halfway(w):
        w.mul_(2)
        return w.copy_(torch.ones(4, 6))

    assert outcome(halfway, writes=True) == "wrong"


def test_exceptions_that_sten_did_not_raise_are_crashes():
    assert outcome(lambda w: raises(AttributeError("internal")) if is_sparse(w) else w) == "crash"
    assert outcome(lambda w: raises(RuntimeError("use something else")) if is_sparse(w) else w) == "crash"
    assert outcome(lambda w: raises(ValueError("as dense")) or w) == "skipped"
    assert outcome(lambda w: w.set_(torch.zeros(4, 6)) if is_sparse(w) else w) == "crash"  # refused a write, wrote none


def test_gradients_have_the_kind_of_their_argument():
    def product(arguments):
        return arguments[0] * 2

    assert judge_gradients(product, *pair()).outcome == "right"
    dense, sparse = pair()
    assert judge_gradients(product, sparse, dense).outcome in ("wrong", "skipped")


def test_the_end_of_the_process_is_a_row(tmp_path):
    def unit():
        for number in range(4):
            end = number == 2
            play = (lambda: os.kill(os.getpid(), signal.SIGSEGV)) if end else (lambda: Verdict("right"))
            yield Attempt("operator", "kind", f"case {number}", "form", play)

    file = tmp_path / "rows.jsonl"
    assert run({"suite": {"operator": unit}}, file)
    assert [row[5] for row in rows_of(file)] == ["right", "right", "crash", "right"]
    assert "SIGSEGV" in rows_of(file)[2][6]
