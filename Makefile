# Every target does its own set-up: a fresh clone needs Python 3.11+, a C++ compiler, CMake and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := engine dwarfstar_tui tests scripts benchmarks
NATIVE := $(shell find native -type f -not -path '*/tests/*')

.PHONY: run serve test test-unit nightly check format bench proto screenshots lock clean

run: $(STAMP)            ## the main job: the demo model over three local nodes, in the app if this is a terminal
	@$(BIN)/dwarfstar --demo

serve: $(STAMP)          ## the same, headless
	@$(BIN)/dwarfstar --serve --demo

test: $(STAMP)           ## all tests: simulation, unit, native, llama.cpp, whole processes
	$(BIN)/python -m pytest -n 2 tests/sim
	$(BIN)/python -m pytest -n 2 tests/unit tests/native tests/tui
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/llama
	$(BIN)/python -m pytest tests/process

test-unit: $(STAMP)      ## the quick part
	$(BIN)/python -m pytest -n 2 tests/unit

nightly: $(STAMP)        ## a million schedules of the simulation from a new seed: about 15 minutes on one core
	cd tests && ../$(BIN)/python -m sim.nightly $(NIGHTLY)

check: $(STAMP)          ## format, lint, types, import contracts
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy tests scripts benchmarks
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(STAMP)          ## beside llama.cpp's own servers: about 3 minutes to build them once, then about 20
	$(BIN)/python benchmarks/build_peers.py
	$(BIN)/dwarfstar bench --peers .cache/peers/bin $(BENCH) \
		--json benchmarks/results/latest.json --svg benchmarks/results/latest.svg
	$(BIN)/python benchmarks/update_readme.py

proto: $(STAMP)          ## generated code of the wire protocol
	$(BIN)/python scripts/gen_proto.py

screenshots: $(STAMP)    ## pictures of every screen and theme, and what the tests compare screens with
	cd tests && ../$(BIN)/python -m support.tui_pictures

lock:                    ## pin what the ranges in pyproject.toml give today
	rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet '.[demo,nvidia,dev]'
	(echo "# Exact versions, written by make lock. The ranges are in pyproject.toml."; \
	 .cache/lock/bin/python -m pip freeze --exclude dwarfstar-tui) > requirements.lock

# llama.cpp is compiled once (about 4 minutes on 2 cores); pip keeps the wheel.
$(STAMP): pyproject.toml requirements.lock $(NATIVE)
	@echo "Setting up $(VENV): the first time this compiles llama.cpp, which takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
