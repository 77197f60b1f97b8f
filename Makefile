# Everything a developer, CI or a newcomer runs. Needs make and Python >= 3.11; the rest installs itself into .venv.

PYTHON ?= python3
PIP_FLAGS ?= --quiet

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
FRESH := dist/venv

# Tests never ask a network: not for weights, not to report use, not to look for updates.
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export FLWR_TELEMETRY_ENABLED = 0
test test-slow: export FLWR_DISABLE_UPDATE_CHECK = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-federation test test-slow lint check rpc fix wheel

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make .venv and install the project and its tools into it

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "no $(PYTHON) here, Python 3.11 or newer is needed: install it or run make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1), Python 3.11 or newer is needed: run make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (on Debian or Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "making .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "installing into .venv; the first time takes some minutes"
	@$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## run the demonstration on this machine
	@$(BIN)/huizhen demo

demo-federation: $(STAMP)  ## run a coordinator and three hospitals over TLS, and kill two of them
	@rm -rf runs/demo-federation
	@$(BIN)/huizhen demo --federation

test: $(STAMP)  ## run the fast tests
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)  ## run the slow tests: kills, lying parties, statistics
	@$(BIN)/python -m pytest -m slow || { status=$$?; test $$status -ne 5 || echo "no test is marked slow, at least one was expected: see markers in pyproject.toml" >&2; exit $$status; }

lint: $(STAMP)  ## check format, style, types and imports between packages
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint test  ## lint, then the fast tests: run this before every commit

rpc: $(STAMP)  ## make the gRPC stubs again from protocol/rpc/alliance.proto
	@$(BIN)/python -m grpc_tools.protoc -I .namespace --python_out=.namespace --pyi_out=.namespace --grpc_python_out=.namespace huizhen/protocol/rpc/alliance.proto

fix: $(STAMP)  ## repair format and style where ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A fresh environment holds the wheel alone; the dependencies are lent by .venv through a .pth file, written after
# the installation. Files named in a lent folder's own .pth are not followed, so the editable install stays out.
define IMPORT_ALL
import importlib, pathlib, pkgutil, sys
for package in sys.argv[1:]:
    found = importlib.import_module(package)
    if not pathlib.Path(found.__file__).is_relative_to(sys.prefix):
        sys.exit(f"{package} came from {found.__file__}, not from the wheel")
    for module in pkgutil.iter_modules(found.__path__, package + "."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
endef
export IMPORT_ALL

wheel: $(STAMP)  ## build the wheel, install it alone, import every module, run huizhen --help
	@rm -rf build dist
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build
	@$(BIN)/python -m venv --without-pip $(FRESH)
	@$(PIP) --python $(FRESH)/bin/python install --quiet --no-index --no-deps dist/huizhen-*.whl
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(FRESH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
	@mkdir dist/empty
	@packages="$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["tool"]["setuptools"]["packages"])')" \
	  && cd dist/empty && ../venv/bin/python -I -c "$$IMPORT_ALL" $$packages && ../venv/bin/huizhen --help >/dev/null
	@rm -rf $(FRESH) dist/empty
	@ls dist/*.whl
