# `make lab` and `make test` are all a reader needs; both first make the environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOTEBOOKS ?= $(sort $(wildcard notebooks/[0-9]*.ipynb))
EXERCISES := $(sort $(wildcard notebooks/exercises/[0-9]*.ipynb))

.PHONY: lab test test-code test-notebooks lint format notebooks exercises classify clean

lab: $(INSTALLED)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks

test: test-code test-notebooks  ## every test, then every notebook

# Two workers fill two cores. More threads would spin beside them, waiting for each other: what a test starts as a
# process of its own, such as the README's example, took three times as long.
test-code test-notebooks: export OMP_NUM_THREADS = 1

test-code: $(INSTALLED)
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup -q

test-notebooks: $(INSTALLED)  ## a notebook stays in one process; two run side by side
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout 300 -n 2 --dist loadfile -q \
	    $(NOTEBOOKS) $(EXERCISES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Executes in place; the same inputs give the same bytes, so a second run changes nothing but timings.
notebooks: $(INSTALLED)  ## NOTEBOOKS=notebooks/02_discretization.ipynb for one of them
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.timeout=300 --log-level=WARN $(NOTEBOOKS)
	$(BIN)/python notebooks/clean.py $(NOTEBOOKS)

exercises: $(INSTALLED)  ## from notebooks/exercises/masters: the students' notebooks, and the table of what the checks catch
	$(BIN)/python notebooks/exercises/generate.py
	$(BIN)/python -m tests.answers

# Half an hour on two cores. One thread: the layers are small.
CLASSIFY := OMP_NUM_THREADS=1 $(BIN)/python -m minimamba.sequence_classifier --device cpu --init lin inv legs real random
classify: $(INSTALLED)  ## train chapter 05's models again: notebooks/results/digits.json and japanese_vowels.json
	$(CLASSIFY) s4 --seed 0 1 2 --dataset japanese_vowels --save notebooks/results/japanese_vowels.json
	$(CLASSIFY) --seed 0 1 --dataset digits --save notebooks/results/digits.json

# The font cache is built here, or matplotlib would announce it inside somebody's first notebook. nbgrader's panels in
# JupyterLab are for instructors, who turn them on as notebooks/assignments/README.md says.
$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -c "import matplotlib.pyplot"
	$(BIN)/jupyter labextension disable @jupyter/nbgrader
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info notebooks/.ipynb_checkpoints
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
