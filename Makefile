# Two commands do everything on a fresh machine:  make quickstart   make test
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# The stamp carries the version, so that an environment of another Python is never taken for this one.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
STAMP := $(VENV)/.installed-$(VERSION)

.PHONY: help quickstart test lint typecheck clean
.DEFAULT_GOAL := help

help: ## this text
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1|/' | awk -F'|' '{printf "%-17s %s\n", $$1, $$2}'
	@echo "PYTHON=$(PYTHON) (found: $(VERSION)) makes the environment, VENV=$(VENV) is where it lives."

quickstart: $(STAMP) ## a small model from nothing to reasoning: pretrain, SFT, DPO, GRPO (minutes, two CPU cores)
	$(BIN)/python -m experiments.ladder

test: lint typecheck ## lint, types and tests, as CI runs them
	$(BIN)/python -m pytest -n 2 -q

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

typecheck: $(STAMP) ## mypy
	$(BIN)/mypy

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache build lmjax.egg-info

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: PYTHON=$(PYTHON) is not Python 3.11 or later (found: $(VERSION)); name one, as in make PYTHON=python3.13" >&2; exit 2; }
	@if [ -x $(BIN)/python ]; then \
	  have=$$($(BIN)/python -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'); \
	  [ "$$have" = "$(VERSION)" ] || \
	    { echo "error: $(VENV) is an environment of Python $$have, not of $(VERSION); run make clean, or put this one elsewhere with VENV=.venv-$(VERSION)" >&2; exit 2; }; \
	fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[test]'
	@touch $@
