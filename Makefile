# Two commands do everything on a machine with Python >= 3.11, pip and (optionally) g++:
#   make quickstart   install into .venv, build the kernels, run the main job
#   make test         lint, the floors, every test

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: quickstart test lint install build coverage bench sanitize clean

quickstart: install
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: install
	$(BIN)/ruff check .

coverage: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov=sten --cov-report=term --cov-fail-under=90

install: .venv/installed

.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sten needs Python >= 3.11; set PYTHON= to one")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

build: install  # incremental: rebuild the C++ extension alone
	$(BIN)/python setup.py build_ext --inplace

bench: install
	$(BIN)/python benchmarks/cpu_linear.py

sanitize:
	bash csrc/sanitize/run.sh

clean:
	rm -rf .venv build *.egg-info sten/*.so
