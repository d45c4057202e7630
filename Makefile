# Two commands do everything, set-up included, on a new machine with Python and make:
#   make fuzz   a one-minute campaign on the newest released kernels
#   make test   the test suite
# And for developers, among others:
#   make docs   the documentation's site, in build/site
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# An open torch range would take several GB of CUDA packages on a machine that cannot use them.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,--constraint constraints-cpu.txt)

.PHONY: venv fuzz test check docs bench corpus clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev,xpu-cpu]'
	touch $@

fuzz: venv
	$(BIN)/kernelfuzz releases fetch --pinned
	$(BIN)/kernelfuzz run

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With --quiet, warnings would not count, and --strict would mean nothing.
docs: venv
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --site-dir build/site

bench: venv
	$(BIN)/kernelfuzz releases fetch --pinned
	$(BIN)/python benchmarks/speed.py --seconds 15

corpus: venv
	$(BIN)/kernelfuzz releases fetch --pinned
	$(BIN)/python benchmarks/corpus.py

clean:
	rm -rf $(VENV) build dist
