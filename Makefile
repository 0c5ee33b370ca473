# The project's commands; `make` lists them. `make remix` does everything it needs on the way.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
SONG ?=
VOICE ?=
OUT ?= out/demo
MIDI ?=
MODEL ?=
HUB ?= $(PHILHARMONICS_HUB)
NAME ?=
SAMPLES ?=
CONSENT ?=
SMOKE ?=
export PYTHON SONG VOICE OUT HUB MIDI MODEL NAME SAMPLES CONSENT SMOKE

# In a terminal pip shows its progress, elsewhere it only speaks of errors.
PIP_FLAGS := --disable-pip-version-check $(shell [ -t 2 ] || echo --quiet)
# From 24 songs to a checkpoint whose loss fell, on a CPU.
SMOKE_TRAINING := --songs 24 --data .cache/training/smoke/songs --out .cache/training/smoke/run \
	--steps 100 --minutes 1000 --evaluate-every 20
DEMO_SONG := .cache/demo_song.mp3

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 22

.PHONY: remix
remix: models  ## remix a song: make remix SONG=path VOICE=name OUT=folder (all optional)
	@if [ -z "$$SONG" ]; then .venv/bin/python -m export.demo_song $(DEMO_SONG); fi
	@.venv/bin/philharmonics remix "$${SONG:-$(DEMO_SONG)}" $${VOICE:+--voice "$$VOICE"} --out "$$OUT"

.PHONY: models
models: .venv/installed  ## fetch, convert and verify the models; HUB=address of a model hub
	@.venv/bin/python -m export.install --hub "$$HUB"

.PHONY: serve
serve: models  ## start all of it on this machine
	@.venv/bin/philharmonics serve

.PHONY: test
test: export-environment  ## all tests, with the export environment (torch)
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@if command -v apt-get >/dev/null; then scripts/get-promtool >/dev/null; fi
	.venv-dev/bin/python -m pytest $(TESTS)

.PHONY: lint
lint: export-environment  ## style and types
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy

.PHONY: check
check: lint test  ## lint, then test

.PHONY: proto
proto: export-environment  ## generate remix_v1/ from proto/remix/v1/remix.proto
	.venv-dev/bin/python -m grpc_tools.protoc -Iremix_v1=proto/remix/v1 \
		--python_out=. --pyi_out=. --grpc_python_out=. remix_v1/remix.proto

# Each takes minutes of a whole server: `make bench-service` runs them.
SERVICE_BENCHMARKS := admission jobs quote song_cost

.PHONY: bench
bench: export-environment  ## separation, remix and the small ones; writes benchmarks/results/
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	for module in $(filter-out __init__ decoding eval_generate eval_stems export paper_way $(SERVICE_BENCHMARKS),$(notdir $(basename $(wildcard benchmarks/*.py)))); do \
		.venv-dev/bin/python -m benchmarks.$$module; \
	done

# SMOKE=1: the smallest set of songs, a tiny network, two minutes; ends with 1 unless its loss fell.
STEM_DATA := .cache/training/$(if $(SMOKE),smoke_)stems
STEM_SONGS := $(if $(SMOKE),--songs 6 --held-out-songs 3 --takes 6 --seconds 20)
STEM_RUN := $(if $(SMOKE),--network smoke --minutes 2 --batch 2 --segment-s 2 --learning-rate 5e-4 \
	--warmup-steps 20 --averaging 0.95 --evaluate-every 25 --device cpu --must-fall \
	--out .cache/training/smoke_separate_stems)

.PHONY: train-stems
train-stems: export-environment  ## train a separator of four stems; SMOKE=1 some minutes on a CPU
	@scripts/get-stem-material $(if $(SMOKE),smoke)
	@.venv-dev/bin/python -m training.stem_songs --out $(STEM_DATA) $(STEM_SONGS)
	.venv-dev/bin/python -m training.separate_stems --data $(STEM_DATA) $(STEM_RUN)

.PHONY: eval-stems
eval-stems: export-environment  ## separation of held-out songs: make eval-stems MODEL=name
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@scripts/get-stem-material && scripts/get-stem-material evaluation
	@.venv-dev/bin/python -m training.stem_songs --songs 0 --held-out-songs 12
	.venv-dev/bin/python -m benchmarks.eval_stems $${MODEL:+--model "$$MODEL"}

.PHONY: export-check
export-check: export-environment  ## every architecture at full size: exported, compared, perturbed
	@.venv-dev/bin/python -m export.check

.PHONY: bench-export
bench-export: export-environment  ## what is served against the originals' own calls, in turn
	@.venv-dev/bin/python -m benchmarks.export

.PHONY: bench-generate
bench-generate: export-environment  ## tokens a second: the generator against Hugging Face `generate`
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@.venv-dev/bin/python -m benchmarks.decoding

.PHONY: bench-service
bench-service: export-environment  ## jobs, overload, quotes, what a song costs: against servers of its own
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	for module in $(SERVICE_BENCHMARKS); do .venv-dev/bin/python -m benchmarks.$$module; done

.PHONY: bench-paper
bench-paper: export-environment  ## a remix by the paper's commands against ours, the same weights
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@.venv-dev/bin/python -m benchmarks.paper_way

.PHONY: bench-batchers
bench-batchers: models .venv-batchers/installed  ## our batcher against BentoML's, Ray Serve's, LitServe's
	@.venv-batchers/bin/python -m benchmarks.batchers --rounds $${ROUNDS:-5}

.PHONY: load
load: models  ## load tests, in 15 minutes; writes out/load/; more: make load LOAD="--minutes 30"
	@.venv/bin/python -m export.demo_song $(DEMO_SONG)
	@.venv/bin/python -m load_tests all $(LOAD)

.PHONY: chaos
chaos: models  ## the service is killed, cut off, restarted under load; more: make chaos CHAOS=--list
	@.venv/bin/python -m export.demo_song $(DEMO_SONG)
	@.venv/bin/python -m chaos $(CHAOS)

.PHONY: locust
locust: .venv-load/installed  ## the same songs by Locust, on its page, against `make serve`
	@.venv-load/bin/locust -f load_tests/locustfile.py -H http://127.0.0.1:3000

.PHONY: train-generate
train-generate: export-environment  ## train the generator; SMOKE=1: two minutes; MIDI=folder: your files
	@if [ -n "$(SMOKE)" ]; then \
		rm -rf .cache/training/smoke; \
		.venv-dev/bin/python -m training.generate_notes $(SMOKE_TRAINING) $${MIDI:+--midi "$$MIDI"} $(TRAIN); \
	else \
		.venv-dev/bin/python -m training.generate_notes $${MIDI:+--midi "$$MIDI"} $(TRAIN); \
	fi

.PHONY: eval-generate
eval-generate: export-environment  ## what the generator writes, measured against its limits; MODEL=file
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@.venv-dev/bin/python -m benchmarks.eval_generate $${MODEL:+--model "$$MODEL"} $(EVAL)

.PHONY: images
images:  ## container images, for DEVICE=cpu or cuda; what is in them goes to out/images/
	@docker/build-images

.PHONY: compose-test
compose-test: export-environment  ## the whole service in containers, attacked; after make images
	.venv-dev/bin/python -m pytest -v docker/test_compose.py

.PHONY: chart-check
chart-check: .venv-chart/installed models  ## the Helm chart: lint, schemas, policies, a part of it run; after make images
	@.venv/bin/python -m export.demo_song $(DEMO_SONG)
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 .venv-chart/bin/python -m pytest -v deploy/test_chart.py

.PHONY: alert-check
alert-check:  ## each alert fires on what it is for, and not before (promtool)
	@promtool=$$(scripts/get-promtool) && cd docker/prometheus && \
		"$$promtool" check rules alerts.yml && "$$promtool" test rules alerts.test.yml

.PHONY: alert-faults
alert-faults: export-environment  ## alerts fire on faults of real processes; some minutes
	@scripts/get-promtool >/dev/null
	.venv-dev/bin/python -m pytest -v tests/alert_faults.py

.PHONY: gpu-check
gpu-check: .venv-chart/installed  ## what the GPU image installs, resolved and not fetched, and its size
	@.venv-chart/bin/python docker/resolve_cuda.py

.PHONY: train-voice
train-voice: export-environment  ## enrol NAME from SAMPLES and CONSENT; SMOKE=1: from end to end, in minutes
	@.venv-dev/bin/python -m export.install --hub "$$HUB"
	@if [ -n "$$SMOKE" ]; then .venv-dev/bin/python -m training.smoke_voice; else \
		.venv-dev/bin/philharmonics voices add "$$NAME" --samples "$$SAMPLES" --consent "$$CONSENT"; fi

.PHONY: clean
clean:  ## remove environments, models, fetched files and results
	rm -rf .venv .venv-dev .venv-load .venv-batchers .venv-chart .models .cache out build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: a stamp file says that one is complete ------------------------------------

.PHONY: system-packages
system-packages:
	@scripts/install-system-packages

.venv/installed: requirements/serving.txt requirements/models.txt pyproject.toml | system-packages
	@echo "Installing the Python packages into .venv (no torch); this takes a minute or two."
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install $(PIP_FLAGS) -r requirements/serving.txt -r requirements/models.txt
	@.venv/bin/pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

.PHONY: export-environment
export-environment: .venv-dev/installed  ## .venv-dev: torch, the originals, the test tools

.venv-dev/installed: $(wildcard requirements/*.txt) pyproject.toml | system-packages
	@echo "Installing the Python packages into .venv-dev (with torch); this takes some minutes."
	@$(PYTHON) -m venv .venv-dev
	@.venv-dev/bin/pip install $(PIP_FLAGS) -r requirements/serving.txt -r requirements/models.txt \
		-r requirements/export.txt -r requirements/dev.txt
	@.venv-dev/bin/pip install $(PIP_FLAGS) --no-deps -r requirements/export-no-deps.txt
	@.venv-dev/bin/pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

.venv-chart/installed: requirements/chart.txt | system-packages
	@$(PYTHON) -m venv .venv-chart
	@.venv-chart/bin/pip install $(PIP_FLAGS) -r requirements/chart.txt
	@touch $@

.venv-load/installed: requirements/load.txt | system-packages
	@$(PYTHON) -m venv .venv-load
	@.venv-load/bin/pip install $(PIP_FLAGS) -r requirements/load.txt
	@touch $@

.venv-batchers/installed: requirements/batchers.txt | system-packages
	@$(PYTHON) -m venv .venv-batchers
	@.venv-batchers/bin/pip install $(PIP_FLAGS) -r requirements/batchers.txt
	@touch $@

.PHONY: lock
lock: | system-packages  ## resolve requirements/serving.in anew into serving.txt
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/pip install $(PIP_FLAGS) -r requirements/serving.in
	echo '# Made by `make lock` from serving.in: every package, pinned. Do not edit.' \
		>requirements/serving.txt
	.cache/lock/bin/pip freeze --quiet >>requirements/serving.txt
	rm -rf .cache/lock
