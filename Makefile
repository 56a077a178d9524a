# make repro   the whole pipeline: data, dense model, priors, learned masks, tables, MLflow
# make test    linters, types, tests
# make proof   the pipeline once more in an empty folder: are all committed results reproduced exactly?
# make ui      MLflow's UI on http://127.0.0.1:5000
# make publish send all committed records to MLFLOW_TRACKING_URI (or ./mlflow.db)
# make use EXPERIMENT=digits   switch params.yaml to experiments/digits.yaml
PYTHON ?= python3.11
VENV   ?= $(CURDIR)/.venv
PORT   ?= 5000
READY  := $(VENV)/.installed

export PATH := $(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONPATH

.PHONY: repro test proof ui publish use lint

repro: $(READY)
	@test -e mlflow.db || rm -rf mlruns/published  # the store was deleted: publish again
	dvc repro

test: lint
	python -m pytest -n 2 --dist loadfile

lint: $(READY)
	ruff format --check .
	ruff check .
	mypy

proof: $(READY)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	git clone -q . "$$folder/clone"; cd "$$folder/clone"; \
	env -u MLFLOW_TRACKING_URI dvc repro -f; \
	git diff --exit-code; \
	test -z "$$(git status --porcelain)" || { git status --short; exit 1; }; \
	python -m maskllm4v report --check; \
	echo "proof: every committed result was reproduced exactly"

ui: $(READY)
	mlflow ui --backend-store-uri sqlite:///mlflow.db --port $(PORT)

publish: $(READY)
	python -m maskllm4v publish

use: $(READY)
	python -m maskllm4v use $(EXPERIMENT)

$(READY): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --require-hashes -r requirements.lock
	touch $@
