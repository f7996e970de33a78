# Every target sets itself up. `make setup` again after an interruption goes on where it stopped.

PYTHON ?= python3.11
# Where pip looks for the CPU build of torch if what it is configured with has none. "+cpu" is part
# of the version, so a CUDA build is never fetched by accident.
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
READY := .venv/ready

.PHONY: help setup demo test faults soak check format bench clean

help:
	@echo "make setup   the virtual environment in .venv (no GPU needed)"
	@echo "make demo    translate the sample with the embedded model on real vLLM"
	@echo "make test    the tests, but for those that take longest"
	@echo "make faults  every fault of tests/faults/README.md, with real processes"
	@echo "make soak    half an hour of random faults"
	@echo "make check   ruff and mypy"

setup: $(READY)

# The stamp is written last: its existence means that the environment is complete.
$(READY): infra/requirements-cpu.txt pyproject.toml Makefile
	@echo "Setting up .venv (a few minutes the first time) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -c "from importlib.metadata import version; exit('torch==' + version('torch') != '$(TORCH)')" 2>/dev/null \
		|| $(PIP) "$(TORCH)" 2>/dev/null \
		|| $(PIP) --index-url $(TORCH_INDEX) "$(TORCH)"
	@$(PIP) -r infra/requirements-cpu.txt
	@$(PIP) --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@$(BIN)/axbatch run configs/demo.yaml --show

test: $(READY)
	@$(BIN)/pytest -n 2 --dist loadgroup

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Most of an hour: each fault of tests/faults/README.md, what `make test` only samples, and other
# slow tests.
faults: $(READY)
	@rm -rf out/faults
	@AXBATCH_FAULTS=all $(BIN)/pytest -v -rA tests/faults
	@AXBATCH_FAULTS=all $(BIN)/pytest -v -m slow --ignore tests/faults
	@$(BIN)/python -m tests.faults.observed

soak: $(READY)
	@$(BIN)/python -m tests.faults.soak

bench: $(READY)
	@$(BIN)/python -m tests.bench

clean:
	@rm -rf .venv out
