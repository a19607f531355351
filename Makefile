# make demo: fine-tune and sample the embedded model, in minutes, on any machine.
# make check: lint, types, layers and the fast tests, in at most three minutes on two cores.
# make test: all of that and the slow tests, in about ten; only tests that need a GPU are left out.
# make gpu: check and measure everything on an NVIDIA GPU, in eight minutes; writes benchmarks/results/gpu_<card>.json.
# make docs: the documentation site in docs/_build/html; a warning is an error.

PYTHON ?= python3.11
BIN := .venv/bin
# two processes of one thread each: more threads than cores would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: install demo lint check test all-tests gpu docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: install
	$(BIN)/python demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) -m "not slow and not faults and not docs and not gpu"

test: install  # lint keeps one core busy for half a minute, beside the first tests
	@$(MAKE) --no-print-directory --jobs 2 lint all-tests

all-tests: install
	$(PYTEST) --durations 10 -m "not gpu"

gpu: install
	@$(BIN)/python benchmarks/gpu.py

docs: install
	$(BIN)/sphinx-build -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

clean:
	rm -rf .venv build dist *.egg-info outputs docs/_build docs/generated docs/examples
