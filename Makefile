# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-dev

.PHONY: demo test lint types docs check clean benchmarks notebooks package lowest
LOWEST := .venv-lowest
# A worker for each processor, up to four: most tests use one.
SPREAD := -n logical --maxprocesses 4 --dist worksteal

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

demo: $(VENV)/.ready  ## the main job on real text; QUICK=1 for under 90 seconds on an idle machine
	$(BIN)/gradloc demo quick=$(if $(QUICK),true,false)

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

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

notebooks: $(READY)  ## runs the notebooks of examples/ and keeps what they show
	OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace examples/*.ipynb

package: $(READY)  ## wheel and sdist, tried in an empty environment; takes minutes, so it isn't part of `make test`
	$(BIN)/python tests/package_check.py

lowest:  ## the tests with the oldest versions that pyproject.toml allows (torch excepted), in an environment of its own
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	@# Old libraries warn of newer ones and leave files to the garbage collector, which says nothing of gradloc.
	$(LOWEST)/bin/python -m pytest $(SPREAD) -W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
