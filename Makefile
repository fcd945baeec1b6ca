# Everything runs in .venv, made by the first target that needs it. Paths are relative: the folder's name may hold spaces.
# PYTHON makes .venv; without it the first of these that fits: python3.11 to python3.14, python3.
PYTHON ?=
# Two test processes (tests/conftest.py says what stays together); where memory is short:
# make test PYTEST_ARGS=
PYTEST_ARGS ?= -n 2
PY := .venv/bin/python
CPU_WHEELS := https://download.pytorch.org/whl/cpu
CODE := *.py engine commands tests data docs

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s  %s\n", $$1, $$2}' Makefile

study: .venv/installed ## run the whole study on the bundled sample: both splits, tables, report
	$(PY) run.py study

test: lint .venv/ray-installed ## check the code, then run all tests, the committed notebooks too
	$(PY) -m pytest $(PYTEST_ARGS)

quick: .venv/installed ## run the fast tests, without notebooks
	$(PY) -m pytest tests -m "not slow" $(PYTEST_ARGS)

lint: .venv/installed ## check the code with ruff
	$(PY) -m ruff check $(CODE)

bench: .venv/installed ## measure speed, about half an hour on 2 cores; writes figures/benchmark.csv and .png
	$(PY) tests/benchmark.py

gpu-check: ## on a CUDA GPU: same numbers as the CPU, kills, memory, speed; writes figures/gpu_check.csv
	$(if $(PYTHON),$(PYTHON),$(PY)) tests/gpu_check.py

mutants: .venv/installed ## break lines that decide numbers, one at a time: a test must notice each
	$(PY) tests/mutants.py

load: .venv/installed ## tables of 84,916 and 1,000,000 rows, fusion and scores of 84,916
	$(PY) tests/load.py

soak: .venv/installed ## kill a study at random moments, 30 times, and compare the bytes at its end
	$(PY) tests/soak.py

ray: .venv/ray-installed ## install Ray, for `run.py study --on ray`

lab: .venv/installed ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

cpu: ## install PyTorch's CPU build, before all else: saves 7 GB where there is no NVIDIA GPU
	@$(MAKE_VENV)
	$(PY) -m pip install $$(sed -n 's/^\(torch[a-z]*==[^ ]*\).*/\1/p' requirements.txt) --index-url $(CPU_WHEELS)

site: .venv/installed ## make the report's site again, from what is made, and print its path
	$(PY) run.py report

slides: .venv/slides-installed ## slides of each notebook in build/slides, which need no network; installs reveal.js
	$(PY) run.py slides

class-kit: .venv/installed ## pack what a class needs to begin with notebook 07, in build/class-kit.zip; KIT=--all: and to train nothing
	$(PY) run.py kit $(KIT)

colab-check: ## run the sample's notebooks on the versions of data/colab_versions.txt, in build/colab (6 GB)
	$(if $(PYTHON),$(PYTHON),python3.12) tests/colab_check.py

clean: ## remove what runs have made (the environment and Rakuten's files stay)
	rm -rf runs build data/sample data/cache data/*.lock .pytest_cache .ruff_cache __pycache__ */__pycache__

# An environment that is there is used as it is, with what was installed into it before: PyTorch's CPU build, say.
# One whose Python is gone is made anew. `installed` comes last, so an interrupted installation is repeated.
.venv/installed: requirements.txt constraints.txt
	@$(MAKE_VENV)
	@echo "Installing the requirements into .venv, which takes some minutes"
	$(PY) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch .venv/installed

.venv/ray-installed: .venv/installed requirements-ray.txt
	$(PY) -m pip install --quiet --requirement requirements-ray.txt --constraint constraints.txt
	touch .venv/ray-installed

.venv/slides-installed: .venv/installed requirements-slides.txt
	$(PY) -m pip install --quiet --requirement requirements-slides.txt --constraint constraints.txt
	touch .venv/slides-installed

ifneq ($(PYTHON),) # who names a Python does not get the one that .venv holds already
.venv/installed: | same
endif
same:
	@$(SAME_PYTHON)

# What follows is sh. Each refusal is one sentence: what was found, what is needed, what to do.
define PARTS
needed="3.11 to 3.14 is needed"; other="make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
again="remove the folder .venv and repeat the command"; \
refuse() { echo "$$1" >&2; exit 1; }; \
version() { "$$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null; }; \
fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; };
endef

define SAME_PYTHON
$(PARTS) \
here=$$(version $(PY)) || exit 0; \
asked=$$(version "$(PYTHON)") || asked="no Python that runs"; \
[ "$$asked" = "$$here" ] || refuse "The folder .venv holds Python $$here, but $(PYTHON) is $$asked: leave PYTHON out, or first remove the folder .venv."
endef

define MAKE_VENV
$(PARTS) \
if here=$$(version $(PY)); then \
	fits $(PY) || refuse "The folder .venv holds Python $$here, but $$needed: $$again."; \
	$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip > /dev/null 2>&1 || \
		refuse "The folder .venv holds a Python without pip, but pip is needed: $$again."; \
	exit 0; \
fi; \
seen=; set -- python3.11 python3.12 python3.13 python3.14 python3; [ -z "$(PYTHON)" ] || set -- "$(PYTHON)"; \
for python; do \
	found=$$(version "$$python") || continue; \
	seen="$${seen:+$$seen, }$$python is Python $$found"; \
	fits "$$python" || continue; \
	"$$python" -c 'import ensurepip, venv' 2> /dev/null && { \
		"$$python" -m venv --clear .venv && exit 0; rm -rf .venv; }; \
	seen="$$seen, which cannot make .venv (on Debian and Ubuntu: apt install python$${found%.*}-venv)"; \
done; \
: "$${seen:=$(if $(PYTHON),$(PYTHON) is no Python that runs,No Python was found)}"; \
refuse "$$seen, but 3.11 to 3.14 with ensurepip is needed: install one of these, or name one: $$other"
endef

.PHONY: help study test quick lint bench mutants load soak ray lab cpu site slides class-kit colab-check gpu-check clean same
