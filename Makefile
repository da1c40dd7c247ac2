# make train · make day05 · make test · make test-fast · make test-long · make results · make site - each sets itself up.
SHELL  := /bin/bash
PYTHON ?= python3
# An environment of your own is used as it is: `make train VENV=/path/to/env`.
VENV   := .venv
BIN    := $(VENV)/bin
# Which PyTorch, in pip's words: `make train TORCH="torch==2.13.0 --index-url ADDRESS"`, a wheel, or --index-url alone.
export TORCH
ifeq ($(VENV),.venv)
# Written when the install has ended, named after what was installed: an interrupted or outdated one is redone.
STAMP  := $(VENV)/installed-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
# The pretrained model of days 22 and 23, 93 MB: installed when they, or the tests, first need it.
MODEL  := $(VENV)/installed-model-$(shell cat requirements.txt day22/requirements.txt | cksum | cut -d' ' -f1)
# The model server of day 28 and what checks its deployment files.
SERVE  := $(VENV)/installed-serve-$(shell cat requirements.txt day28/requirements.txt capstone/serve/requirements.txt | cksum | cut -d' ' -f1)
# The generator of the course site.
PAGES  := $(VENV)/installed-pages-$(shell cat requirements.txt site/requirements.txt | cksum | cut -d' ' -f1)
else
STAMP  := has-requirements
MODEL  := has-model
SERVE  := has-serve
PAGES  := has-pages
endif
# What the site ships from npm (diagrams) and what its tests use; npm writes this file.
NPM    := site/node_modules/.package-lock.json
# All accelerators of this machine, or 2 CPU ranks. `make day05 RANKS=4` decides otherwise. Counted once, when a program
# needs it: by nvidia-smi in no time, and where there are devices of other makes by DeepSpeed, in seconds.
OTHERS  = $(shell ls /dev/kfd /dev/davinci[0-9]* /dev/accel* /dev/hl[0-9]* $(VENV)/lib/python*/site-packages/torch/lib/libtorch_xpu.so \
    2>/dev/null; command -v xpu-smi)
ASK    := from deepspeed.accelerator import get_accelerator as get; print(get().device_count() * (get().device_name() != "cpu"))
COUNT   = $(eval COUNT := $(shell nvidia-smi --list-gpus 2>/dev/null | grep ^GPU | wc -l) \
    $(if $(OTHERS),$(shell $(BIN)/python -c '$(ASK)' 2>/dev/null | tail -1)))$(COUNT)
DEVICES = $(firstword $(filter-out 0,$(COUNT)))
RANKS  ?= $(or $(DEVICES),2)
LABEL  ?= $(RANKS)$(if $(DEVICES),gpu,cpu)
# More flags for a day's script: `make day02 ARGS="--steps 100"`.
ARGS   ?=
# On CPU, ranks share the cores: one thread each, or they fight. (The caller's own value wins.)
THREADS = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(if $(DEVICES),8,1)}
# Under make the screen is the program's: what launcher and libraries say about themselves stays off it, errors do not.
# (Without make, `deepspeed ...` says it all.)
QUIET   = UNDER_MAKE=1 $(if $(DEVICES),,DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu}) PYTHONWARNINGS=$${PYTHONWARNINGS:-ignore} \
    TRANSFORMERS_VERBOSITY=error HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
    TORCH_CPP_LOG_LEVEL=ERROR
# $(call launch,SCRIPT FLAGS) and $(call python,SCRIPT FLAGS) show the command as one types it, and run it.
show    = printf '$$ %s\n' '$(subst ','\'',$(strip $(1)))'
launch  = @$(call show,deepspeed --num_accelerators $(RANKS) $(1)); \
    $(THREADS) $(QUIET) $(BIN)/deepspeed --quiet --log_level error --num_accelerators $(RANKS) $(1)
python  = @$(call show,python $(1)); $(THREADS) $(QUIET) $(BIN)/python $(1)
# The days there are, and those which take more than `deepspeed dayXX/train.py`.
DAYS_DONE := $(patsubst %/train.py,%,$(wildcard day[0-9][0-9]/train.py))
OTHER     := day01 day03 day22 day23 day28

.DEFAULT_GOAL := help
FORCE:  # the folders day01 ... exist, and must not count as made
.PHONY: help venv train lab test test-long test-fast test-gpu lint results render site serve

help:  ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## set up .venv (done by every other target when needed)

ifeq ($(VENV),.venv)
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(VENV)/torch 2>/dev/null))
.PHONY: $(STAMP)  # another PyTorch than before
endif
endif
$(STAMP): requirements.txt
	@./install.sh new "$(PYTHON)" "$(VENV)"
	@touch $@

$(MODEL): day22/requirements.txt | $(STAMP)
	@./install.sh add "$(VENV)" $< --no-deps
	@touch $@

$(SERVE): day28/requirements.txt capstone/serve/requirements.txt | $(STAMP)
	@./install.sh add "$(VENV)" $<
	@touch $@

$(PAGES): site/requirements.txt | $(STAMP)
	@./install.sh add "$(VENV)" $<
	@touch $@
else
.PHONY: $(STAMP) $(MODEL) $(SERVE) $(PAGES)
$(STAMP):
	@./install.sh check "$(VENV)" requirements.txt
$(MODEL): $(STAMP)
	@./install.sh check "$(VENV)" day22/requirements.txt
$(SERVE): $(STAMP)
	@./install.sh check "$(VENV)" day28/requirements.txt
$(PAGES): $(STAMP)
	@./install.sh check "$(VENV)" site/requirements.txt
endif

$(NPM): site/package-lock.json
	@command -v npm >/dev/null || { echo "error: npm is not installed: sudo apt-get install npm" >&2; exit 1; }
	npm ci --prefix site --ignore-scripts --no-audit --no-fund

train: day02  ## train the first DeepSpeed program (day 02), on all GPUs or on 2 CPU ranks

day%: FORCE  ## run a day's program: make day05, make day05 RANKS=4 ARGS="--steps 100"
	@echo "$@ is not in the course yet; there are: $(DAYS_DONE)"; exit 1

$(filter-out $(OTHER),$(DAYS_DONE)): $(STAMP) FORCE
	$(call launch,$@/train.py $(ARGS))

day01: $(STAMP) FORCE
	$(call python,day01/labs/check_env.py)
	$(call launch,day01/labs/hello_distributed.py)
	$(call python,day01/train.py $(ARGS))

day03: $(STAMP) FORCE
	$(call python,day03/labs/compare.py --ranks $(RANKS) $(ARGS))

day22 day23: $(MODEL) FORCE
	$(call launch,$@/train.py $(ARGS))

day28: $(SERVE) FORCE
	$(call launch,$@/train.py $(ARGS))

capstone: day28 FORCE  ## the whole project: prepare, train, evaluate, export, serve, one chat request

lab: $(STAMP)  ## several hosts on this machine, and a shell on the first (day 24): sudo make lab ARGS="--hosts 3"
	@$(BIN)/python day24/hosts.py $(ARGS)

# $(call tests,PYTEST FLAGS): what can run side by side on two workers, then alone what measures time or memory. Both
# are run; "no such test" (exit code 5) is no failure unless both say so.
WORKERS ?= 2
# The site's tests need what builds it; where there is no npm they are skipped, and say so.
WEB := $(PAGES) $(if $(shell command -v npm),$(NPM))
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
tests = @code() { "$$@"; last=$$?; [ $$last != 2 ] || exit 2; }; \
    code $(BIN)/python -m pytest $(1) --serial without $(SIDE_BY_SIDE) $(ARGS); first=$$last; \
    code $(BIN)/python -m pytest $(1) --serial only $(ARGS); \
    case $$first,$$last in \
        0,0 | 0,5 | 5,0) ;; \
        5,5) echo "no test was chosen"; exit 5 ;; \
        0,* | 5,*) exit $$last ;; \
        *) echo "tests failed on the $(WORKERS) workers: see the first of the two summaries above"; exit $$first ;; \
    esac

test: $(MODEL) $(SERVE) $(WEB)  ## every test but the long ones (a quarter of an hour on 2 cores, more on slow ones)
	$(call tests,)

test-long: $(MODEL) $(SERVE) $(WEB)  ## the reliability tests: runs killed, files damaged, disks full (20 minutes)
	$(call tests,-m long)

test-fast: $(MODEL) $(SERVE)  ## the tests that launch nothing (seconds)
	$(BIN)/python -m pytest -m "not launch and not long" --serial without $(SIDE_BY_SIDE) $(ARGS)

# Where the machine has cores to spare, several days at a time share its accelerators.
JOBS ?= $(if $(DEVICES),4,1)
test-gpu: $(MODEL) $(SERVE)  ## the tests marked gpu, then every program of every day on all accelerators (minutes)
	$(THREADS) $(BIN)/python -m pytest -m gpu $(ARGS)
	$(THREADS) $(BIN)/python -m tests.gpu --jobs $(JOBS) --out tests/results/gpu_$(LABEL).json

lint: $(STAMP)  ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

render: $(STAMP)  ## bring the generated blocks of the notes (diffs, tables, outputs) up to date
	$(BIN)/python -m tests.render

results: $(MODEL) $(SERVE)  ## measure the notes' figures again on this machine (LABEL=h100 names the files, DAYS="day05 day12" some)
	$(THREADS) $(BIN)/python -m tests.recipes --label $(LABEL) $(DAYS)
	$(BIN)/python -m tests.render

site: $(PAGES) $(NPM)  ## the course as a web site, both languages: site/html/index.html (a minute)
	$(BIN)/python site/build.py $(ARGS)

PORT ?= 8000
serve: site  ## show it at http://localhost:8000 (make serve PORT=8001)
	$(BIN)/python -m http.server --directory site/html $(PORT)
