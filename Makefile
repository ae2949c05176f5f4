PYTHON ?= python3
VENV ?= .venv
# Modules are byte-compiled when they are first imported; most of what is installed never is.
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo test test-all lint lock compilers

setup: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps "timm>=1.0.31,<2"  # Without torchvision, whose builds fit one build of PyTorch alone.
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

# XLA's compilers for GPUs and TPUs, which need neither, for benchmarks/compiled.py alone: .venv-cuda and .venv-tpu, 6 GB.
JAX = $(shell sed -n 's/^jax==//p' requirements.lock)
compilers: .venv-cuda/.installed .venv-tpu/.installed

.venv-cuda/.installed: EXTRA = cuda13
.venv-tpu/.installed: EXTRA = tpu
.venv-%/.installed: requirements.txt requirements.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -r requirements.txt -c requirements.lock "jax[$(EXTRA)]==$(JAX)"
	touch $@
