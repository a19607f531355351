# make demo: fine-tune and sample the embedded model, in minutes, on any machine.
# make test: lint, types and tests.
# make docs: the documentation site in docs/_build/html; a warning is an error.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install demo test docs clean

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
	# the commands set up logging for their whole process, so they are tested in processes of their own
	# two processes of one thread each: with more threads than cores they wait for one another
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/cli/test_commands.py tests/commands
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations 10 --ignore tests/cli/test_commands.py --ignore tests/commands

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: install .venv/docs-installed
	$(BIN)/sphinx-build -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

clean:
	rm -rf .venv build dist *.egg-info outputs docs/_build docs/generated docs/examples
