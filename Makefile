# make run     serve site.tar (or SITE=...), or, without one, this repository's own pages
# make tarweb.pyz   put the whole server into one file, which Python 3.11 and all later versions run
# make test    install what the tests need and run them (T=tests/test_ranges.py for one file)
# make fuzz    fuzz parsers and what peers can reach of the rest, a minute each (FUZZFLAGS='--seconds 600 --record')
# make model   check the states of connections against chance, into tests/MODEL.md (MODELFLAGS='--steps 5000000')
# make soak    an hour of all kinds of clients at once, into tests/SOAK.md (SOAKFLAGS='--minutes 5')
# make bench   measure against nginx, lighttpd and http.server
# make lint    ruff and mypy
# make clean   remove everything that was made here

PYTHON ?= python3
DEMO    = .cache/demo.tar
SITE   ?= $(if $(wildcard site.tar),site.tar,$(DEMO))
FLAGS  ?=
T      ?=
FUZZFLAGS ?=
MODELFLAGS ?=
SOAKFLAGS ?=

.PHONY: run test fuzz model soak bench lint clean setup

run: $(SITE)
	$(PYTHON) tarweb.py $(FLAGS) $(SITE)

tarweb.pyz: deploy/pyz.py $(wildcard *.py)
	$(PYTHON) deploy/pyz.py $@

test: setup
	.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(T)

fuzz: setup
	.venv/bin/python fuzz/run.py $(FUZZFLAGS)

model: setup
	.venv/bin/python tests/model.py --record $(MODELFLAGS)

soak: setup
	.venv/bin/python tests/soak.py --record $(SOAKFLAGS)

bench: setup
	.venv/bin/python bench/run.py

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy *.py

setup:
	@tests/setup.sh

# The README as a page, and the sources beside it.
$(DEMO): README.md LICENSE $(wildcard *.py)
	@mkdir -p .cache/demo
	@cp $^ .cache/demo/
	@{ echo '<!doctype html><meta charset="utf-8"><title>tarweb</title><pre>'; \
	  sed 's/&/\&amp;/g; s/</\&lt;/g' README.md; echo '</pre>'; } > .cache/demo/index.html
	@tar -C .cache/demo -cf $@ .

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache __pycache__ */__pycache__ fuzz/crashes \
	    build *.egg-info */*.egg-info tarweb.pyz
