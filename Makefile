# Freehold's chores. `make` lists them. Everything is installed into .venv; nothing outside this folder is changed.
PYTHON ?= python3
SIZE ?=
PORT ?= 8000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
LOCKS := requirements/torch.txt requirements/run.txt requirements/dev.txt
BUILT_FROM := pyproject.toml setup.py $(wildcard native/*)
NAME := $(or $(SIZE),freehold-tiny)

.PHONY: help up install test nightly lint format docs lock bench wheel clean
help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

up: $(INSTALLED) ## install, and serve models/freehold-tiny on 127.0.0.1:8000 (PORT=..., SIZE=nano: random weights)
	@test -z "$(SIZE)" || $(BIN)/freehold tiny models/$(SIZE) --size $(SIZE)
	@sed -n '/<!-- try -->/,/<!-- .try -->/{/^<!--/d;/^```/d;s/:8000/:$(PORT)/;s/"freehold-tiny"/"$(NAME)"/;p}' README.md
	@exec $(BIN)/freehold serve models/$(NAME) --port $(PORT)

install: $(INSTALLED) ## make .venv with torch, the locked packages and this package

test: lint ## run all checks and tests, but the nightly ones
	$(BIN)/pytest

nightly: lint ## run everything, with many more random examples, and every benchmark
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -m ''
	$(MAKE) bench

lint: $(INSTALLED) ## ruff, mypy --strict, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED) ## regenerate what is generated in docs/, ARCHITECTURE.md and tests/golden/cli.txt
	$(BIN)/python docs/generate.py

lock: $(INSTALLED) ## write requirements/*.txt from pyproject.toml (OPTIONS=--upgrade raises versions)
	$(BIN)/python requirements/lock.py $(OPTIONS)

bench: $(INSTALLED) ## run every benchmark; results go to benchmarks/results
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

wheel: $(INSTALLED) ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove .venv, caches and build results; keeps models/
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch comes first and without a hash (requirements/torch.txt says why), then everything else is checked by hash;
# the second look at torch adds the vendor libraries that a GPU build of it needs, and nothing to a CPU build.
$(INSTALLED): $(BUILT_FROM) $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Freehold needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "installing into $(VENV): about 1 GB, a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r requirements/torch.txt
	$(PIP) install --require-hashes -r requirements/dev.txt
	$(PIP) install -r requirements/torch.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
