# make demo     sets up, makes a small Wan2.2-style checkpoint, generates a video offloaded and
#               resident, and compares them bit for bit. MODEL=path-or-hub-id, PROMPT=... for real
#               weights; DEMO_ARGS="--steps 20" and the like are passed on.
# make test     sets up and runs all tests, as many at once as there are cores (PARALLEL= for one
#               at a time; with SETUP=0 ask for it: PARALLEL="-n auto").
# make check    format, lint, types, the extension's stub.
# make stress   C++ stress tests under the address, undefined-behaviour and thread sanitizers.
# make fuzz     the decoder of packed bytes against an inventive enemy, FUZZ_SECONDS=600 long.
# make sdist    builds an sdist, installs it elsewhere, and runs a model with it.
# make bench    the benchmarks (BENCH="step predict ..."), for a machine with a GPU.
#
# SETUP=1 (the default) uses a virtual environment in .venv, made once from constraints.txt.
# SETUP=0 uses PYTHON as it is, builds the extension in place, and reaches for no network.

SETUP ?= 1
PYTHON ?= python3
MODEL ?=
PROMPT ?=
DEMO_ARGS ?=
TEST_ARGS ?=
FUZZ_SECONDS ?= 600
BENCH ?= step memory wrapping micro predict limited

ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
ifeq ($(SETUP),1)
  PY := .venv/bin/python
  READY := .venv/.ready
  PARALLEL ?= -n auto
else
  PY := $(PYTHON)
  READY := inplace
endif
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/backend/*.cpp csrc/backend/*.h)
CPP := $(SOURCES) $(wildcard tests/cpp/*.cpp tests/cpp/*.h)
PYTHON_FILES := wanoffload kernels tests demo benchmarks setup.py

.PHONY: demo test check format stress fuzz sdist bench clean inplace

demo: $(READY)
	$(PY) -m demo $(if $(MODEL),--model "$(MODEL)") $(if $(PROMPT),--prompt "$(PROMPT)") $(DEMO_ARGS)

test: $(READY)
	$(PY) -m pytest $(PARALLEL) $(TEST_ARGS)

check: $(READY)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(PY) -m ruff check $(PYTHON_FILES)
	$(dir $(PY))clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy
	$(PY) -m mypy.stubtest wanoffload._C --mypy-config-file pyproject.toml \
	  --allowlist tests/stubtest_allowlist.txt --ignore-unused-allowlist

format: $(READY)
	$(PY) -m ruff format $(PYTHON_FILES)
	$(PY) -m ruff check --fix $(PYTHON_FILES)
	$(dir $(PY))clang-format -i $(CPP)

# Some kernels place memory where gcc's thread sanitizer does not expect it; without randomisation
# they don't.
stress: $(READY)
	for preset in asan tsan; do \
	  PATH="$(abspath $(dir $(PY))):$$PATH" && \
	  cmake --preset $$preset >/dev/null && cmake --build --preset $$preset && \
	  setarch -R ctest --preset $$preset || exit 1; \
	done

fuzz: $(READY)
	$(PY) -m tests.fuzz_packing --seconds $(FUZZ_SECONDS)

sdist: $(READY)
	rm -rf build/sdist && $(PY) -m build --sdist --outdir build/sdist .
	$(PY) -m pip install --quiet --no-deps --target build/sdist/site build/sdist/*.tar.gz
	cd build/sdist && PYTHONPATH=site $(abspath $(PY)) $(ROOT)tests/installed.py

bench: $(READY)
	$(PY) -m benchmarks $(BENCH)
	$(PY) -m benchmarks table

# torch first: it is no build requirement, and others would pull another build of it.
.venv/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(SOURCES)
	@echo "== setting up .venv: torch, then wanoffload (built here) and what its tests and demo need"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt --upgrade pip
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "== .venv is ready"

inplace:
	@echo "== building the extension in place, with $(PYTHON)"
	@$(PYTHON) setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist .venv wanoffload/*.so *.egg-info
