# The one door to the project. Every target first makes the part of .venv that it needs, and only once.
.PHONY: demo test test-services check bench ci lock
.NOTPARALLEL:
PYTHON := .venv/bin/python
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --no-compile --python $(PYTHON),python3 -m pip --python $(PYTHON) install --quiet --no-compile --disable-pip-version-check)
LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-emit-index-url --generate-hashes pyproject.toml
# What was compiled is kept, as the tests start hundreds of interpreters and nothing is compiled when it is installed.
export PYTHONDONTWRITEBYTECODE :=

demo: .venv/base ; $(PYTHON) examples/ask_the_docs.py
test: .venv/dev ; $(PYTHON) -m pytest -n 2 --ignore tests/services --ignore tests/rag
# The ready-made services with the real engines behind them, which are half a gigabyte to install.
test-services: .venv/services ; $(PYTHON) -m pytest -n 2 tests/services tests/rag
# Vector stores are measured against the engines under them.
bench: .venv/bench .venv/services ; $(PYTHON) -m benchmarks
ci: check test test-services
check: .venv/services
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/vulture
lock:
	$(LOCK) --group build --output-file requirements/base.txt
	$(LOCK) --group dev --constraint requirements/base.txt --output-file requirements/dev.txt
	$(LOCK) --group services --all-extras --constraint requirements/dev.txt --output-file requirements/services.txt
	$(LOCK) --group bench --constraint requirements/services.txt --output-file requirements/bench.txt

.venv/base: requirements/base.txt pyproject.toml
	python3 -m venv --without-pip .venv
	$(INSTALL) --require-hashes --requirement requirements/base.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@
# Each list is complete, so that nothing has to be added that a package asks for.
.venv/%: requirements/%.txt .venv/base
	$(INSTALL) --require-hashes --no-deps --requirement $<
	touch $@
