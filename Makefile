# Tunesmith. `make` lists the targets; each makes .venv first where it needs one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: tests and ranks share the cores, and threads that fight for them are ten times slower.
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-heavy test-cluster test-all torture planted test-gpu lint format docs bench step-proxies bench-growth bench-gpu bench-gpu-steps bench-crash engine-check kernels-check kernels-report clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "  make %-15s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,hub,sweep]'
	touch $@

demo: $(INSTALLED)  ## fine-tune the support bot on two ranks, then ask it every question it should know
	$(BIN)/python launch/demo.py

test: $(INSTALLED)  ## the tests
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not torture and not cluster and not gpu"

test-slow: $(INSTALLED)  ## the wide matrices, which take longer
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and not heavy and not cluster and not gpu"

test-heavy: $(INSTALLED)  ## every build of the kernels compiled, whole benches: about ten minutes, which .ci/run has not
	$(BIN)/pytest -n 2 --dist worksteal -m "heavy and not gpu"

# One after the other: ranks that wait for a core too long are taken for dead ones.
test-cluster: $(INSTALLED)  ## jobs on a real SLURM and hosts with networks of their own, on this machine; as root
	tests/cluster/install.sh
	$(BIN)/pytest -m "cluster and not gpu" -v tests/cluster

torture: $(INSTALLED)  ## every fault of the torture table, written into docs/reliability.md
	$(BIN)/pytest -n 2 --dist loadscope -m "row and (torture or not slow) and not cluster and not gpu" -q --torture-table=docs/reliability.md tests

test-all: test test-slow test-heavy torture test-cluster  ## every test that needs no GPU

planted: $(INSTALLED)  ## plant each fault of tests/planted in a copy, and show the test that falls
	$(BIN)/python tests/planted/plant.py

# Kernels are compiled by four processes at once: that is what their tests wait for.
test-gpu: $(INSTALLED)  ## what only a GPU can show
	$(BIN)/pytest -m gpu -n 4 --dist worksteal tests/kernels
	$(BIN)/pytest -m gpu --ignore=tests/kernels

lint: $(INSTALLED)  ## ruff, mypy, and that nothing here can run what it reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tunesmith.launch.unsafe_code
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## write docs/config.md from the schemas
	$(BIN)/python launch/config_docs.py

bench: $(INSTALLED)  ## speed, memory and start-up against transformers.Trainer and TRL, on the CPU; 13 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@$(BIN)/python bench/cpu_throughput.py
	@$(BIN)/python bench/performance_page.py

bench-growth: $(INSTALLED)  ## how the cost of a step grows, with exponents; 2 minutes
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/performance_page.py

step-proxies: $(INSTALLED)  ## what a step costs whatever the machine's mood: waits, masks, bytes, launches
	$(BIN)/python bench/step_proxies.py --list

bench-gpu: $(INSTALLED)  ## the kernels against Liger, CCE, PEFT and others, on a GPU; about five minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python bench/gpu_probe.py --seconds 60
	$(BIN)/python bench/gpu_loss.py --seconds 130
	$(BIN)/python bench/gpu_lora.py --seconds 90

bench-gpu-steps: $(INSTALLED)  ## whole steps against PEFT, TRL, Liger and torch.compile, on a GPU; under nine minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python bench/gpu_probe.py --seconds 30
	$(BIN)/python bench/gpu_steps.py --seconds 400
	$(BIN)/python bench/performance_page.py

bench-crash: $(INSTALLED)  ## crashes, flipped bits and resuming, beside transformers.Trainer with DeepSpeed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python bench/crash_peer.py

engine-check: $(INSTALLED)  ## gradients of the engine on two ranks against float64, in every combination
	$(BIN)/python -P -m tunesmith.train.run.engine_check

kernels-check: $(INSTALLED)  ## the proof of the kernels that needs no GPU, with its figures
	$(BIN)/python bench/kernels_check.py

kernels-report: $(INSTALLED)  ## cross-compile every kernel for A100 and H100, write docs/kernels_compiled.md
	$(BIN)/python bench/kernels_report.py

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
