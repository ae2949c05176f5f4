PYTHON ?= python3
VENV ?= .venv

.PHONY: setup demo test lint

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Trains the supervised baseline and DSSN on generated shapes with the same few labels; prints both mean IoUs.
demo: setup
	$(VENV)/bin/python -m benchmarks.demo

test: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
