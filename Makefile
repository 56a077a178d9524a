# make repro   the whole pipeline: data, dense model, priors, learned masks, tables, MLflow; then what came out equal
# make test    linters, types, tests
# make proof   the exact tables once more in an empty folder: is every committed byte of them reproduced? Renews
#              reports/proofs, which says what was proved; TABLES="digits dit_digits": of these only
# make proof-ci   the table in params.yaml, and those whose record in reports/proofs no longer matches; renews nothing
# make sweep   do masks hold for any architecture? A model of each family (docs/models.md), some twenty minutes
# make bench   measure speed and memory on this machine; `make repro` then shows it
# make ui      MLflow's UI on http://127.0.0.1:5000
# make figures draw the figures in docs/figures anew
# make screenshots   look at pages and MLflow's UI in headless Chromium; pictures in docs/screenshots
# make plots   training curves of all rows on one axis, in DVC's page (dvc_plots/index.html)
# make experiments   what `dvc exp run` gave beside this commit; ROW=short-magnitude: of rows called so
# make chaos MINUTES=10   break stages, files, disks, servers and clocks at random; counts in docs/chaos.md
# make publish send all committed records to MLFLOW_TRACKING_URI (or ./mlflow.db)
# make lock    requirements.lock from pyproject.toml; today's pins are constraints, so that packages are added and none
#              moves: another torch, numpy or timm would break every exact table. To move one, take out its pin before
# make use EXPERIMENT=digits   switch params.yaml to experiments/digits.yaml
PYTHON ?= python3.11
VENV   ?= $(CURDIR)/.venv
PORT   ?= 5000
MINUTES ?= 10
READY  := $(VENV)/.command
LOCKER := .cache/locker
UV     := 0.13.9

export PATH := $(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONPATH

.PHONY: repro test proof proof-ci bench ui figures screenshots plots experiments chaos publish lock use lint sweep

repro: $(READY)
	@test -e mlflow.db || rm -rf mlruns/published  # the store was deleted: publish again
	@begin=$$(date +%s); echo "dvc repro"; dvc repro && python -m maskllm4v receipt --since "$$begin"

test: lint
	python -m pytest -n 2 --dist loadfile

lint: $(READY)
	ruff format --check .
	ruff check .
	mypy

proof: $(READY)
	python -m scripts.prove $(TABLES)

proof-ci: $(READY)
	python -m scripts.prove --stale

sweep: $(READY)
	python -m scripts.sweep

bench: $(READY)
	python -m benchmarks.mask_op
	python -m benchmarks.train_step
	python -m benchmarks.gates
	python -m benchmarks.exact_step
	python -m benchmarks.oneshot
	python -m benchmarks.inference
	python -m benchmarks.table_cost

ui: $(READY)
	mlflow ui --backend-store-uri sqlite:///mlflow.db --port $(PORT)

figures: $(READY)
	python -m scripts.draw_figures

screenshots: $(READY)
	python -m scripts.screenshots

plots: $(READY)
	dvc plots show loss max-probability off-prior flipped tau

experiments: $(READY)
	dvc exp show --only-changed --hide-workspace --drop '.*/|Created|(?!.*$(ROW)).*\.'

chaos: $(READY)
	python -m scripts.chaos --minutes $(MINUTES) --write docs/chaos.md

publish: $(READY)
	python -m maskllm4v publish

lock:
	$(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/pip install -q uv==$(UV)
	$(LOCKER)/bin/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --constraint requirements.lock --output-file requirements.lock

use: $(READY)
	python -m maskllm4v use $(EXPERIMENT)

$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --require-hashes -r requirements.lock
	touch $@

$(READY): $(VENV)/.installed pyproject.toml
	$(VENV)/bin/pip install -q --no-deps --no-build-isolation --no-index --editable .
	touch $@
