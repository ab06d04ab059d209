# make demo: environment + MPO on the toy world      make test: environment + every notebook and test
# make lab:  JupyterLab on the notebooks              make dist: sdist and wheel
# make docs:  the site, in build/site, with its links and pages checked
# make cells: the install cell of every notebook (Colab), from settings.ini
# make colab: every notebook alone in a folder, in an environment that has the libraries and no mpo_nb
# make twice: every notebook twice; what they print must be the same, times aside
# make fuzz: N examples of odd files, recipes, command lines, replies and votes for each test (1,000)
# make bench: every benchmark beside TRL (needs a quiet machine; results go to mpo_nb/saved)
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# tests start many processes, and each would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

N ?= 1000
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.PHONY: demo test lab docs colab twice cells fuzz bench dist clean
demo: $(READY)
	$(BIN)/mpo run toy

# one process more than there are cores, each with one thread: a tenth of the time a test waits for a file or a server
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

lab: $(READY)
	$(BIN)/jupyter lab nbs

docs: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -W ignore docs/build.py --out build/site
	$(BIN)/python docs/check.py build/site

colab: $(READY)
	COLAB=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_colab.py

twice: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/twice.py

fuzz: $(READY)
	FUZZ=$(N) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_fuzz.py

cells: $(READY)
	$(BIN)/python tests/install_cell.py

bench: $(READY)
	$(BIN)/python -W ignore benchmarks/dpo.py
	$(BIN)/python -W ignore benchmarks/ppo.py
	$(BIN)/python -W ignore benchmarks/rollouts.py

dist: $(READY)
	$(BIN)/python -m build

# a current pip: the resolver of the one that comes with Python 3.11 searches for many minutes
# torch first and alone, at the tested version: left to itself pip may resolve a newer build
# --no-compile: of 20,000 modules a few thousand are ever imported. Importing them here compiles them, torch's while pip
# installs the rest: half a minute's work, which otherwise each of the first processes would do for itself
COMPILE_1 := import torch._dynamo, torch.distributed.tensor
COMPILE_2 := import datasets, pandas; from transformers import Trainer
COMPILE_3 := import matplotlib.pyplot, scipy.stats, statsmodels.api, IPython
$(READY): settings.ini pyproject.toml setup.py constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
	$(BIN)/python -W ignore -c '$(COMPILE_1)' & $(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]' && wait
	$(BIN)/python -c '$(COMPILE_2)' & $(BIN)/python -c '$(COMPILE_3)' && wait
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
