PYTHON ?= python3
VENV ?= .venv
# Modules are byte-compiled when they are first imported; most of what is installed never is.
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo test test-all lint lock

setup: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements-dev.txt
	touch $(VENV)/.installed $@

# Trains the supervised baseline and DSSN on generated shapes with the same few labels; prints both mean IoUs.
demo: setup
	$(VENV)/bin/python -m experiments.demo

PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Everything but the tests marked slow.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Writes the exact versions of what is installed. A new environment takes the latest ones: make lock VENV=/tmp/venv
lock: $(VENV)/.installed-dev
	{ echo "# Tested together, with $$($(VENV)/bin/python --version): pip install -r requirements.txt -c requirements.lock"; \
	  $(VENV)/bin/python -m pip freeze --disable-pip-version-check | sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p'; } > requirements.lock
