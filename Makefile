# Every command a person types; `make help` lists them.
# An id comes from outside, and may hold $(...): make must not expand it, and the recipe has the shell read it from the
# environment. Kubernetes would expand it as well, unless each $ is doubled. Before any $(shell ...): from its version 4.4 on
# make expands variables of its command line for each.
override CUSTOMER := $(subst $$,$$$$,$(value CUSTOMER))
export CUSTOMER
PYTHON ?= python3.11
BIN := .venv/bin
DATASET ?=
SOURCE ?=
AS_OF ?=
PORT ?= 5000
JOB ?= monitor
IMAGE ?=
MODEL_VERSION ?=
BASE_IMAGE ?=
PROFILE ?= production
CLUSTER ?= closedloop
BASE ?= origin/main
RUN := $(or $(RUN),$(shell date -u +%Y%m%d-%H%M%S))
COMMIT ?= $(shell git rev-parse --short=12 HEAD)
TAG ?= $(COMMIT)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REGISTRY ?= registry.example.com
# what an image installs: some of the lock, in the same versions
subset = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --constraint requirements.lock
build_args = --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT)$(if $(BASE_IMAGE), --build-arg PYTHON=$(BASE_IMAGE))
# a Job in another image than the one that is deployed, its pods on Kubeflow too; and what release-start and erase are told
changed = --dry-run=client --output=json \
	$(if $(IMAGE),| kubectl set image --local --filename=- --output=json '*=$(IMAGE)') \
	| kubectl set env --local --filename=- --output=json $(if $(IMAGE),'CLOSEDLOOP_RETRAINING__BASE_IMAGE=$(IMAGE)') \
		$(if $(MODEL_VERSION),'MODEL_VERSION=$(MODEL_VERSION)') $(if $(CUSTOMER),"CUSTOMER=$$CUSTOMER") \
	| kubectl create --namespace closedloop --filename=-
of_job = kubectl get job $(JOB)-$(RUN) --namespace closedloop --output=jsonpath
of_pods = kubectl get pods --namespace closedloop --selector=job-name=$(JOB)-$(RUN) --sort-by=.metadata.creationTimestamp --output=name
# until the Job has ended, the log of each of its pods once: where one fails, there may be another
define follow_job
deadline=$$($(of_job)='{.spec.activeDeadlineSeconds}') || exit 1; \
last=$$(($$(date +%s) + deadline + 300)); told=; \
while :; do \
	ended=$$($(of_job)='{.status.conditions[?(@.status=="True")].type}'); \
	for pod in $$($(of_pods)); do \
		case "$$told" in *$$pod*) ;; *) kubectl logs --namespace closedloop --follow $$pod && told="$$told $$pod";; esac; \
	done; \
	case "$$ended" in *Complete*|*Failed*) break;; esac; \
	test $$(date +%s) -lt $$last || break; \
	sleep 5; \
done
endef
# what the last pod ended with, for people and for the steps of a workflow that come after; make's own status is always 2
define tell_end
test -z "$$pod" || kubectl get $$pod --namespace closedloop --output=jsonpath='status={$(ended).exitCode}{"\n"}result={$(ended).message}{"\n"}' \
	| tee -a "$${GITHUB_OUTPUT:-/dev/null}"; \
case "$$ended" in *Complete*) exit 0;; esac; \
why=$$($(of_job)='{.status.conditions[?(@.type=="Failed")].reason}: {.status.conditions[?(@.type=="Failed")].message}'); \
echo "job $(JOB)-$(RUN): $$why"; \
case "$$why" in DeadlineExceeded*) echo "its deadline takes the pod along: there is no status";; ": ") echo "no end of it is known";; esac; \
exit 1
endef
ended = .status.containerStatuses[*].state.terminated
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_SYSTEM_CERTS ?= true
export DVC_NO_ANALYTICS = true
export MLFLOW_DISABLE_TELEMETRY = true
export GX_ANALYTICS_ENABLED = false

.DEFAULT_GOAL := help
.PHONY: help install run loop ui serve status plots test test-all test-long check format bench soak soak-serving pipeline manifests scan workflows images push-images registry-login cluster-login data-remote metrics-diff cluster-job lock clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

install: .venv/installed  ## make .venv from the hash-locked requirements

.venv/installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed (PYTHON=path/to/python3.11)"; exit 1; }
	@echo "Installing the locked environment into .venv ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/# via/p' requirements.lock > .venv/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	@$(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

run: install  ## the whole training workflow (DATASET=name SOURCE=path AS_OF=date for other data)
	@closedloop run $(if $(DATASET),--dataset '$(DATASET)') $(if $(SOURCE),--source '$(SOURCE)') $(if $(AS_OF),--as-of '$(AS_OF)')

loop: install  ## the whole loop over the data's history, beside a frozen model (DATASET=name SOURCE=path FROM=date TO=date EVERY=days HORIZON=days)
	@closedloop replay $(if $(DATASET),--dataset '$(DATASET)') $(if $(SOURCE),--source '$(SOURCE)') $(if $(FROM),--from '$(FROM)') $(if $(TO),--to '$(TO)') $(if $(EVERY),--every '$(EVERY)') $(if $(HORIZON),--horizon-days '$(HORIZON)')

ui: install  ## the MLflow UI on http://127.0.0.1:5000 (PORT=...)
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

serve: install  ## the HTTP service on http://127.0.0.1:3000, metrics on :8001
	@closedloop serve

status: install  ## how the loop stands: what serves, how it does, what comes next
	@closedloop status

plots: install  ## DVC's plots as a page that opens offline
	@closedloop plots-template && dvc plots show

test: install  ## all tests that need nothing but this environment
	@pytest -n 2 --dist loadfile -m "not thorough"

test-all: install  ## those with services, browsers, kills and (CLOSEDLOOP_REAL_DATA names them) real data too
	@pytest -n 2 --dist loadfile

test-long: install  ## the longest of those alone: a minute without each service, a release by the pipeline's workflow
	@pytest -n 2 --dist loadfile -m long

check: install  ## lint, types, import contract, docs
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	pytest -q tests/docs

format: install  ## let ruff rewrite the layout
	ruff check --fix .
	ruff format .

bench: install  ## every benchmark, each with its targets (takes long)
	@for file in benchmarks/*.py; do echo "== $$file"; python $$file || exit 1; done

soak: install  ## 100,000 events through the Kafka worker, with kills and rebalances
	@python -m tests.soak.stream

soak-serving: install  ## ten minutes of right and wrong requests: memory, log, store; then 60 s without PostgreSQL
	@python -m tests.soak.serving
	@CLOSEDLOOP_OUTAGE_SECONDS=60 pytest -q -rP tests/e2e/test_outages.py -k store_that_is_away

pipeline: install  ## the retraining pipeline as YAML for Kubeflow Pipelines: artifacts/retrain.yaml
	@closedloop pipeline --output artifacts/retrain.yaml

manifests: install  ## both overlays as they would be applied: artifacts/k8s-*.yaml
	@mkdir -p artifacts
	kubectl kustomize k8s/overlays/local > artifacts/k8s-local.yaml
	kubectl kustomize k8s/overlays/production > artifacts/k8s-production.yaml

scan: manifests  ## checkov on both overlays; it has an environment of its own, since its pins are not ours
	@test -x .venv/checkov/bin/checkov || $(PYTHON) -m venv .venv/checkov
	@uv pip sync --quiet --python .venv/checkov/bin/python --require-hashes k8s/checkov.lock
	.venv/checkov/bin/checkov --config-file k8s/checkov.yaml --file artifacts/k8s-local.yaml artifacts/k8s-production.yaml

workflows: install  ## GitHub's workflows against their schema, and what zizmor finds in them
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	zizmor --offline --no-progress --quiet .github/workflows

images: install  ## both images, labelled with version and commit (TAG=vN.N.N, else the commit; BASE_IMAGE=NAME@sha256:...)
	docker build --target serving $(build_args) --tag closedloop-serving:$(TAG) .
	docker build --target jobs $(build_args) --tag closedloop-jobs:$(TAG) .

push-images:  ## to REGISTRY, under the same tag
	docker tag closedloop-serving:$(TAG) $(REGISTRY)/closedloop-serving:$(TAG)
	docker tag closedloop-jobs:$(TAG) $(REGISTRY)/closedloop-jobs:$(TAG)
	docker push $(REGISTRY)/closedloop-serving:$(TAG)
	docker push $(REGISTRY)/closedloop-jobs:$(TAG)

registry-login:  ## to REGISTRY, with the cloud's short-lived credentials
	aws ecr get-login-password | docker login --username AWS --password-stdin $(REGISTRY)

cluster-login:  ## kubectl to CLUSTER, with the same
	aws eks update-kubeconfig --name $(CLUSTER)

data-remote: install  ## tell DVC, on this machine, where PROFILE keeps data (data.remote)
	@dvc remote add --quiet --local --force --default $(PROFILE) "$$(python -c 'import sys; from closedloop.settings import load_settings; print(load_settings(sys.argv[1]).data.remote)' $(PROFILE))"

metrics-diff: install  ## how this commit's figures differ from the main branch's: artifacts/metrics-diff.md (BASE=...)
	@mkdir -p artifacts
	dvc metrics diff --md $(BASE) > artifacts/metrics-diff.md

cluster-job:  ## run a command of k8s/base/jobs in the cluster and wait for its end (JOB=monitor, RUN=id, IMAGE=name, MODEL_VERSION=number, CUSTOMER=id)
	kubectl create job --namespace closedloop --from=cronjob/closedloop-$(JOB) $(JOB)-$(RUN) $(if $(IMAGE)$(MODEL_VERSION)$(CUSTOMER),$(changed))
	@$(follow_job); $(tell_end)

lock: install  ## resolve the lock file again
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --all-extras --no-header pyproject.toml -o requirements.lock
	@printf 'hatchling\nuv\n' > .venv/build.in
	$(subset) .venv/build.in -o docker/build.lock
	$(subset) --extra cluster --extra kafka --extra postgres --extra redis --extra s3 pyproject.toml -o docker/jobs.lock
	@echo checkov > .venv/checkov.in
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header .venv/checkov.in -o k8s/checkov.lock
	@python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['serving'], sep='\n')" > .venv/serving.in
	$(subset) .venv/serving.in -o docker/serving.lock

clean:  ## delete results and stores; the environment stays
	rm -rf data metrics models reports state workspaces artifacts mlflow.db dvc.lock .dvc/cache .dvc/tmp
