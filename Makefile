# Everything runs from .venv, which `make setup` builds from constraints.txt; every target sets up
# first when it must. pip's own settings (PIP_INDEX_URL and the like) are respected. On Linux x86-64
# the public index ships torch with CUDA; where pip also sees an index with the CPU build of the
# same version, it takes that one, and either is right.

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := uvloop,aiozmq,checksum,cli,vision,mooncake,cuda
SYSTEM := libibverbs1 libnuma1 libcurl4
PHOTO  ?= $(VENV)/lib/python3.*/site-packages/matplotlib/mpl-data/sample_data/grace_hopper.jpg
PYTEST ?= $(BIN)/python -m pytest -n 3 --dist worksteal
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$python && break; done)

.PHONY: setup system demo test check bench gpu gpu-wheels clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt aiomm/buffers/_memcpy.c
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "aiomm needs Python 3.11 or newer with venv; name one: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(VENV) has a Python older than 3.11; remove it and run make again" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[$(EXTRAS)]'
	@$(MAKE) --no-print-directory system
	touch $(READY)

# What the wheel of Mooncake needs of the system, installed where that is possible. Without it
# only that plane is missing; it says so itself, and its tests are skipped.
system:
	@$(BIN)/python -c 'import mooncake.engine' 2>/dev/null || \
		if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
			{ apt-get install -qq -y --no-install-recommends $(SYSTEM) || \
			{ timeout 120 apt-get update -qq && \
			apt-get install -qq -y --no-install-recommends $(SYSTEM); }; } >/dev/null 2>&1 </dev/null || \
			echo "$(SYSTEM) cannot be installed: the plane mooncake will be missing"; \
		else \
			echo "no mooncake plane here; it needs the system packages $(SYSTEM)"; \
		fi

demo: setup
	$(BIN)/aiomm demo --image $(PHOTO)

test: setup
	$(PYTEST)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

bench: setup
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.peers --save $(VENV)/peers.json
	$(BIN)/python -m benchmarks.two_hosts
	$(BIN)/python -m benchmarks.strangers
	$(BIN)/python -m benchmarks.goals --peers $(VENV)/peers.json

# On a machine with an NVIDIA GPU, with or without network and .venv: the first Python here that
# has a torch for CUDA, or the one that is named (make gpu GPU_PYTHON=python3.12). With GPU_OPTIONS
# it can be told to do less: make gpu GPU_OPTIONS='--quick --only handles,bytes'.
GPU_PYTHON ?= $(shell for python in $(BIN)/python python3; do \
	$$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && \
	echo $$python && break; done)
GPU_OPTIONS ?= --save benchmarks/results/gpu.json

gpu:
	@python="$(GPU_PYTHON)"; test -n "$$python" || \
		{ test -x $(BIN)/python && python=$(BIN)/python || python=python3; }; \
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $$python -m benchmarks.gpu $(GPU_OPTIONS)

# What that needs beyond torch and cuda-bindings or cupy, for a machine without network: carry the
# folder .wheels there.
WHEELS_PYTHON ?= 3.12

gpu-wheels: setup
	rm -rf .wheels
	$(BIN)/python -m pip install --quiet --no-deps --only-binary=:all: --constraint constraints.txt \
		--python-version $(WHEELS_PYTHON) --target .wheels/site msgspec pyzmq

clean:
	rm -rf $(VENV) build dist aiomm.egg-info aiomm/buffers/*.so htmlcov .coverage* .hypothesis \
		.import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
