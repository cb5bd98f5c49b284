"""A fixed sample of the rows: no fault that known.json does not list, and none on it that is mended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conformance import known
from tests.conformance.runner import rows_of

pytestmark = pytest.mark.xdist_group("conformance")  # one run of the sample serves both tests


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the sample, played in a process of their own: one that ends is a row, not the end of the tests."""
    folder = tmp_path_factory.mktemp("conformance")
    arguments = ["--sample", "--file", str(folder / "rows.jsonl"), "--json", str(folder / "results.json")]
    command = [sys.executable, "-m", "tests.conformance", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode in (0, 1), result.stderr
    return rows_of(folder / "rows.jsonl")


def test_the_sample_has_no_fault_that_is_not_known(rows):
    assert len(rows) > 1000
    assert known.new_faults(rows) == []


def test_every_known_fault_of_the_sample_still_fails(rows):
    """If this fails, take the entries off: python -m tests.conformance --write-known"""
    assert known.mended(rows) == []
