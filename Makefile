# Everything runs in .venv, made by the first target that needs it. Paths are relative: the folder's name may hold spaces.
PYTHON ?= python3.11
PY := .venv/bin/python

help: ## say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1 \t\2/p' Makefile

study: .venv/installed ## run the whole study on the bundled sample: both splits, tables, report
	$(PY) run.py study

test: .venv/installed .venv/ray-installed ## run all tests
	$(PY) -m pytest

bench: .venv/installed ## measure speed, about half an hour on 2 cores; writes figures/benchmark.csv and .png
	$(PY) tests/benchmark.py

ray: .venv/ray-installed ## install Ray, for `run.py study --on ray`

lab: .venv/installed ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

clean: ## remove what runs have made (the environment and Rakuten's files stay)
	rm -rf runs data/sample data/cache data/cache.lock .pytest_cache __pycache__ tests/__pycache__ data/__pycache__

.venv/installed: requirements.txt constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { echo "Python 3.11 is needed and $(PYTHON) was not found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch .venv/installed

.venv/ray-installed: .venv/installed requirements-ray.txt
	$(PY) -m pip install --quiet --requirement requirements-ray.txt --constraint constraints.txt
	touch .venv/ray-installed

.PHONY: help study test bench ray lab clean
