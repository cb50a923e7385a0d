# Everything a developer runs. Targets that need an environment make it; a stamp file makes the next call instant.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
AIRFLOW_VENV ?= .venv-airflow
AUDIT_VENV ?= .venv-audit
DATA ?=
# Extra words for pytest, for example: make test ARGS="-k gates"
ARGS ?=

BIN := $(VENV)/bin
CODE := kernels ctr_models pipelines serving
PIP := -m pip --disable-pip-version-check --no-input install --quiet --quiet
PINS := pyproject.toml deploy/constraints.txt deploy/shim/fbgemm-gpu/pyproject.toml

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[36mmake %-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.ready ## Install, then run the main job: logs, features, models, registry, server, report (DATA=<folder> for real data)
	@$(BIN)/sluice demo $(if $(DATA),--data "$(DATA)")

.PHONY: test
test: $(VENV)/.ready-test ## Install what the tests need, then run all of them (DATA=<folder> adds those on real data)
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --doctest-modules tests $(CODE) \
	  $(if $(DATA),--data "$(DATA)") $(ARGS)

.PHONY: lint
lint: $(VENV)/.ready-test ## Check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: format
format: $(VENV)/.ready-test ## Put style and formatting right
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.PHONY: types
types: $(VENV)/.ready-test ## Check types
	@$(BIN)/mypy

.PHONY: imports
imports: $(VENV)/.ready-test ## Check that imports point one way
	@$(BIN)/lint-imports

.PHONY: bench
bench: $(VENV)/.ready ## List the benchmarks
	@$(BIN)/sluice bench --help

.PHONY: docs
docs: $(VENV)/.ready ## Write the generated part of the documentation
	@$(BIN)/sluice config reference > docs/configuration.md
	@$(BIN)/sluice serve --settings > docs/server-settings.md

.PHONY: airflow-test
airflow-test: $(VENV)/.ready-test $(AIRFLOW_VENV)/.ready ## Run the daily DAG for one day on SQLite, in Airflow's own environment
	@$(BIN)/python -m pytest tests/airflow_dags --airflow $(AIRFLOW_VENV) -s $(ARGS)

.PHONY: audit
audit: $(VENV)/.ready $(AUDIT_VENV)/.ready ## Ask public databases for known vulnerabilities of the pinned versions
	@$(BIN)/python deploy/audit.py $(AUDIT_VENV)/bin/pip-audit || [ $$? = 75 ]

.PHONY: clean
clean: ## Remove all environments and every cache
	@rm -rf $(VENV) $(AIRFLOW_VENV) $(AUDIT_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The shim comes first, so that pip takes the CPU build of fbgemm (see deploy/shim/fbgemm-gpu/pyproject.toml).
$(VENV)/.ready: $(PINS)
	@deploy/make-venv $(VENV)
	@echo "Installing Sluice into $(VENV): a few minutes the first time, most of them PyTorch."
	@$(BIN)/python $(PIP) -c deploy/constraints.txt ./deploy/shim/fbgemm-gpu -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "Installing what the tests need into $(VENV)."
	@$(BIN)/python $(PIP) -c deploy/constraints.txt ./deploy/shim/fbgemm-gpu -e '.[test]'
	@touch $@

$(AIRFLOW_VENV)/.ready: deploy/airflow/requirements.txt deploy/airflow/constraints.txt
	@deploy/make-venv $(AIRFLOW_VENV)
	@echo "Installing Airflow into $(AIRFLOW_VENV): about a minute."
	@$(AIRFLOW_VENV)/bin/python $(PIP) -c deploy/airflow/constraints.txt -r deploy/airflow/requirements.txt
	@touch $@

$(AUDIT_VENV)/.ready:
	@deploy/make-venv $(AUDIT_VENV)
	@$(AUDIT_VENV)/bin/python $(PIP) pip-audit==2.10.1
	@touch $@
