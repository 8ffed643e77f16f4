# make serve | monitoring | test | test-long | chaos | fuzz | audit | lint | bench | simulate | bench-data-plane | setup | clean
CONFIG ?= serve_config.yaml
FLAGS ?=
PYTEST_ARGS ?=

.PHONY: setup serve monitoring test test-long chaos fuzz audit lint bench simulate bench-data-plane clean

setup:
	@scripts/setup.sh

serve: setup
	@exec .venv/bin/splitwiser serve $(CONFIG) $(FLAGS)

monitoring: setup
	@exec .venv/bin/python -m monitoring.local_prometheus $(FLAGS)

test: setup
	.venv/bin/python -m pytest $(PYTEST_ARGS)

# Ten minutes of each fuzzer against two real engines; FUZZ_S=60 for less.
fuzz: setup
	SPLITWISER_FUZZ_S=$(or $(FUZZ_S),600) SPLITWISER_FUZZ_SEED=$(or $(SEED),20261122) \
		.venv/bin/python -m pytest -m long tests/system/test_fuzz.py -s $(PYTEST_ARGS)

audit: setup
	@.venv/bin/python scripts/audit.py

chaos: setup
	.venv/bin/python -m benchmarks.chaos --out benchmarks/results/chaos.jsonl

# What takes engines of its own: faults, fuzzers, restarts, shared weights (half an hour and more on two cores).
test-long: setup
	.venv/bin/python -m pytest -m long $(PYTEST_ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup
	@exec .venv/bin/splitwiser bench $(FLAGS)

simulate: setup
	.venv/bin/python -m benchmarks.simulate --goals --out benchmarks/results/simulate

bench-data-plane: setup
	.venv/bin/python -m benchmarks.data_plane --out benchmarks/results/data_plane.jsonl

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
