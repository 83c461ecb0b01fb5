# make demo | photos | test | lint | bench | miniature      variables: PYTHON (for the new .venv), REAL (photographs)
PYTHON ?= python3
ENV := .venv
STAMP := $(ENV)/.installed
BIN := $(ENV)/bin

# photographs beside the checkout are used by the tests when they are there; photos and bench want them named
REAL_FOR_TESTS := $(if $(REAL),$(REAL),$(wildcard ../shared/real))
# make miniature runs the last two
NO_RACE := __init__ results_file assemble_miniature miniature
BENCHMARKS := $(filter-out $(NO_RACE:%=benchmarks/%.py),$(wildcard benchmarks/*.py))

.PHONY: demo photos test lint bench require-real

$(STAMP): setup.cfg requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e ".[all,dev]"
	touch $(STAMP)

require-real:
	@test -n "$(REAL)" || { echo "make $(MAKECMDGOALS) needs photographs: make $(MAKECMDGOALS) REAL=path/to/folder" >&2; exit 1; }
	@test -d "$(REAL)" || { echo "make $(MAKECMDGOALS): there is no folder $(REAL)" >&2; exit 1; }

# drawn faces made to smile on the generator that the package carries; killed, the same command goes on
demo: $(STAMP)
	$(BIN)/lso pack --synthetic 1000 runs/demo-faces --size 64 --seed 7 --val 0.1 --shards 1
	$(BIN)/lso fit --config optimize/autoencoder_gradient --config overlay/miniature --config overlay/miniature_smile --ckpt_path last
	$(BIN)/lso render runs/demo
	@echo "before above after: runs/demo/render/grid.png"

# the same for photographs; the order matters: nothing is installed before REAL is known to be there
photos: | require-real $(STAMP)
	$(BIN)/python benchmarks/real_photos.py --real "$(REAL)" --out runs/photos

test: $(STAMP)
	LSO_REAL="$(REAL_FOR_TESTS)" $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# each benchmark once, with the options it has; its run folder goes when its numbers are written
bench: | require-real $(STAMP)
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; set -e; for race in $(BENCHMARKS); do \
	    set --; \
	    if grep -q '"--real"' $$race; then set -- "$$@" --real "$(REAL)"; fi; \
	    if grep -q '"--out"' $$race; then set -- "$$@" --out "$$scratch/$$(basename $$race .py)"; fi; \
	    echo "== $$race"; $(BIN)/python $$race "$$@"; done

include miniature.mk
