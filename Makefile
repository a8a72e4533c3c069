# The one door to the project. `make help` says what there is; every target sets up what it needs.
SHELL := /bin/bash
UV_VERSION := 0.13.9
VENV := .venv
BOOT := .cache/uv-$(UV_VERSION)
UV := $(BOOT)/bin/uv
RUN := $(VENV)/bin
# As many tests at once as there are processors; a worker that is done takes from the others' rest.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
# Its programs are built already, or can be.
APISERVER_HERE := ls "$$HOME"/.cache/fleetlm/kubernetes-*/kube-apiserver >/dev/null 2>&1 || \
	PATH="$$PATH:/usr/local/go/bin:/usr/lib/go/bin" go version 2>/dev/null | grep -q go1.26
SOURCES := common/src shard/src gateway/src operator/src client/src cli/src
.DEFAULT_GOAL := help
.PHONY: help setup check audit test docs up bench bench-check bench-peers bench-peers-setup kills moves sim plants fuzz faults soak clean images cluster cluster-down e2e e2e-long e2e-moves

help: ## what can be made
	@grep -hE '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(UV):
	python3 -m venv $(BOOT)
	$(BOOT)/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.synced: $(UV) pyproject.toml uv.lock $(wildcard */pyproject.toml)
	UV_PYTHON_DOWNLOADS=never $(UV) sync --locked --quiet
	@touch $@

setup: $(VENV)/.synced ## make .venv with everything (needs Python 3.11 and PyPI only)

check: setup ## ruff, mypy strict, pyright strict, import-linter, tidy, dependency audit
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy $(SOURCES) tests
	$(RUN)/pyright
	$(RUN)/lint-imports --no-cache
	$(RUN)/pytest -q tests/test_tidy.py
	@$(MAKE) --no-print-directory audit

audit: setup ## known vulnerabilities in the locked dependencies (says so when the data cannot be reached)
	@bash tests/support/audit.sh $(UV) $(RUN)

test: setup ## every test but those marked `long` (make faults); what needs root (loop mounts) or Go 1.26 (a real API server) is left out without, and it says so
	@without="not long and not e2e"; echo "tests marked 'long' are left out; 'make faults' runs them"; \
	echo "tests marked 'e2e' (on a real Kubernetes) are left out; 'make e2e' runs them"; \
	if [ "$$(id -u)" != 0 ]; then without="$$without and not root"; \
	echo "not root: tests marked 'root' (full file systems on loop mounts) are left out; 'sudo make test' runs them"; fi; \
	if $(APISERVER_HERE); then $(RUN)/python -m tests.cluster build etcd kube-apiserver kube-controller-manager helm helm3 || exit 1; \
	else without="$$without and not apiserver"; \
	echo "no Go 1.26: tests marked 'apiserver' (a real Kubernetes API server, built from Go modules) are left out"; fi; \
	$(RUN)/pytest -q $(PARALLEL) -m "$$without"

e2e: setup ## on a real Kubernetes of three nodes (one that is up, else one for this run): root, see tests/cluster/README.md; ARGS for pytest; CLUSTER=kind where Docker is
	@echo "tests marked 'long' are left out; 'make e2e-long' runs them"
	$(RUN)/python -m tests.e2e -m "not long" $(ARGS)

e2e-long: setup ## the long ones of them
	$(RUN)/python -m tests.e2e -m long $(ARGS)

e2e-moves: setup ## on it a ring is scaled, restarted, upgraded, drained again and again under load, by hand: make e2e-moves N=10 [KILLS=1] [ONLY=scale,restart,upgrade,handover,drain] [SEED=7] [RECORD=runs.jsonl]
	$(RUN)/python -m tests.e2e.trial --repeat $(or $(N),10) $(if $(KILLS),--kills) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED)) $(if $(RECORD),--record $(RECORD))

sim: setup ## seeded simulation: make sim SEED=17, or SEEDS=100000 FROM=1 [JOBS=2]; failures print how to replay them
	$(RUN)/python -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),200) --first $(or $(FROM),1) --jobs $(or $(JOBS),1))

plants: setup ## mistakes planted into a copy of the source, and the first seed that notices each (minutes)
	$(RUN)/python -m tests.sim.plants

kills: setup ## SIGKILL at random under load, by hand: make kills KILLS=300
	$(RUN)/python -m tests.integration.kills --kills $(or $(KILLS),300)

moves: setup ## slots move under load, by hand: make moves N=10 [KILLS=1] [ONLY=scale,mind,pin,handover,inplace,crash] [SEED=7]
	$(RUN)/python -m tests.integration.moves --repeat $(or $(N),10) $(if $(KILLS),--kills) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

fuzz: setup ## malformed frames and requests at every entrance, by hand: make fuzz N=100000 [SEED=7]
	$(RUN)/python -m tests.fuzz.run --count $(or $(N),100000) $(if $(SEED),--seed $(SEED))

faults: setup ## bad networks, frozen processes, exhausted machines, jumping clocks, three boots explored: the long tests, by hand (as root: all)
	$(RUN)/pytest -q -m "long and not e2e" tests

soak: setup ## moderate load, kills and pauses for long, by hand: make soak MINUTES=60 [SEED=7]
	$(RUN)/python -m tests.integration.soak --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

bench: setup ## everything that `fleetlm bench` measures, briefly: end to end closed and open loop, fan-out, idle, replay, boot
	$(RUN)/python -m tests.bench.lot

bench-check: setup ## ratios to Redis measured now against the stored ones (needs bench-peers-setup); status 1: something got worse
	$(RUN)/python -m tests.bench.check

NATS_VERSION := v2.15.2

bench-peers-setup: ## what bench-peers needs: redis-server and postgresql from Debian (root), nats-server by Go (1.25 or newer)
	apt-get install --yes --no-install-recommends redis-server postgresql
	GOBIN=$(CURDIR)/.cache/peers go install github.com/nats-io/nats-server/v2@$(NATS_VERSION)

bench-peers: setup ## durable appends beside Redis, PostgreSQL and NATS, interleaved; ROUNDS=5
	$(RUN)/python -m tests.bench.peers --rounds $(or $(ROUNDS),5)

docs: setup ## write docs/kubernetes/reference.md anew from the schemas in crds/
	$(RUN)/python -m tests.support.crdreference

images: setup ## container images (Docker, or buildah and debootstrap with root), saved as one archive below ~/.cache/fleetlm
	$(RUN)/python -m tests.cluster.images

cluster: setup ## a real Kubernetes of three nodes on this machine without Docker; needs root and, the first time, Go 1.26 and minutes (CLUSTER=kind: by kind, with Docker)
	$(RUN)/python -m tests.cluster up

cluster-down: setup ## remove it, or what a dead run left of one
	$(RUN)/python -m tests.cluster down

up: setup ## three shards, a gateway and a controller on this machine; Ctrl-C stops them
	$(RUN)/fleetlm up

clean: ## remove the environment and caches (never data)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
