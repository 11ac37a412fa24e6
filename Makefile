# Every target prepares what it needs; a fresh machine needs Python 3.11 or newer and make.
#   PYTHON=python3.12     the interpreter that creates the environment
#   VENV=.venv            where the environment stands
#   PIP_FLAGS=...         further options for pip install

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
TAG ?= core
PARTS ?=
ARGS ?=

SHELL := bash
.SHELLFLAGS := -o pipefail -euc
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test lint format proto claims bench bench-gpu clean

PY := $(VENV)/bin/python
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
INSTALL = $(PY) -m pip install --no-input --disable-pip-version-check --progress-bar off \
	$(PIP_FLAGS) -c constraints.txt
SHOW := sed -u -n -e 's/^ *\(Downloading .*\)/  \1/p' \
	-e 's/^ *\(Installing collected packages\):.*/  \1 .../p'

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' Makefile

demo: $(CORE) ## start the server with the bundled models and show it at work
	@$(PY) -m mora_serve demo $(ARGS)

serve: $(CORE) ## serve the bundled models, with the console; ARGS="--base.model DIR" for another base
	@$(PY) -m mora_serve serve --http-address 127.0.0.1:8000 $(ARGS)

test: $(DEV) ## run the tests; ARGS="-k name" for some of them
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(DEV) ## check style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(DEV) ## format the code and apply safe fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

proto: $(DEV) ## regenerate the gRPC stubs in mora_serve/v1, and docs/api.md
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. \
		proto/mora_serve/v1/*.proto
	@$(PY) -m benchmarks.api_reference

claims: $(DEV) ## measure the stated figures that carry a tag; TAG=core
	@$(PY) -m benchmarks.claims --tag $(TAG) $(ARGS)

bench: $(DEV) ## measure performance beside peers: JSON, tables, plots; PARTS="throughput growth"
	@$(PY) -m benchmarks $(PARTS) $(ARGS)

bench-gpu: $(DEV) ## on a machine with a card: the whole measurement there, in under ten minutes
	@$(PY) -m benchmarks gpu $(ARGS)

clean: ## remove the environment, caches and measurements that are not kept
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		benchmarks/results/tmp
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed ($(PYTHON) is older or missing).' >&2; \
		echo 'Install one and name it: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'Creating $(VENV) ...'
	@if $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --without-pip $(VENV); then \
		$(PYTHON) -m pip --python $(PY) install -q --disable-pip-version-check $(PIP_FLAGS) pip; \
	elif package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing $$package: Debian's Python cannot make environments without it ..."; \
		apt-get -qq update && apt-get -qq install -y "$$package" >/dev/null; $(PYTHON) -m venv $(VENV); \
	else \
		echo "$(PYTHON) cannot make environments; on Debian: apt install $$package" >&2; exit 1; \
	fi

$(CORE): pyproject.toml constraints.txt | $(PY)
	@echo 'Installing mora-serve into $(VENV) (some minutes the first time) ...'
	@$(INSTALL) -e '.[http]' | $(SHOW)
	@touch $@

$(DEV): $(CORE)
	@echo 'Installing the development tools ...'
	@$(INSTALL) -e '.[dev,train,eval,http,otel,s3,ray,deploy]' | $(SHOW)
	@touch $@
