# Everything a newcomer needs: `make serve` and `make test`. Each target sets up what it needs first.
PYTHON ?= python3
VENV   ?= .venv
TP     ?= 1
PORT   ?= 8000

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BESIDE    := -n 3 --dist worksteal
IN_LANES  := -n 2 --dist loadgroup
SAMPLE    := models/SmolLM2-135M-Instruct.gguf

.PHONY: help setup model serve check test bench lint clean

help:
	@echo "make serve   set up, fetch the sample model, serve it on port $(PORT)   [TP=2 for two ranks, PORT=8001]"
	@echo "make test    set up, run every check and test"
	@echo "make check   lint, types, layering and the fast tests: a minute or two"
	@echo "make bench   the figures of docs/figures.md            [PEER=path/to/vllm/venv/bin/python]"
	@echo "make setup   only the virtual environment              [PYTHON=python3.12]"

setup: $(INSTALLED)
model: $(SAMPLE)

$(INSTALLED): pyproject.toml tools/install.py
	$(PYTHON) tools/install.py $(VENV)
	@touch $@

$(SAMPLE): | $(INSTALLED)
	$(BIN)/python tools/sample_model.py $@

serve: $(INSTALLED) $(SAMPLE)
	@$(BIN)/phalanx serve $(SAMPLE) --served-model-name SmolLM2-135M-Instruct --port $(PORT) --tensor-parallel-size $(TP)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/pytest -q -m "not slow and not alone" $(BESIDE)
	$(BIN)/pytest -q -m "not slow and alone" $(IN_LANES)

test: lint $(SAMPLE)
	$(BIN)/pytest -q -m "not alone" $(BESIDE) --durations=10
	$(BIN)/pytest -q -m alone $(IN_LANES) --durations=15

bench: $(INSTALLED) $(SAMPLE)
	$(BIN)/python -m benchmarks --model $(SAMPLE) $(if $(PEER),--peer-python $(PEER))

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
