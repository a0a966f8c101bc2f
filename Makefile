# make test             everything that must pass, on PostgreSQL 15; PG=14, 16, 17 or 18 fetches a server of its own
# make demo             shows the main job on a throw-away server; KEEP=1 leaves it running
# make bench            measures what the extension costs and writes bench/RESULT.md; ORDERS, DUE, ROUNDS, FULL=1
# make install          builds and installs into PG_CONFIG=… (default: Debian's PostgreSQL 15)
# make package          a Debian package
# make test-upgrade     pg_upgrade from PostgreSQL 15 to 18 with the extension in both, which it builds; FROM=, TO=
# make pytest ARGS=…    the tests against servers alone, of the extension as it is installed

export PG PG_CONFIG KEEP
ARGS ?= tests

.NOTPARALLEL:
.DEFAULT_GOAL := build
.PHONY: setup build install package lint unit pytest test test-upgrade demo bench clean

setup:
	@scripts/setup

build:
	@scripts/setup --build
	@scripts/stage

install:
	@scripts/setup --build
	@scripts/install

package:
	@scripts/setup --build
	@scripts/package

lint: setup
	@scripts/lint

unit: setup
	@scripts/unit

pytest: setup
	@scripts/pytest $(ARGS)

test: setup
	@scripts/lint
	@scripts/unit
	@scripts/install
	@scripts/pytest

test-upgrade:
	@scripts/test-upgrade $(FROM) $(TO)

demo: setup
	@scripts/install
	@scripts/demo

bench: export ORDERS := $(ORDERS)
bench: export DUE := $(DUE)
bench: export ROUNDS := $(ROUNDS)
bench: export FULL := $(FULL)
bench: setup
	@scripts/install
	@scripts/bench --write

clean:
	cargo clean
