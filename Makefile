# Thin fronts for the CMake presets and tools/. `make help` lists them.
.DEFAULT_GOAL := build
.PHONY: help build cuda cuda-all bundle debug test test-deploy test-tsan test-faults test-faults-mutants test-soak test-overload test-fuzz demo bench format check tidy clean

JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 30
SOAK_SECONDS ?= 3600
OVERLOAD_SECONDS ?= 300

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## set up what the build needs, then build the programs into build/release/bin
	tools/setup build
	cmake --preset release
	cmake --build --preset release -j $(JOBS)

debug: ## the same with debug information and without optimisation, into build/debug
	tools/setup build
	cmake --preset debug
	cmake --build --preset debug -j $(JOBS)

cuda: ## the programs with GPU support, and its checks, for Hopper into build/cuda; needs no GPU
	tools/setup build
	tools/cuda_toolkit.sh
	cmake --preset cuda
	cmake --build --preset cuda -j $(JOBS)

cuda-all: ## the same for GPUs from Ampere on, into build/cuda-all
	tools/setup build
	tools/cuda_toolkit.sh
	cmake --preset cuda-all
	cmake --build --preset cuda-all -j $(JOBS)

bundle: cuda ## build/bundle: the programs of build/cuda with their libraries, for another machine
	tools/bundle.sh build/cuda build/bundle

test: ## everything CI runs: all tests, sanitized unit tests, linters, end to end
	python3 tools/run_tests.py

test-deploy: ## boards and rules against a real Prometheus under load; image roots; status page
	tools/setup
	.venv/bin/python tests/deploy/live_metrics.py
	.venv/bin/python tests/deploy/gpu_metrics.py
	.venv/bin/python tests/deploy/image_roots.py
	.venv/bin/python tests/deploy/status_page.py

test-tsan: ## unit tests under the thread sanitizer
	tools/setup build
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS)
	ctest --test-dir build/tsan --output-on-failure -L unit -LE 'slow|no_tsan' -j $(JOBS)

test-faults: ## processes of a real server killed and stopped under load (about 8 minutes)
	tools/setup
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target nibble nibble-worker nibble-gateway
	ctest --test-dir build/release --output-on-failure -V -L faults

test-faults-mutants: ## known bugs planted one by one; the fault checks must see each (about 25 minutes)
	tools/setup
	.venv/bin/python tests/e2e/faults/run_mutants.py

test-soak: ## SOAK_SECONDS (3600) of load with random faults: memory, descriptors, threads
	tools/setup
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target nibble-gateway fake_worker
	NIBBLE_BINARY_DIR=build/release .venv/bin/python tests/e2e/faults/soak.py $(SOAK_SECONDS)

test-overload: ## 1000 fast streams, 5000 slow ones, then OVERLOAD_SECONDS (300) of four times what a group can do
	tools/setup build
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target gateway_load gateway_overload
	NIBBLE_BINARY_DIR=build/release build/release/bin/gateway_load --streams 1000 --rate 20 --seconds 60
	NIBBLE_BINARY_DIR=build/release build/release/bin/gateway_load --streams 5000 --rate 1 --starved 3s --bound-ms 200 --direct-seconds 0
	NIBBLE_BINARY_DIR=build/release build/release/bin/gateway_load --stalled --rate 50 --seconds 40 --bound-kib 128 --direct-seconds 0
	NIBBLE_BINARY_DIR=build/release build/release/bin/gateway_load --streams 500 --seconds 8 --rounds 3 --bad-percent 10
	NIBBLE_BINARY_DIR=build/release build/release/bin/gateway_overload --seconds $(OVERLOAD_SECONDS)

test-fuzz: ## every fuzzer for FUZZ_SECONDS (30) seconds; findings go to build/fuzz/findings
	tools/setup fuzz
	tools/fuzz.sh $(FUZZ_SECONDS)

demo: ## from nothing to a streamed answer of a real model
	bash tools/demo.sh

bench: ## measure the demo model on this machine
	bash tools/bench.sh

format: ## rewrite C++ and Rust files in the project's format
	tools/setup
	git ls-files '*.h' '*.cc' '*.cu' '*.cuh' | xargs .venv/bin/clang-format -i
	cargo fmt --manifest-path services/text/Cargo.toml

tidy: ## clang-tidy over what has changed since it was last found clean; minutes from nothing
	tools/setup
	cmake --preset release
	cmake --build --preset release -j $(JOBS)
	python3 tools/tidy.py build/release

check: ## linters alone, without clang-tidy: seconds
	tools/setup
	python3 tools/lint.py

clean: ## remove what was built, not what was fetched
	rm -rf build services/text/target
