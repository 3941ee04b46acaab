# Every command a person types; `make help` lists them.
# A value that a person gives is text: make must not expand $(...) in it, and the shell must not read it as code. So each one
# is taken as it stands and exported, and recipes name the shell's variable, quoted: "$$SOURCE". This comes before any
# $(shell ...), since make expands the variables of its command line for each of those from version 4.4 on.
GIVEN := AS_OF BASE BASE_IMAGE CLUSTER COMMIT CUSTOMER DATASET EVERY FROM HORIZON IMAGE INPUT JOB METRICS_PORT MODEL_VERSION \
	OUTPUT PORT PROFILE PYTHON REGISTRY REQUESTS_MIN RUN SHARE SOURCE TAG TO
define take
override $(1) := $$(value $(1))
export $(1)
endef
$(foreach name,$(GIVEN),$(if $(value $(name)),$(eval $(call take,$(name)))))
# Kubernetes would expand $(...) in an id as well, unless each $ is doubled
override CUSTOMER := $(subst $$,$$$$,$(CUSTOMER))
BIN := .venv/bin
# defaults, for the shell to read as it reads what is given
# another data set than that of params.yaml: in its workspace
of = $(if $(DATASET), --dataset="$$DATASET")
commit = $${COMMIT:-$$(git rev-parse --short=12 HEAD)}
tag = $${TAG:-$(commit)}
job = $${JOB:-monitor}
# the newest of those that the lock is resolved for; tried, since a name may be a shim or lack what makes an environment
python = $${PYTHON:-$$(for one in python3.13 python3.12 python3.11; do $$one -c 'import ensurepip, venv' 2>/dev/null && command -v $$one && break; done)}
registry = $${REGISTRY:-registry.example.com}
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# the extras that the environment of a clone has: all but drivers of databases that nothing here connects to
locked = all boost cluster dev excel kafka postgres redis s3 serving wandb
# what an image installs: some of the lock, in the same versions
subset = $(uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --constraint requirements.lock
build_args = --build-arg VERSION=$(VERSION) --build-arg COMMIT="$(commit)"$(if $(BASE_IMAGE), --build-arg PYTHON="$$BASE_IMAGE")
# a Job in another image than the one that is deployed, its pods on Kubeflow too; and what release-start and erase are told
changed = --dry-run=client --output=json \
	$(if $(IMAGE),| kubectl set image --local --filename=- --output=json '*'="$$IMAGE") \
	| kubectl set env --local --filename=- --output=json $(if $(IMAGE),CLOSEDLOOP_RETRAINING__BASE_IMAGE="$$IMAGE") \
		$(if $(MODEL_VERSION),MODEL_VERSION="$$MODEL_VERSION") $(if $(CUSTOMER),CUSTOMER="$$CUSTOMER") \
	| kubectl create --namespace closedloop --filename=-
of_job = kubectl get job "$(job)-$$RUN" --namespace closedloop --output=jsonpath
of_pods = kubectl get pods --namespace closedloop --selector=job-name="$(job)-$$RUN" --sort-by=.metadata.creationTimestamp --output=name
of_pod = kubectl get $$pod --namespace closedloop --output=jsonpath
waiting = {.status.conditions[?(@.type=="PodScheduled")].message} {.status.containerStatuses[*].state.waiting.reason} \
	{.status.containerStatuses[*].state.waiting.message} (it requests {.spec.containers[*].resources.requests})
# Until the Job has ended: why a pod has not started, each reason once, then its log, once. Where one fails, there may be
# another. The log of a pod that no node has yet ends at once, with status 0: it is asked for only after the pod has started.
define follow_job
deadline=$$($(of_job)='{.spec.activeDeadlineSeconds}') || exit 1; \
last=$$(($$(date +%s) + deadline + 300)); told=; waits=; \
while :; do \
	ended=$$($(of_job)='{.status.conditions[?(@.status=="True")].type}'); \
	for pod in $$($(of_pods)); do \
		case "$$told" in *$$pod*) continue;; esac; \
		if test "$$($(of_pod)='{.status.phase}')" = Pending; then \
			why="$$pod waits: $$($(of_pod)='$(waiting)')"; \
			test "$$why" = "$$waits" || echo "$$why"; waits=$$why; \
		else \
			kubectl logs --namespace closedloop --follow $$pod && told="$$told $$pod"; \
		fi; \
	done; \
	case "$$ended" in *Complete*|*Failed*) break;; esac; \
	test $$(date +%s) -lt $$last || break; \
	sleep 5; \
done
endef
# what the last pod ended with, for people and for the steps of a workflow that come after; make's own status is always 2
define tell_end
test -z "$$pod" || $(of_pod)='status={$(ended).exitCode}{"\n"}result={$(ended).message}{"\n"}' \
	| tee -a "$${GITHUB_OUTPUT:-/dev/null}"; \
case "$$ended" in *Complete*) exit 0;; esac; \
why=$$($(of_job)='{.status.conditions[?(@.type=="Failed")].reason}: {.status.conditions[?(@.type=="Failed")].message}'); \
echo "job $(job)-$$RUN: $$why"; \
case "$$why" in DeadlineExceeded*) echo "its deadline takes the pod along: there is no status";; ": ") echo "no end of it is known";; esac; \
exit 1
endef
ended = .status.containerStatuses[*].state.terminated
# how a person calls what a recipe calls: our messages name commands that work without an activated environment
export CLOSEDLOOP_PROGRAM ?= $(BIN)/closedloop
# a clock on the terminal while something takes long; it ends with the shell, with the status of the command before
define start_clock
clock=; if test -t 2; then began=$$(date +%s); while sleep 1 && kill -0 $$$$ 2>/dev/null; do \
	seconds=$$(($$(date +%s) - began)); printf '   %d:%02d of about 1:30\r' $$((seconds / 60)) $$((seconds % 60)) >&2; \
done & clock=$$!; trap 'kill $$clock' INT TERM; fi
endef
end_clock = status=$$?; test -z "$$clock" || { kill $$clock; printf '\r\033[K' >&2; }; exit $$status
export PATH := $(CURDIR)/$(BIN):$(PATH)
# our programs end with this make, also where it is killed or a shell stands between
export CLOSEDLOOP_STARTED_BY := $(shell echo $$PPID)
export UV_SYSTEM_CERTS ?= true
# uv does not read pip's configuration: hand the index (a mirror) on that pip is told to use
uv = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}" $(BIN)/uv
export DVC_NO_ANALYTICS = true
export MLFLOW_DISABLE_TELEMETRY = true
export GX_ANALYTICS_ENABLED = false

.DEFAULT_GOAL := help
.PHONY: help install install-spark run demo loop ui serve score monitor backtest status plots test test-all test-long check format bench soak soak-hostile soak-serving pipeline manifests scan workflows images push-images registry-login cluster-login data-remote metrics-diff cluster-job rooms options lock release-check clean

help:  ## list the commands
	@awk -F ':.*## +' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {line = sprintf("  make %-14s", $$1); count = split($$2, words, " "); \
		for (i = 1; i <= count; i++) {if (length(line " " words[i]) > 80) {print line; line = sprintf("%21s", "")} line = line " " words[i]} \
		print line}' Makefile

##@ Train, serve and watch

install: .venv/installed  ## make .venv from the hash-locked requirements

.venv/installed: requirements.lock pyproject.toml
	@case "$$PWD" in *%*) echo "$$PWD: MLflow cannot run from an environment with % in its path: rename the folder"; exit 1;; esac
	@command -v "$(python)" >/dev/null || { echo "Python 3.11, 3.12 or 3.13 is needed (PYTHON=path/to/python3.13)"; exit 1; }
	@echo "Installing the locked environment into .venv: 2.4 GB, about a minute ..."
	@$(start_clock); ( \
	test -x $(BIN)/python || "$(python)" -m venv .venv || exit; \
	sed -n '/^uv==/,/# via/p' requirements.lock > .venv/uv.txt || exit; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt || exit; \
	$(uv) pip sync --quiet --require-hashes requirements.lock || exit; \
	$(uv) pip install --quiet --no-deps --editable . ); $(end_clock)
	@touch $@

run: install  ## the whole training workflow (DATASET=name SOURCE=path AS_OF=date for other data)
	@closedloop run $(if $(DATASET),--dataset="$$DATASET") $(if $(SOURCE),--source="$$SOURCE") $(if $(AS_OF),--as-of="$$AS_OF")

loop: install  ## the whole loop over the data's history, beside a frozen model (DATASET=name SOURCE=path FROM=date TO=date EVERY=days HORIZON=days SHARE=part REQUESTS_MIN=number VERBOSE=1)
	@closedloop$(if $(VERBOSE), -v) replay $(if $(DATASET),--dataset="$$DATASET") $(if $(SOURCE),--source="$$SOURCE") $(if $(FROM),--from="$$FROM") $(if $(TO),--to="$$TO") $(if $(EVERY),--every="$$EVERY") $(if $(HORIZON),--horizon-days="$$HORIZON") $(if $(SHARE),--share="$$SHARE") $(if $(REQUESTS_MIN),--requests-min="$$REQUESTS_MIN")

ui: install  ## the MLflow UI on http://127.0.0.1:5000 (DATASET=name PORT=...)
	@closedloop$(of) ui $(if $(PORT),--port="$$PORT")

demo: install  ## half a minute: the champion serves a day of requests and is checked (DATASET=name)
	@closedloop$(of) demo

serve: install  ## the HTTP service on http://127.0.0.1:3000, metrics on :8001 (DATASET=name PORT=... METRICS_PORT=...)
	@closedloop$(of) serve $(if $(PORT),--port="$$PORT") $(if $(METRICS_PORT),--metrics-port="$$METRICS_PORT")

score: install  ## predictions for a file: INPUT=customers.csv OUTPUT=scores.csv (DATASET=name)
	@closedloop$(of) score --input="$$INPUT" --output="$$OUTPUT"

monitor: install  ## one check of the model: AS_OF=date (DATASET=name)
	@closedloop$(of) monitor --as-of="$$AS_OF"

backtest: install  ## which retraining policy pays on the data's own history (DATASET=name FROM=date EVERY=days HORIZON=days)
	@closedloop$(of) backtest $(if $(FROM),--from="$$FROM") $(if $(EVERY),--every="$$EVERY") $(if $(HORIZON),--horizon-days="$$HORIZON")

status: install  ## how the loop stands: what serves, how it does, what comes next (DATASET=name)
	@closedloop$(of) status

plots: install  ## DVC's plots as a page that opens offline (DATASET=name)
	@cd "./$${DATASET:+workspaces/$$DATASET}" && closedloop plots-template && dvc plots show

##@ Test and measure

test: install  ## all tests that need nothing but this environment
	@pytest -n 2 --dist loadfile -m "not thorough"

test-all: install  ## those with services, browsers, kills and (CLOSEDLOOP_REAL_DATA names them) real data too
	@pytest -n 2 --dist loadfile

test-long: install  ## the longest of those alone: a minute without each service, a release by the pipeline's workflow, a newer Python
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

soak-hostile: install  ## five minutes of hostile clients beside honest ones: memory, /health, answers
	@python -m tests.soak.hostile

soak-serving: install  ## ten minutes of right and wrong requests: memory, log, store; then 60 s without PostgreSQL
	@python -m tests.soak.serving
	@CLOSEDLOOP_OUTAGE_SECONDS=60 pytest -q -rP tests/e2e/test_outages.py -k store_that_is_away

##@ Deploy

pipeline: install  ## the retraining pipeline as YAML for Kubeflow Pipelines: artifacts/retrain.yaml
	@closedloop pipeline --output artifacts/retrain.yaml

manifests: install  ## both overlays as they would be applied: artifacts/k8s-*.yaml
	@mkdir -p artifacts
	kubectl kustomize k8s/overlays/local > artifacts/k8s-local.yaml
	kubectl kustomize k8s/overlays/production > artifacts/k8s-production.yaml

scan: manifests  ## checkov on both overlays; it has an environment of its own, since its pins are not ours
	@test -x .venv/checkov/bin/checkov || "$(python)" -m venv .venv/checkov
	@$(uv) pip sync --quiet --python .venv/checkov/bin/python --require-hashes k8s/checkov.lock
	.venv/checkov/bin/checkov --config-file k8s/checkov.yaml --file artifacts/k8s-local.yaml artifacts/k8s-production.yaml

workflows: install  ## GitHub's workflows against their schema, and what zizmor finds in them
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	zizmor --offline --no-progress --quiet .github/workflows

images: install  ## both images, labelled with version and commit (TAG=vN.N.N, else the commit; BASE_IMAGE=NAME@sha256:...)
	@test -n "$(commit)" || { echo "No Git here: say which commit it is (make images COMMIT=...)"; exit 1; }
	docker build --target serving $(build_args) --tag closedloop-serving:"$(tag)" .
	docker build --target jobs $(build_args) --tag closedloop-jobs:"$(tag)" .

push-images:  ## to REGISTRY, under the same tag
	docker tag closedloop-serving:"$(tag)" "$(registry)/closedloop-serving:$(tag)"
	docker tag closedloop-jobs:"$(tag)" "$(registry)/closedloop-jobs:$(tag)"
	docker push "$(registry)/closedloop-serving:$(tag)"
	docker push "$(registry)/closedloop-jobs:$(tag)"

registry-login:  ## to REGISTRY, with the cloud's short-lived credentials
	aws ecr get-login-password | docker login --username AWS --password-stdin "$(registry)"

cluster-login:  ## kubectl to CLUSTER, with the same
	aws eks update-kubeconfig --name "$${CLUSTER:-closedloop}"

data-remote: install  ## tell DVC, on this machine, where PROFILE keeps data (data.remote)
	@dvc remote add --quiet --local --force --default "$${PROFILE:-production}" "$$(python -c 'import sys; from closedloop.config.settings import load_settings; print(load_settings(sys.argv[1]).data.remote)' "$${PROFILE:-production}")"

metrics-diff: install  ## how this commit's figures differ from the main branch's: artifacts/metrics-diff.md (BASE=...)
	@mkdir -p artifacts
	dvc metrics diff --md "$${BASE:-origin/main}" > artifacts/metrics-diff.md

cluster-job: export RUN := $(or $(RUN),$(shell date -u +%Y%m%d-%H%M%S))
cluster-job:  ## run a command of k8s/base/jobs in the cluster and wait for its end (JOB=monitor, RUN=id, IMAGE=name, MODEL_VERSION=number, CUSTOMER=id)
	kubectl create job --namespace closedloop --from=cronjob/closedloop-"$(job)" "$(job)-$$RUN" $(if $(IMAGE)$(MODEL_VERSION)$(CUSTOMER),$(changed))
	@$(follow_job); $(tell_end)

##@ Maintain

rooms: install  ## draw the rooms of the package into docs/architecture.md
	@python docs/rooms.py

options: install  ## write every option and key, with its default, into docs/options.md
	@python docs/options.py

install-spark: install  ## add PySpark (430 MB) to the environment, for engine.kind spark
	@$(uv) pip install --quiet --require-hashes -r spark.lock

lock: install  ## resolve the lock file again
	$(uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url $(foreach extra,$(locked),--extra $(extra)) --no-header pyproject.toml -o requirements.lock
	@printf 'hatchling\nuv\n' > .venv/build.in
	$(subset) .venv/build.in -o docker/build.lock
	$(subset) --extra all --extra cluster --extra kafka --extra postgres --extra redis --extra s3 pyproject.toml -o docker/jobs.lock
	$(subset) --extra spark pyproject.toml -o spark.lock
	@echo checkov > .venv/checkov.in
	$(uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header .venv/checkov.in -o k8s/checkov.lock
	@python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['serving'], sep='\n')" > .venv/serving.in
	$(subset) .venv/serving.in -o docker/serving.lock

release-check: install  ## build sdist and wheel, and run levels 1 to 3 with it in fresh environments
	@pytest tests/e2e/test_levels.py

clean:  ## delete results and stores; the environment stays
	rm -rf data metrics models reports state workspaces artifacts mlflow.db dvc.lock .dvc/cache .dvc/tmp
