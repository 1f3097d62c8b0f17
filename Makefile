# The one door to the project. Every target first makes the part of .venv that it needs, and only once.
.PHONY: demo test test-services test-ray check bench docs ci lock
.NOTPARALLEL:
PYTHON := .venv/bin/python
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --no-compile --python $(PYTHON),python3 -m pip --python $(PYTHON) install --quiet --no-compile --disable-pip-version-check)
LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-emit-index-url --generate-hashes pyproject.toml
# The extras of the ready-made services: all but Ray, which has a list of its own.
SERVICES := vector chroma milvus embed llm redis kafka http parquet objects postgres graph html office pdf rag
# What was compiled is kept, as the tests start hundreds of interpreters and nothing is compiled when it is installed.
export PYTHONDONTWRITEBYTECODE :=

# Its answers, and a page with its reports and a picture of what ran when.
demo: .venv/base
	@mkdir -p build && rm -f build/demo.jsonl
	@SAGE_REPORT_FILE=build/demo.jsonl $(PYTHON) examples/ask_the_docs.py
	@.venv/bin/sage report build/demo.jsonl --html build/demo.html
	@echo "What ran when, as a picture: open build/demo.html in a browser"
# Four at once on two cores, as many tests wait for a bound to come. Of a test with many cases a few, unless with --proof.
test: .venv/dev ; $(PYTHON) -m pytest -n 4 --few --ignore tests/services --ignore tests/rag --ignore tests/checkers
# The ready-made services with the real engines behind them, which are half a gigabyte to install.
test-services: .venv/services ; $(PYTHON) -m pytest -n 2 tests/services tests/rag
# One after the other: each starts a Ray of its own, which fills a machine of two cores for seconds. One runs Chroma.
test-ray: .venv/ray .venv/services ; $(PYTHON) -m pytest -m ray tests/ray
# Vector stores are measured against the engines under them.
bench: .venv/bench .venv/services ; $(PYTHON) -m benchmarks
ci: check test test-services test-ray docs
check: .venv/services
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/vulture
	$(PYTHON) -m pytest -n 2 tests/checkers
# The site, in build/site. It is made from a copy, as Zensical would look through all of .venv and hang.
docs: .venv/docs
	rm -rf build/pages build/site && mkdir -p build/pages
	cp -r README.md CHANGELOG.md LICENSE docs examples src tests build/pages
	rm -r build/pages/examples/rag/corpus
	.venv/bin/zensical build --clean --strict
lock:
	$(LOCK) --group build --output-file requirements/base.txt
	$(LOCK) --group dev --constraint requirements/base.txt --output-file requirements/dev.txt
	$(LOCK) --group services $(SERVICES:%=--extra %) --constraint requirements/dev.txt --output-file requirements/services.txt
	$(LOCK) --group dev --extra ray --constraint requirements/services.txt --output-file requirements/ray.txt
	$(LOCK) --group bench --constraint requirements/services.txt --output-file requirements/bench.txt
	$(LOCK) --group docs --constraint requirements/services.txt --output-file requirements/docs.txt

.venv/base: requirements/base.txt pyproject.toml
	python3 -m venv --without-pip .venv
	$(INSTALL) --require-hashes --requirement requirements/base.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@
# Each list is complete, so that nothing has to be added that a package asks for.
.venv/%: requirements/%.txt .venv/base
	$(INSTALL) --require-hashes --no-deps --requirement $<
	touch $@
