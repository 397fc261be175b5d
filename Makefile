# Everything a user runs. `make help` lists it.
PYTHON ?= python3
PYTHON_NEXT ?= python3.13
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# One faiss, never both: the GPU build where a GPU answers.
FAISS := $(shell nvidia-smi >/dev/null 2>&1 && echo faiss-gpu || echo faiss-cpu)
STAMP := $(VENV)/.installed-$(FAISS)
TRAIN := $(BIN)/python -m src.train

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-next bench reliability clusters check format docs ui clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the pinned dependencies

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(BIN)/pip uninstall --quiet --yes $(filter-out $(FAISS),faiss-cpu faiss-gpu) 2>/dev/null
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(FAISS),export,dev]'
	rm -f $(VENV)/.installed-*
	touch $@

demo: setup ## SimCLR, NNCLR and KMCLR on scikit-learn's digits: a table, a plot, an MLflow comparison
	$(TRAIN) --multirun +sweep=demo jobs=2

# A process a core, and a thread a process: threads of several processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

test: setup ## Run every test
	$(PYTEST)

test-fast: setup ## Run the tests that take seconds
	$(PYTEST) -m 'not slow'

test-next: ## Run every test with the versions to come, on Python 3.13
	$(MAKE) test VENV=.venv-next CONSTRAINTS=constraints-next.txt PYTHON=$(PYTHON_NEXT)

bench: setup ## Images a second beside the original's algorithm and lightly; set CIFAR100_ROOT for real images
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) '.[bench]'
	$(BIN)/python -m scripts.benchmark

CAMPAIGNS := kills sweeps ranks signals faults servers together soak hostile

reliability: setup ## Kills, signals, full disks, lost servers, a soak, hostile files: two hours; figures in results/reliability.md
	dir=$$(mktemp -d) && for each in $(CAMPAIGNS); do $(BIN)/python -m scripts.reliability.$$each $$dir/$$each || exit; done
	CASES=600 $(PYTEST) tests/test_cli.py tests/data/test_damage.py

clusters: setup ## Sweeps on a real SLURM and a real Ray, started on this machine; needs root and Debian's slurm-wlm
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) '.[slurm,ray]'
	dir=$$(mktemp -d) && $(BIN)/python -m scripts.reliability.clusters $$dir

check: setup ## Lint, formatting, types, and which file may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## Build the pages and the Python reference in site/; a warning or a broken link is an error
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) '.[docs]'
	$(BIN)/python -m sphinx -b html -c docs -W --keep-going --quiet . site
	@echo "site/docs/index.html"

ui: setup ## Compare the runs in a browser: prints the link of the newest sweep's charts
	@$(BIN)/python -m src.report charts
	$(BIN)/mlflow ui --host 127.0.0.1

clean: ## Remove the virtual environments and the caches, never a result
	rm -rf .venv .venv-next site docs/api .mypy_cache .pytest_cache .ruff_cache
