# make train · make day05 · make test · make test-fast · make test-long · make results - each sets itself up.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Written when the install has ended, named after what was installed: an interrupted or outdated one is redone.
STAMP  := $(VENV)/installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
# The pretrained model of days 22 and 23, 93 MB: installed when they, or the tests, first need it.
MODEL  := $(VENV)/installed-model-$(shell cat requirements.txt day22/requirements.txt | cksum | cut -d' ' -f1)
# The model server of day 28 and what checks its deployment files.
SERVE  := $(VENV)/installed-serve-$(shell cat requirements.txt day28/requirements.txt capstone/serve/requirements.txt | cksum | cut -d' ' -f1)
# All GPUs of this machine, or 2 CPU ranks. `make day05 RANKS=4` decides otherwise.
GPUS   := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)
RANKS  ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
LABEL  ?= $(RANKS)$(if $(filter-out 0,$(GPUS)),gpu,cpu)
# More flags for a day's script: `make day02 ARGS="--steps 100"`.
ARGS   ?=
# On CPU, ranks share the cores: one thread each, or they fight. (The caller's own value wins.)
export OMP_NUM_THREADS ?= $(if $(filter-out 0,$(GPUS)),8,1)
LAUNCH := $(BIN)/deepspeed --num_accelerators $(RANKS)

.DEFAULT_GOAL := help
FORCE:  # the folders day01 ... exist, and must not count as made
.PHONY: help venv train test test-long test-fast lint results render

help:  ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## set up .venv (done by every other target when needed)

$(STAMP): requirements.txt
	@./install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(MODEL): day22/requirements.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

$(SERVE): day28/requirements.txt capstone/serve/requirements.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

train: day02  ## train the first DeepSpeed program (day 02), on all GPUs or on 2 CPU ranks

day%: FORCE  ## run a day's program: make day05, make day05 RANKS=4 ARGS="--steps 100"
	@test -e $@/train.py || { echo "$@ is not in the course yet; there are: $$(ls -d day?? | xargs)"; exit 1; }
	@$(MAKE) --no-print-directory venv
	$(LAUNCH) $@/train.py $(ARGS)

day01: $(STAMP) FORCE
	$(BIN)/python day01/labs/check_env.py
	$(LAUNCH) day01/labs/hello_distributed.py
	$(BIN)/python day01/train.py $(ARGS)

day03: $(STAMP) FORCE
	$(BIN)/python day03/labs/compare.py --ranks $(RANKS) $(ARGS)

day22 day23: $(MODEL) FORCE
	$(LAUNCH) $@/train.py $(ARGS)

day28: $(SERVE) FORCE
	$(LAUNCH) $@/train.py $(ARGS)

capstone: day28 FORCE  ## the whole project: prepare, train, evaluate, export, serve, one chat request

test: $(MODEL) $(SERVE)  ## every test but the long ones (half an hour on 2 cores, more on slow ones)
	$(BIN)/python -m pytest $(ARGS)

test-long: $(MODEL) $(SERVE)  ## the reliability tests: runs killed, files damaged, disks full (25 minutes)
	$(BIN)/python -m pytest -m long $(ARGS)

test-fast: $(MODEL) $(SERVE)  ## the tests that launch nothing (seconds)
	$(BIN)/python -m pytest -m "not launch and not gpu and not long" $(ARGS)

lint: $(STAMP)  ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

render: $(STAMP)  ## bring the generated blocks of the notes (diffs, tables, outputs) up to date
	$(BIN)/python -m tests.render

results: $(MODEL) $(SERVE)  ## measure the notes' figures again on this machine (LABEL=h100 names the files, DAYS="day05 day12" some)
	PATH="$(CURDIR)/$(BIN):$$PATH" ./measure.sh $(LABEL) $(RANKS) $(DAYS)
	$(BIN)/python -m tests.render
