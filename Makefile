# make demo: fine-tune and sample the embedded model, in minutes, on any machine.
# make test: lint, types and tests.

PYTHON ?= python3.11
BIN := .venv/bin
EXTRA_TESTS ?=

.PHONY: install demo test clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python demo.py

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --durations 10

clean:
	rm -rf .venv build dist *.egg-info outputs
