# make serve | monitoring | test | chaos | lint | simulate | bench-data-plane | setup | clean
CONFIG ?= serve_config.yaml
FLAGS ?=
PYTEST_ARGS ?=

.PHONY: setup serve monitoring test chaos lint simulate bench-data-plane clean

setup:
	@scripts/setup.sh

serve: setup
	@exec .venv/bin/splitwiser serve $(CONFIG) $(FLAGS)

monitoring: setup
	@exec .venv/bin/python -m monitoring.local_prometheus $(FLAGS)

test: setup
	.venv/bin/python -m pytest $(PYTEST_ARGS)

chaos: setup
	.venv/bin/python -m benchmarks.chaos --out benchmarks/results/chaos.jsonl

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

simulate: setup
	.venv/bin/python -m benchmarks.simulate --goals --out benchmarks/results/simulate

bench-data-plane: setup
	.venv/bin/python -m benchmarks.data_plane --out benchmarks/results/data_plane.jsonl

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
