"""Fixtures for every test: a fixed seed, poisoned memory where it matters, and one thread."""

import os
import warnings

import pytest
import torch
from compatibility import Collector

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch.compile does in any test

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the extension may not be built; tests that need it say so
    import sten
    from sten.backends import cpp
    from sten.layouts.registry import REGISTERED


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility", metavar="PATH", help="run the tests marked `cell` and write their table to PATH"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    if config.getoption("--compatibility"):
        os.environ["STEN_ALL"] = "1"  # every cell, not the sample of the default run
        config.pluginmanager.register(Collector(config.getoption("--compatibility")))
    torch.set_num_threads(1)  # two workers share two cores; a test of threads sets its own number


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialized memory is full of NaN, in Python and in C++, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=cpp.features()["instruction_sets"])
def instruction_set(request):
    """Run the test with one instruction set, then reset to the fastest."""
    cpp.set_instruction_set(request.param)
    yield request.param
    cpp.set_instruction_set("auto")


@pytest.fixture
def registry():
    """Layouts that a test registers are forgotten again."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


@pytest.fixture
def strictly():
    """Nothing may densify."""
    with sten.strict():
        yield


def pytest_make_parametrize_id(config, val, argname):
    """Functions get their name: an address in a test's name would differ between the processes that share the work."""
    return val.__name__ if callable(val) and hasattr(val, "__name__") else None


@pytest.fixture
def one_thread():
    """Tiny tensors on a busy machine: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
