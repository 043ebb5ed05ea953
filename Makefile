# What a developer types most. `make` alone lists the targets.
# Settings: MODEL=file.gguf, PEER_PYTHON=python with numpy and llama-cpp-python, THREADS=n.

CARGO ?= cargo
PEER_PYTHON ?= python3
THREADS ?= $(shell nproc)
DEPTHS ?= 0,4096

.PHONY: help setup build test lint fmt bench bench-kernels bench-peer page demo docs

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## install what building needs (Debian, Ubuntu)
	./setup

build: ## the program, optimised: target/release/mneme
	$(CARGO) build --release

test: ## every test
	$(CARGO) test --workspace

lint: ## formatting and clippy, as .ci/run asks for them
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

fmt: ## format the source
	$(CARGO) fmt

bench: need-model build ## tokens per second of MODEL at depths DEPTHS
	target/release/mneme bench -m $(MODEL) -d $(DEPTHS) -t $(THREADS) --json

bench-kernels: ## every kernel against the machine's peaks
	$(CARGO) bench -p mneme-kernels

bench-peer: need-model build ## MODEL side by side with llama.cpp's library
	$(PEER_PYTHON) tools/bench_peer.py -m $(MODEL) -d $(DEPTHS) -t $(THREADS)

page: build ## the server's page in headless Chromium, if there is one
	tools/page_check.py

demo: build ## the long-context demonstration
	target/release/mneme demo

docs: ## the crates' documentation
	$(CARGO) doc --workspace --no-deps

.PHONY: need-model
need-model:
	@test -n "$(MODEL)" || { echo "say which model: make ... MODEL=model.gguf" >&2; exit 2; }
