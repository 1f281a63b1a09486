# Everything runs in .venv, made from the ranges in pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cli,data,report,parquet,onnx,notebooks,dev
# Two workers on two cores: one thread each, or they wait for one another.
TEST := OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n 2
# The oldest torch, torchvision and jsonargparse that pyproject.toml allows.
OLDEST := $(shell sed -nE 's/^  "(torch|torchvision)>=([0-9.]+)",$$/\1==\2.*/p; s/^cli = \["(jsonargparse).*>=([0-9.]+)",.*/\1==\2.*/p' pyproject.toml)

.PHONY: install demo test test-oldest test-avx2 test-processors test-slow test-install test-deploy test-clients test-coming-from test-gpu docs test-docs api contract record lint notebooks bench results clean

install: .venv/.installed

# The stamp is renewed when the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

# The main job, on data that comes with scikit-learn: for each data set a table, results.json, report.html and figures in a folder of runs/compare/, and a
# page over both.
demo: install
	$(BIN)/lightning-uq compare --data digits,diabetes --seeds 3 --seed 0 --jobs 2 --overwrite --out runs/compare

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_structure.py

test: lint
	$(TEST) -m "not slow"

# The suite on three kinds of processor; `make --keep-going test-processors` runs all three, whatever fails.
test-processors: test-oldest test-avx2 test

# The oldest torch and jsonargparse, without vector instructions, on one thread.
test-oldest: .venv-oldest/.installed
	ATEN_CPU_CAPABILITY=default $(subst $(BIN),.venv-oldest/bin,$(TEST)) -m "not slow"

.venv-oldest/.installed: pyproject.toml
	test $(words $(OLDEST)) = 3
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --editable ".[$(EXTRAS)]" $(OLDEST:%='%')
	touch $@

# Narrower vectors than most processors have today, in torch and in its libraries, on two threads, which sleep while they wait: there
# are more of them than cores.
test-avx2: install
	OMP_WAIT_POLICY=passive ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
		$(subst OMP_NUM_THREADS=1,OMP_NUM_THREADS=2,$(TEST)) -m "not slow"

test-slow: install
	$(TEST) -m slow

# The wheel in environments of its own, without extras and with each extra alone, on the oldest Python and the newest; runs README.md there.
PYTHONS ?= python3.10 python3.13
test-install: install
	$(BIN)/python tests/install/environments.py $(PYTHONS)

# The service of examples/deploy under FastAPI's test client.
test-deploy: install
	$(BIN)/python -m pip install --quiet --editable ".[deploy]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/examples

# The tools on other people's projects, whose packages come into an environment of their own on top of this one; writes docs/clients.md.
test-clients: .venv-clients/.installed
	OMP_NUM_THREADS=1 MPLBACKEND=agg .venv-clients/bin/python -m pytest tests/clients --clients docs/clients.md
	$(BIN)/ruff format --quiet docs/clients.md

.venv-clients/.installed: .venv/.installed tests/clients/requirements.txt
	$(call environment_on_top,.venv-clients,tests/clients/requirements.txt)

# An environment with the packages of a list, on top of the project's own; a stamp says that it is complete.
define environment_on_top
	$(PYTHON) -m venv $(1)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	$(1)/bin/python -m pip install --quiet --no-deps --requirement $(2)
	touch $@
endef

# The documentation: builds the site, serves it on port 8000, and builds it again when a page changes. The variable silences an
# advertisement of another package.
SITE := NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs
docs: .venv/.docs-installed
	$(SITE) serve --livereload

# Builds the site, which fails at a page that is missing, a dead link or an unknown citation; then runs the pages' examples and all
# notebooks in full, and checks the built site.
test-docs: .venv/.docs-installed
	$(SITE) build --quiet
	$(TEST) tests/docs --site site

.venv/.docs-installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

# Every module and callback under every way in which Lightning runs it; publishes what passed. The column `gpu` is that of the last
# `make test-gpu`, whose results are committed.
GPU_RESULTS := tests/contract/gpu_results.json
contract: install
	$(TEST) tests/contract --grid docs/contract.md $(patsubst %,--gpu-results %,$(wildcard $(GPU_RESULTS)))

# The tests that need a CUDA device.
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/contract tests --record-gpu $(GPU_RESULTS)

# Writes the names of the public API; its diff shows what came or went.
api: install
	$(BIN)/python tests/test_api.py

# Rewrites tests/contract/recorded/ and says for each case whether numbers or only names changed.
record: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contract/test_recording.py --record --quiet

# Executes every notebook in full and keeps its output; `make test` executes them in a fast mode.
notebooks: install
	$(BIN)/python notebooks/execute.py

# The pages that show another package's call beside ours; the packages are those of the benchmarks.
test-coming-from: .venv-bench/.installed
	OMP_NUM_THREADS=1 .venv-bench/bin/python -m pytest -rs tests/docs/test_coming_from.py --peers

# Times this package beside its peers, whose packages come into an environment of their own on top of this one; writes benchmarks/results.md.
bench: .venv-bench/.installed
	OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=99 .venv-bench/bin/python -m benchmarks $(BENCH)

.venv-bench/.installed: .venv/.installed benchmarks/requirements.txt
	$(call environment_on_top,.venv-bench,benchmarks/requirements.txt)

# Papers' numbers beside ours, on real data in DATA and images in IMAGES: an hour of two cores, then docs/results.md is rewritten. RESULTS keeps what
# is done, so a second call goes on with what the budgets left out. STORED, if given, holds the testbed's stored problems. The scripts run two at a
# time, and publish one after the other, since all write the same page.
DATA ?= data
IMAGES ?= $(DATA)
RESULTS ?= runs/results
REPRODUCE = OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reproduce/$(1).py $(RUN_$(1)) --out $(RESULTS)/$(1)
RUN_conformal = --logits $(DATA)/logits --uci $(DATA)/uci --budget 35
RUN_uci = --root $(DATA)/uci --budget 17
RUN_calibration = --root $(DATA)/logits --budget 5
RUN_testbed = --budget 26 $(STORED:%=--stored %)
RUN_evidential = --root $(IMAGES) --budget 18
RUN_active = --root $(IMAGES) --budget 10
EXPERIMENTS := conformal uci calibration testbed evidential active
results: install
	$(MAKE) --jobs 2 $(EXPERIMENTS:%=results-%)
	$(foreach name,$(EXPERIMENTS),$(call REPRODUCE,$(name)) --budget 0 --publish &&) true

results-%:
	$(call REPRODUCE,$*)

clean:
	rm -rf .venv .venv-oldest .venv-clients .venv-bench .venv-install runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
