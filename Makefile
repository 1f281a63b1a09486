# Everything runs in .venv, made from the ranges in pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cli,data,report,notebooks,dev

.PHONY: install demo test test-slow lint clean

# The stamp is renewed when the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

install: .venv/.installed
