# `make repro`, `make test`, `make segment`, `make lab`, `make bench`: each sets up .venv first.
PYTHON ?= python3.11
ACTIVATE = . .venv/bin/activate

.PHONY: repro demonstration test segment lab bench

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

repro: .venv/ready
	$(ACTIVATE) && dvc repro

demonstration: .venv/ready
	$(ACTIVATE) && dvc repro demonstration/dvc.yaml:own_data

test: .venv/ready
	$(ACTIVATE) && pytest -n auto --dist loadgroup --nbval-lax --nbval-current-env notebooks tests

# make segment IMAGES=dir MASKS=dir OUT=dir [MODEL=file] [SET="key=value ..."]
segment: .venv/ready
	$(if $(and $(IMAGES),$(OUT)),,$(error give IMAGES=dir MASKS=dir OUT=dir, or IMAGES=dir OUT=dir MODEL=file))
	$(ACTIVATE) && python -m lib.segment "$(IMAGES)" "$(OUT)" --masks "$(MASKS)" --model "$(MODEL)" $(SET:%=-S '%')

lab: .venv/ready
	$(ACTIVATE) && jupyter lab notebooks

bench: .venv/ready
	$(ACTIVATE) && python -m lib.bench
