# `make` alone lists the targets. Every target sets up .venv first, which takes time only once.
#
# Settings follow the target: make retrain DATASET="my photos" EPOCHS=20. Other options of the command go into ARGS:
# make retrain ARGS='--min-accuracy 0.9 --seed 1'; ARGS=--help lists them.

.DEFAULT_GOAL := help
.PHONY: help setup retrain classify serve stop test test-slow test-browser coverage check bench lock

# Set here so that environment variables of the same names are not taken for settings.
DATASET :=
PRESET :=
NAME :=
EPOCHS :=
FOLDER :=
MODEL :=
OUTPUT :=
RUNNER :=
SCHEDULER :=
CONFIG :=
ARGS :=

# No telemetry of Prefect, in the tests either.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

python := .venv/bin/python

# $(call quote,a b) is 'a b' for the shell; $(call option,--name,a b) is --name 'a b', or nothing if it is empty.
quote = '$(subst ','\'',$(1))'
option = $(if $(2),$(1) $(call quote,$(2)))
training = $(call option,,$(DATASET)) $(call option,--preset,$(PRESET)) $(call option,--name,$(NAME)) \
	$(call option,--epochs,$(EPOCHS))

help: ## list the targets
	@echo 'make TARGET [SETTING=value ...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## install the lock file into .venv (PYTHON= CUDA=0|1); all other targets do it too
	@sh scripts/setup.sh

retrain: setup ## train, check, export and promote a model (DATASET= PRESET= NAME= EPOCHS= ARGS=)
	@$(python) -m flows.retrain $(training) $(ARGS)

ifneq ($(filter classify,$(MAKECMDGOALS)),)
ifeq ($(strip $(FOLDER)),)
$(error FOLDER is missing; name a folder of images: make classify FOLDER=photos/)
endif
endif
classify: setup ## classify a folder of images (FOLDER= MODEL= OUTPUT= RUNNER= SCHEDULER= ARGS=)
	@$(python) -m flows.classify $(call quote,$(FOLDER)) \
		$(call option,--model,$(MODEL)) $(call option,--output,$(OUTPUT)) \
		$(call option,--runner,$(RUNNER)) $(call option,--scheduler,$(SCHEDULER)) $(ARGS)

serve: setup ## retrain every night and run what is ordered, until Ctrl-C (DATASET= PRESET= NAME= EPOCHS= CONFIG= ARGS=)
	@$(python) -m flows.serve $(training) $(call option,--config,$(CONFIG)) $(ARGS)

stop: setup ## stop the Prefect server and the scheduler of this project
	@$(python) -m flows.server stop $(ARGS)

in_parallel := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup ## run the tests
	@$(python) -m pytest $(in_parallel) $(ARGS)

test-slow: setup ## run the tests that take minutes
	@$(python) -m pytest -m slow $(ARGS)

test-browser: setup ## run the tests in headless Chromium (Debian, Ubuntu: apt-get install chromium chromium-driver)
	@$(python) -m pytest -m browser $(ARGS)

coverage: setup ## run the tests, and print the lines and branches that they cover, by module
	@$(python) -m pytest $(in_parallel) --cov --cov-report= $(ARGS)
	@$(python) -m coverage report
	@echo 'below 90 %, and the lines that are not covered:'
	@$(python) -m coverage report --show-missing | awk '/%/ && $$6 + 0 < 90 && $$1 != "TOTAL"'

check: setup ## ruff and strict mypy
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

bench: setup ## measure this program and its peers (ARGS='classification FOLDER' | 'memory FOLDER' | training)
	@$(python) -m benchmarks $(or $(ARGS),training)

# Without --python-version the lock would hold from the Python of .venv on, not from 3.11 on.
compile = $(python) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command 'make lock' --group dev --extra dask pyproject.toml

lock_log := .venv/lock.log

lock: setup ## renew both lock files and test the result (ARGS=--upgrade: newest versions of everything)
	@$(compile) $(ARGS) --output-file requirements.lock
	@$(compile) --extra cuda --constraint requirements.lock --output-file requirements-cuda.lock
	@sh scripts/setup.sh
	@echo 'trying what is locked; takes 3 minutes'
	@$(python) -m pytest -m lock >$(lock_log) 2>&1 || { echo "lock: what is locked does not work:" \
		"$$(grep -m 1 -E '^(FAILED|ERROR)' $(lock_log) || tail -n 1 $(lock_log)); whole log: $(lock_log)" >&2; exit 1; }
	@echo 'locked and tried: retrain, classify, a scheduled run; commit both lock files'
