# Each target makes .venv and installs when that is missing or out of date.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH ?= ops

.PHONY: demo test test-gpu test-others test-ops test-gpu-interpreted test-bench bench lint format clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## train GRAND on the bundled digits; prints test accuracy and the picture's path
	$(BIN)/grand-fast train

# The longest part first: whichever of two processes is done takes the next.
test: $(STAMP)  ## every test, in parts that run two at a time
	@echo "Tests run in five parts, two at a time; what each but one prints follows as it ends."
	@$(MAKE) --no-print-directory --keep-going -j2 test-gpu test-others test-ops test-gpu-interpreted test-bench

test-gpu: $(STAMP)
	@$(call held,$(BIN)/python -m pytest tests/gpu --durations=5)

test-others: $(STAMP)
	$(BIN)/python -m pytest tests --ignore=tests/gpu --ignore=tests/bench --ignore=tests/ops --durations=10

test-ops: $(STAMP)
	@$(call held,$(BIN)/python -m pytest tests/ops --durations=5)

# Triton is told to interpret before it is imported, so one process cannot do both.
test-gpu-interpreted: $(STAMP)
	@$(call held,TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu --durations=5)

test-bench: $(STAMP)
	@$(call held,$(BIN)/python -m pytest tests/bench --durations=5)

# Prints in one piece, and fails as the command does.
held = log=$$(mktemp); $(1) >$$log 2>&1; status=$$?; cat $$log; rm $$log; exit $$status

bench: $(STAMP)  ## a benchmark suite: make bench BENCH=ops
	$(BIN)/python -m bench $(BENCH)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## ruff, writing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or pass PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt --progress-bar on -e ".[bench,test,dev]"
	@touch $@
