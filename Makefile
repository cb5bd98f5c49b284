# Two commands do everything on a machine with Python >= 3.11, pip and (optionally) g++:
#   make quickstart   install into .venv, build the kernels, run the main job
#   make test         lint and every test
# and on a machine with a GPU, where torch, triton and pytest may be the system's and sten need not be installed:
#   make gpu-test     the tests that need a GPU, run by PYTHON itself; in parallel where pytest-xdist is there

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)

GPU_TESTS := tests/test_triton_compile.py $(filter-out %_compile.py,$(wildcard tests/test_triton_*.py))  # the longest first
GPU_TESTS += tests/test_cuda.py tests/test_cuda_plans.py tests/test_cuda_sources.py tests/test_distributed.py

.PHONY: quickstart test gpu-test conformance compatibility lint install build coverage bench structure sanitize fuzz docs notebooks clean

quickstart: install
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

gpu-test:  # of test_distributed.py what runs over NCCL, where there are two GPUs
	@$(PYTHON) -c 'import sys, torch; sys.exit("make gpu-test needs a GPU" if not torch.cuda.is_available() else 0)'
	workers=$$($(PYTHON) -c 'import os, xdist; print("-n", max(1, min(14, os.cpu_count() - 2)), "--dist worksteal")' 2>/dev/null); \
	$(PYTHON) -m pytest $$workers -k "not gloo" -o faulthandler_timeout=300 --durations=10 $(GPU_TESTS)

lint: install
	$(BIN)/ruff check .

conformance: install  # PyTorch's operator, module and optimizer databases over every layout: about ten minutes
	$(BIN)/python -m tests.conformance

compatibility: install  # docs/compatibility.md, from the outcomes of the tests of clients
	$(BIN)/python -m pytest --compatibility=docs/compatibility.md

coverage: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov=sten --cov-report=term --cov-fail-under=90

install: .venv/installed

.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sten needs Python >= 3.11; set PYTHON= to one")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat --editable ".[dev]"
	touch $@

build: install  # incremental: rebuild the C++ extension alone
	$(BIN)/python setup.py build_ext --inplace

bench: install
	$(BIN)/python benchmarks/cpu_linear.py

structure: install
	$(BIN)/python benchmarks/structure.py

fuzz: install  # hostile files and state dicts, then every method killed and resumed: 20 minutes on two cores
	$(BIN)/python -m tests.fuzzing --count 100000
	STEN_ALL=1 $(BIN)/python -m pytest -n 2 tests/test_killed.py

docs: install  # into site/: open site/index.html, no server needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

notebooks: install  # execute docs/notebooks again, in place
	OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

sanitize:
	bash csrc/sanitize/run.sh

clean:
	rm -rf .venv build site *.egg-info sten/*.so
