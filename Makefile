# Two commands on a fresh machine with Python 3.10 or newer:
#   make example   sets up, then trains a small GPT in two processes, resumes if it was stopped, exports
#   make test      sets up, then runs every test
# and `make test-oldest`: every test on the oldest versions that pyproject.toml allows (5 GB; Python 3.10 or 3.11)
# and `make soak`: three minutes of the example, killed and resumed (benchmarks/soak/README.md)
# TORCH pins the build; an unpinned torch pulls gigabytes of CUDA packages that a laptop has no use for.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: example test test-oldest soak check clean

.venv/.examples: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[examples]'
	touch $@

.venv/.dev: .venv/.examples
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

example: .venv/.examples
	$(BIN)/python examples/train_gpt.py fit --config configs/gpt_zero2.yaml
	$(BIN)/lightning-zero ls runs/gpt_zero2/checkpoints
	$(BIN)/python examples/generate.py runs/gpt_zero2/model.ckpt

test: .venv/.dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

.venv-oldest/.dev: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	touch $@

test-oldest: .venv-oldest/.dev
	.venv-oldest/bin/python -m pytest $(SIDE_BY_SIDE)

soak: .venv/.dev
	$(BIN)/python -m benchmarks.soak --minutes 3

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-oldest runs
