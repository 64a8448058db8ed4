# Two commands do all the set-up: `make train` and `make test`. The rest is in `make help`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := /bin/sh

# Any Python from 3.11 on will do; constraints.txt is tested with 3.11. Another one: make train PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := 2.13.0
KILLS ?= 1000
# tests see no keys that their user trusts
ALONE := env -u CODEX_ML_KEYS XDG_CONFIG_HOME=$(CURDIR)/$(VENV)/config
JOBS ?= 2

.PHONY: help train test lab docs bench kill-test torture mlflow-ui mlflow-ui-smoke sync outputs readme sync-check readme-check nbtest pytest lint types dev lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo '  Overrides:   make train ARGS="epochs=5 checkpoint.dir=runs/a"'

train: $(VENV)/run.stamp ## set up, and train the default run (again: go on with it); ARGS="key=value ..."
	@$(PY) -m codex_ml.cli.train checkpoint.dir=runs/default checkpoint.resume=true $(ARGS)

test: $(VENV)/dev.stamp ## set up, and run every check: files in step, notebooks, pytest, ruff, pyright
	@$(MAKE) --no-print-directory sync-check readme-check lint types nbtest pytest

lab: $(VENV)/dev.stamp ## open JupyterLab on nbs/; LAB_ARGS="--no-browser --port 8899"
	@# saves notebooks as nbdev-clean would leave them; tools/lab keeps JupyterLab from asking the network for news
	@cd nbs && ../$(PY) -m jupyterlab $$([ "$$(id -u)" = 0 ] && echo --allow-root) \
	  --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter --LabApp.app_settings_dir="$(CURDIR)/tools/lab" $(LAB_ARGS)

docs: $(VENV)/dev.stamp ## build the site from the notebooks into _docs/
	@$(PY) -m tools.site

bench: $(VENV)/dev.stamp ## print speed and memory beside a bare PyTorch loop; ARGS="..."
	@$(PY) -m benchmarks $(ARGS)

kill-test: $(VENV)/dev.stamp ## kill a training process KILLS times at random instants and demand the same hash
	@KILLS=$(KILLS) $(PY) -m pytest tests/test_kill.py

torture: $(VENV)/dev.stamp ## try every fault in full: crash points, power cuts, kills, damage (half an hour); ARGS="--seed N" repeats a run, --write puts its table into the docs
	@$(PY) -m tools.torture --jobs $(JOBS) --kills $(KILLS) $(ARGS)

mlflow-ui: $(VENV)/dev.stamp ## serve MLflow's pages of the runs here, on 127.0.0.1, until Ctrl-C; ARGS="--dir FOLDER --port N"
	@$(PY) -m codex_ml.telemetry.mlflow_ui ui $(ARGS)

mlflow-ui-smoke: $(VENV)/dev.stamp ## log a run, read it back from such a server, leave no process
	@$(PY) -m codex_ml.telemetry.mlflow_ui smoke

sync: $(VENV)/dev.stamp ## clean the notebooks, write codex_ml/ and README.md anew from them
	@$(PY) -m tools.sync
	@$(PY) -m tools.schemas
	@$(PY) -m tools.readme

outputs: $(VENV)/dev.stamp ## run the notebooks and keep what they print (examples excepted); ARGS=nbs/00_durable.ipynb
	@$(PY) -m tools.nbtest --save --jobs $(JOBS) $(ARGS); status=$$?; $(MAKE) --no-print-directory sync && exit $$status

clean: ## remove everything that these commands made, except your results in runs/
	rm -rf $(VENV) .codex _docs _proc build codex_ml.egg-info .pytest_cache .ruff_cache .hypothesis nbs/_quarto.yml
	find . -name runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	find nbs -name .last_checked -exec rm -f {} +

# ---- the parts of `make test`, each also by itself

sync-check: $(VENV)/dev.stamp
	@$(PY) -m tools.sync --check
	@$(PY) -m tools.schemas --check

readme-check: $(VENV)/dev.stamp
	@$(PY) -m tools.readme --check

lint: $(VENV)/dev.stamp
	@$(PY) -m ruff check .

types: $(VENV)/dev.stamp
	@PYRIGHT_PYTHON_GLOBAL_NODE=0 $(PY) -m pyright --pythonpath $(PY)

nbtest: $(VENV)/dev.stamp
	@$(ALONE) OMP_NUM_THREADS=1 $(PY) -m tools.nbtest --jobs $(JOBS) $(ARGS)

pytest: $(VENV)/dev.stamp
	@$(ALONE) OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

# ---- set-up: a stamp says that an installation was finished for these two files

dev: $(VENV)/dev.stamp ## only the set-up that `make test` makes

$(VENV)/made.stamp:
	@test -n "$(PYTHON)" || { echo 'make: no Python >= 3.11 with venv found. Install one (Debian: apt install python3-venv), or name it: make train PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

lock: ## choose the pinned set anew: constraints.txt from a fresh environment
	rm -rf $(VENV)/lock && $(PYTHON) -m venv $(VENV)/lock
	@# --isolated: the plain registry, so that the CUDA packages of the default torch build are pinned as well
	$(VENV)/lock/bin/python -m pip --disable-pip-version-check --isolated install torch==$(TORCH) -e '.[dev]'
	{ echo '# The set that is tested, chosen by `make lock` with Python 3.11 on x86-64 Linux.'; \
	  $(VENV)/lock/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip=' | sed 's/+[A-Za-z0-9.]*$$//'; } > constraints.txt
	rm -rf $(VENV)/lock
