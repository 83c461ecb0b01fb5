# make demo | test | lint | bench      variables: PYTHON (interpreter of the new .venv), REAL (folder of photographs)
PYTHON ?= python3
ENV := .venv
STAMP := $(ENV)/.installed
BIN := $(ENV)/bin

# photographs beside the checkout are used by the tests when they are there; the demo wants them named
REAL_FOR_TESTS := $(if $(REAL),$(REAL),$(wildcard ../shared/real))

.PHONY: demo test lint bench

$(STAMP): setup.cfg requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
ifdef REAL
	$(BIN)/python benchmarks/real_photos.py --real $(REAL) --out runs/demo
else
	@echo "make demo needs photographs: make demo REAL=path/to/photos"
endif

test: $(STAMP)
	LSO_REAL="$(REAL_FOR_TESTS)" $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	@set -e; for race in benchmarks/[a-z]*.py; do \
	    if test "$$race" = benchmarks/real_photos.py; then continue; fi; \
	    test -e "$$race" || { echo "no benchmark here yet"; exit 0; }; \
	    echo "== $$race"; $(BIN)/python "$$race"; done
