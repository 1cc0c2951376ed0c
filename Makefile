# `make help` lists the commands. They install into .venv; PYTHON=python3.12 chooses the interpreter that makes it.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STATED := pyproject.toml constraints.txt

.PHONY: help demo test lint check-python

help:
	@echo "make demo    distil the bundled teacher on this machine and write runs/demo/report.html"
	@echo "             options: make demo ARGS=\"--minutes 5 --recipe shapes_2step\""
	@echo "make test    ruff, mypy and pytest"
	@echo "make lint    ruff and mypy"
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer)"

demo: .venv/.installed
	$(BIN)/fewstep demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# Installs again only when what is stated changes.
.venv/.installed: $(STATED) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: $(STATED) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch .venv/.installed $@

$(BIN)/pip: | check-python
	$(PYTHON) -m venv .venv || { echo "On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }

# An existing .venv is judged by its own interpreter.
check-python:
	@python="$(PYTHON)"; if [ -x $(BIN)/python ]; then python=$(BIN)/python; fi; \
	command -v "$$python" >/dev/null || { echo "error: $$python not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: fewstep needs Python 3.11 or newer, but $$python is $$("$$python" --version 2>&1)." >&2; \
	echo "Name another one: make PYTHON=python3.12 (and delete .venv if an older Python made it)" >&2; exit 1; }
