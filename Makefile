# `make repro`, `make test`, `make lab`, `make bench`: each sets up .venv first.
PYTHON ?= python3.11
ACTIVATE = . .venv/bin/activate

.PHONY: repro test lab bench

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

repro: .venv/ready
	$(ACTIVATE) && dvc repro

test: .venv/ready
	$(ACTIVATE) && pytest --nbval-lax --nbval-current-env notebooks tests

lab: .venv/ready
	$(ACTIVATE) && jupyter lab notebooks

bench: .venv/ready
	$(ACTIVATE) && python -m lib.bench
