# The two commands of the README: `make run` (the main job) and `make test`. Both prepare .venv by themselves.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: run demo test soak install bench lint site clean

run: $(STAMP)
	$(BIN)/untether run

# Real headlines, a real model on the device, a real one's recorded answers as the cloud; fetches 98 MB once.
demo: $(STAMP)
	$(BIN)/untether model fetch smollm2-135m
	$(BIN)/untether run examples/demo.toml

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile

# One run, killed twenty times at random moments, against an undisturbed one (some twenty minutes).
soak: $(STAMP)
	$(BIN)/python tests/soak.py

install: $(STAMP)

# torch first: with it in place, no other package's requirement pulls another build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "untether needs Python 3.11 or newer on PATH"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

bench: $(STAMP)
	$(BIN)/python -m bench

# mypy wants the folders where they are imported from: inside `untether`.
lint: $(STAMP)
	$(BIN)/ruff check .
	mkdir -p build/typed/untether
	ln -sf $(CURDIR)/untether/*.py $(CURDIR)/untether/py.typed build/typed/untether
	ln -sfn $(CURDIR)/sim build/typed/untether/sim
	ln -sfn $(CURDIR)/clients build/typed/untether/clients
	ln -sfn $(CURDIR)/server build/typed/untether/server
	ln -sfn $(CURDIR)/strategies build/typed/untether/strategies
	$(BIN)/mypy

# The documentation as a site, in build/site.
site: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/make_fields.py
	$(BIN)/python -m mkdocs build

clean:
	rm -rf .venv build *.egg-info
