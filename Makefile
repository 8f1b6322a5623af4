# Both everyday commands do their own set-up from a fresh clone:
#   make quickstart   train LeNet on real digits, on Spark inside this machine
#   make test         lint, types and every test
# and so does
#   make benchmark    speed against plain TensorFlow and others, two hours and their installation
# A Python other than python3: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SPARK35 := .venv-spark35
# The oldest and the newest Python that TensorFlow has wheels for.
PYTHONS := 3.10 3.13

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart test lint check format spark35 pythons benchmark clean machine

quickstart: $(READY)
	$(BIN)/python examples/lenet.py

# Two files of tests at a time: mostly they wait for processes. Each of the two has a Spark of its own.
test: lint spark35
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tfspark

# What to run before every commit: a minute, and no training but that of the docstrings.
check: lint
	$(BIN)/python -m pytest -m 'not slow' tests/test_architecture.py tests/test_docs.py tests/test_public_api.py
	$(BIN)/python -m pytest tests/test_docs.py::test_the_examples_of_docstrings_are_right

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The oldest supported Spark, beside the newest of $(VENV), for the tests that compare them. Where it
# cannot be installed, those are skipped.
spark35: $(READY)
	@test -e $(SPARK35)/.ready || { \
	    $(BIN)/python -m pip install --quiet --target $(SPARK35) 'pyspark>=3.5,<3.6' && \
	    touch $(SPARK35)/.ready; } || echo 'Spark 3.5 could not be installed.' >&2

# A small training with other Pythons, where they are installed; each takes an environment of 2 GB.
pythons: $(READY)
	@for version in $(PYTHONS); do \
	    folder=.venv-$$version; python=; \
	    for each in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
	        "$$each" -c '' 2>/dev/null && { python=$$each; break; }; \
	    done; \
	    test -n "$$python" || { echo "There is no python$$version." >&2; continue; }; \
	    test -e $$folder/.ready || { \
	        "$$python" -m venv $$folder && \
	        $$folder/bin/python -m pip install --quiet --editable . --constraint requirements.txt && \
	        touch $$folder/.ready; } || exit 1; \
	done
	$(BIN)/python -m pytest tests/cluster/test_pythons.py

# Against plain TensorFlow and other trainers on Spark, each in an environment that is made on the
# way; wants a machine that does nothing else. To go on where it was stopped: OPTIONS=--resume
benchmark: $(READY)
	$(BIN)/python benchmarks/compare.py $(OPTIONS)

# tf-keras without what it depends on: that is the package tensorflow, in place of tensorflow-cpu.
# Order-only: the machine is looked at each time, but only changed requirements install anew.
$(READY): setup.py requirements.txt | machine
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,examples]' --constraint requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps tf-keras --constraint requirements.txt
	@touch $@

# $(error) instead of a failing command, for one line instead of two.
PROBLEM = $(shell PYTHON='$(PYTHON)' sh tools/check_machine.sh 2>&1)
machine:
	@: $(if $(PROBLEM),$(error $(PROBLEM)))

clean:
	rm -rf $(VENV) $(SPARK35) $(PYTHONS:%=.venv-%) benchmarks/.venvs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
