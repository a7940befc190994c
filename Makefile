# `make` lists the targets. Each sets up .venv first, where it is needed.
NEWEST = for v in 13 12 11; do python3.$$v -c 'import ensurepip, venv' 2>/dev/null && echo python3.$$v && break; done
PYTHON ?= $(shell $(NEWEST))
ACTIVATE = . .venv/bin/activate

.PHONY: help repro contest demonstration test check segment lab bench

help:
	@echo 'make repro          regenerate the default results (13 to 25 minutes on two cores)'
	@echo 'make contest        every method by the same rules (six minutes a method and draw; finished ones are kept)'
	@echo 'make test           run all tests (6 to 16 minutes)'
	@echo 'make check          formatting, lint, and that imports go one way'
	@echo 'make segment IMAGES=dir MASKS=dir OUT=dir [SET="key=value ..."]     masks for a folder of scans'
	@echo 'make segment IMAGES=dir OUT=dir MODEL=out/model.safetensors        apply a trained model'
	@echo 'make lab            open the notebooks in JupyterLab'
	@echo 'make bench          time the training steps'
	@echo 'make demonstration  pictures of "Your own scans" in the README, after make repro'

.venv/ready: requirements.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11, 3.12 or 3.13 with venv is needed, and none was found: install one' \
	  '(Debian, Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3; macOS: brew install python@3.13),' \
	  'or name one: make PYTHON=/path/to/python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && python lib/runs/torch_build.py
	$(ACTIVATE) && pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

repro: .venv/ready
	$(ACTIVATE) && dvc repro && python -m lib.results.costs

contest: .venv/ready
	$(ACTIVATE) && dvc repro contest/dvc.yaml

demonstration: .venv/ready
	$(ACTIVATE) && dvc repro demonstration/dvc.yaml:own_data

test: .venv/ready
	$(ACTIVATE) && pytest -n auto --dist loadgroup --nbval-lax --nbval-current-env notebooks tests

check: .venv/ready
	$(ACTIVATE) && ruff format --check . && ruff check . && lint-imports

segment: .venv/ready
	$(if $(and $(IMAGES),$(OUT)),,$(error give IMAGES=dir MASKS=dir OUT=dir, or IMAGES=dir OUT=dir MODEL=file))
	$(ACTIVATE) && python -m lib.scans "$(IMAGES)" "$(OUT)" --masks "$(MASKS)" --model "$(MODEL)" $(SET:%=-S '%')

lab: .venv/ready
	$(ACTIVATE) && jupyter lab notebooks

bench: .venv/ready
	$(ACTIVATE) && python -m lib.runs.bench && python -m lib.results.roofline
