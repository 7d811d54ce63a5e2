# Everything runs from the top folder: inside database/ the package sqlite3 would hide Python's own.
# Needs Python >= 3.11, git and make; all else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
ARGS ?=
# A process for each processor and two more, for many tests wait; who has no more to do takes over from others.
PARALLEL := -n $(shell expr $$(getconf _NPROCESSORS_ONLN || echo 1) + 2) --maxprocesses 8 --dist worksteal

# What has been compiled once need not be compiled again by each of the programs that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-postgresql test test-all test-main test-others fix check docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.test  ## the job service on the sample crontab, under asyncio, then trio; database in data/
	$(BIN)/python docs/examples/jobu.py --backend asyncio --jobs 500 docs/examples/sample.crontab
	@echo
	$(BIN)/python docs/examples/jobu.py --backend trio --jobs 500 docs/examples/sample.crontab

demo-postgresql: $(VENV)/.test  ## the same job service on PostgreSQL, by configuration alone; the server is a temporary one
	$(BIN)/python -m tests.postgresql.server $(BIN)/python docs/examples/jobu.py --backend asyncio --jobs 500
	@echo
	$(BIN)/python -m tests.postgresql.server $(BIN)/python docs/examples/jobu.py --backend trio --jobs 500

test: $(VENV)/.test  ## the tests, in two minutes: each kind of behaviour on every event loop and engine (ARGS="-k pool" goes to pytest)
	$(BIN)/python -m pytest --quick $(PARALLEL) $(ARGS)

test-all: test-main test-others  ## all tests in all combinations, the long ones too, with branch coverage; then on each other Python found

test-main: $(VENV)/.check  # all tests, on the main Python
	rm -f .coverage .coverage.*
	COVERAGE_PROCESS_START=pyproject.toml $(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-others: $(VENV)/.test  # all tests, on each other Python found
	.ci/interpreters test $(PARALLEL) $(ARGS)

fix: $(VENV)/.check  ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/.check  ## ruff, mypy, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## the site, built strictly into site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The neighbours stand in the dependency group `bench`; without it, raw sqlite3 is what there is to compare with.
bench: $(VENV)/.$(if $(shell grep '^bench = ' pyproject.toml),bench,test)  ## the benchmarks (ARGS=--quick for a short run)
	$(BIN)/python -m tests.benchmarks $(ARGS)

clean:  ## remove environments, caches and what was built; data/ stays
	rm -rf .venv .venv-3.* build dist site .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is brought up to date when pyproject.toml has changed since.
$(VENV)/.test: pyproject.toml
	python=$$(.ci/interpreters | sed -n '1s/^[^ ]* //p') && test -n "$$python" && "$$python" -m venv $(VENV)
	$(PIP) 'pip>=25.1'
	$(PIP) --no-compile --group test -e '.[trio,uvloop,progress,cli]'
	-$(BIN)/python -m pytest --quick --collect-only -q >/dev/null  # compiles what the tests need, once, and no more
	@touch $@

$(VENV)/.check $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: $(VENV)/.test
	$(PIP) --group $*
	@touch $@
