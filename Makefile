# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-dev

.PHONY: demo test lint types docs check clean benchmarks

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'gradloc needs Python 3.11 or newer; choose one with make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(READY): $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# The page is tested in a browser: the system's, else Playwright's own. Without either those tests say that they were skipped.
	@command -v chromium chromium-browser google-chrome >/dev/null || $(BIN)/playwright install chromium || true
	touch $@

demo: $(VENV)/.ready  ## the main job on real text; QUICK=1 for under 90 seconds
	$(BIN)/gradloc demo quick=$(if $(QUICK),true,false)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## the documentation, into site/; a warning is an error, and nothing is loaded from the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: test lint types docs

benchmarks: $(READY)
	$(BIN)/python benchmarks/overhead.py --quick
	$(BIN)/python benchmarks/route.py --quick

clean:
	rm -rf $(VENV) build dist *.egg-info
