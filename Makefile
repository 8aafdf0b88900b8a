# `make demo` and `make test` each work on a fresh clone: they make .venv and install everything first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= out
PYTEST_ARGS ?=
SOAK_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest sanitize soak lint format bench gpu clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Slipstream needs Python 3.11 or later: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## real photographs -> LitData chunks -> DINO crops, with a contact sheet, out/demo/crops.png
	$(BIN)/slipstream demo --out $(OUT)/demo

# The interpreter and the compiler of Triton cannot share a process. What runs in either is one thread of Python, so it
# goes to several processes; the first run holds tests that measure time, threads and memory.
PARALLEL := -n auto --maxprocesses 4
test: $(READY)  ## every test; those that need a GPU run where there is one
	$(BIN)/python -m pytest -k "not compiled" $(PYTEST_ARGS)
	$(BIN)/python -m pytest -k compiled $(PARALLEL) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpret $(PARALLEL) $(PYTEST_ARGS)

# numpy 2.4 refuses a conversion that Triton 3.4's interpreter makes.
test-oldest:  ## the tests on the oldest torch and triton that pyproject.toml admits
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet 'torch==2.8.0' 'triton==3.4.0' 'numpy<2.4' --editable '.[test]'
	.venv-oldest/bin/python -m pytest -k "not compiled" $(PYTEST_ARGS)
	.venv-oldest/bin/python -m pytest -k compiled $(PARALLEL) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 .venv-oldest/bin/python -m pytest -m interpret $(PARALLEL) $(PYTEST_ARGS)

ASAN_OPTIONS := detect_leaks=0:max_malloc_fill_size=100000000:malloc_fill_byte=190:quarantine_size_mb=64
ASAN_OPTIONS := $(ASAN_OPTIONS):allocator_may_return_null=1:detect_container_overflow=0

sanitize: $(READY)  ## the compiled kernels once more, every address within an allocation (gcc's AddressSanitizer)
	LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=$(ASAN_OPTIONS) \
		$(BIN)/python -m pytest -p no:faulthandler -k compiled $(PYTEST_ARGS)

soak: $(READY)  ## a million samples, 200 loaders: nothing may grow; on a GPU SOAK_ARGS='--device cuda --minutes 10'
	$(BIN)/python tests/soak.py $(SOAK_ARGS)

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)  ## ruff's formatter and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the loader, pack, fetching and the CPU kernels beside their peers; JSON into benchmarks/results/
	$(BIN)/python benchmarks/bench_loader.py --out loader-cpu
	$(BIN)/python benchmarks/bench_pack.py --out pack-cpu
	$(BIN)/python benchmarks/bench_fetch.py --out fetch-cpu
	$(BIN)/python -m pytest benchmarks/bench_crop.py --benchmark-only --benchmark-json=benchmarks/results/crop-cpu.json
	$(BIN)/python -m pytest benchmarks/bench_color.py --benchmark-only --benchmark-json=benchmarks/results/color-cpu.json
	$(BIN)/python -m pytest benchmarks/bench_recipe.py --benchmark-only --benchmark-json=benchmarks/results/recipe-cpu.json

gpu:  ## on a GPU machine: the gpu-marked tests, then the GPU benchmarks; JSON into $$OUT
	bash benchmarks/gpu.sh

clean:
	rm -rf $(VENV) .venv-oldest $(OUT) build dist
