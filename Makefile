# Every target sets up .venv by itself where it is missing. Needs Python 3.11 or newer, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test test-slow check bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip install -q -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m compileall -qq -j0 .venv/lib || true  # else each of Ray's processes may compile torch anew
	@touch $@

demo: $(READY)  ## the main job: S3 -> Ray Data -> Ray Train on 2 CPU workers -> an evaluated model and its report
	$(BIN)/python -m jobs.demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)  ## what `test` leaves out
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.bench_metrics
	$(BIN)/python -m benchmarks.bench_metrics_memory
	$(BIN)/python -m benchmarks.bench_losses
	$(BIN)/python -m benchmarks.bench_tiling
	$(BIN)/python -m benchmarks.bench_validation
	$(BIN)/python -m benchmarks.bench_checkpoint
	$(BIN)/python -m benchmarks.bench_survival
	$(BIN)/python -m benchmarks.bench_nodes --part train
	$(BIN)/python -m benchmarks.bench_nodes --part serve
	$(BIN)/python -m benchmarks.bench_tune
	$(BIN)/python -m benchmarks.bench_by_heart
	$(BIN)/python -m benchmarks.bench_train
	$(BIN)/python -m benchmarks.bench_startup
	$(BIN)/python -m benchmarks.bench_input
	$(BIN)/python -m benchmarks.bench_resume
	$(BIN)/python -m benchmarks.bench_annotations
	$(BIN)/python -m benchmarks.bench_inspect
	$(BIN)/python -m benchmarks.bench_balance --epochs 8 --passes 8
	$(BIN)/python -m benchmarks.bench_ceilings
	$(BIN)/python -m benchmarks.bench_plan --part saved
	$(BIN)/python -m benchmarks.bench_predict
	$(BIN)/python -m benchmarks.bench_serve
	$(BIN)/python -m benchmarks.bench_scale

clean:
	rm -rf .venv demo runs
