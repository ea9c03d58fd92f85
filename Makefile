# The README uses `make demo` and `make test`. Every target but clean installs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-references bench lint docs install clean

demo: install
	@echo "==> training SegFormer-B0 on the built-in data set 'shapes' (about 4 minutes on two cores)"
	$(BIN)/python -m segformer_pl fit --config experiments/demo.yaml

test: install
	@echo "==> running all tests that need no GPU"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not references"

test-fast: install
	@echo "==> running the fast tests"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not references and not slow"

test-references: $(VENV)/references
	@echo "==> comparing with the reference implementations"
	$(BIN)/python -m pytest -m references tests/references

# On an otherwise idle machine; see experiments/benchmarks for what is compared.
bench: $(VENV)/references
	@echo "==> timing SegFormer beside transformers and segmentation_models_pytorch (20 minutes)"
	$(BIN)/python experiments/benchmarks/speed.py --rounds 5 --variants b0
	$(BIN)/python experiments/benchmarks/speed.py --rounds 3 --variants b2 --without_smp \
		--tasks inference training file
	$(BIN)/python experiments/benchmarks/speed.py --rounds 3 --variants b0 --without_smp \
		--tasks inference --size 1024 2048 --num_classes 19
	$(BIN)/python experiments/benchmarks/runtimes.py --runtimes eager folded onnxruntime openvino

lint: install
	@echo "==> checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	@echo "==> building the site; a dead link or a missing reference is an error"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

install: $(VENV)/installed

$(VENV)/installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python %d.%d is too old, 3.11 or newer is needed; choose another one: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "==> installing into $(VENV) (several GB and a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

$(VENV)/references: $(VENV)/installed requirements-references.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-references.txt
	@touch $@

$(VENV)/docs: $(VENV)/installed requirements-docs.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-docs.txt
	@touch $@

clean:
	rm -rf $(VENV) runs site
