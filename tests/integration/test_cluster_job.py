"""`make cluster-job`, and what a workflow makes of how the Job ended."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
import yaml

from tests.github import Runner
from tests.integration.test_manifests import read_overlay
from tests.integration.test_workflows import AFTERWARDS_SECONDS, PROGRAMS
from tests.manifests import ROOT, render
from tests.production import commit
from tests.scripts import PYTHON_HEAD

JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "release-check-7"},
    "spec": {
        "activeDeadlineSeconds": 3600,
        "template": {"spec": {"containers": [{"name": "one", "image": "deployed:1", "command": ["sh"]}]}},
    },
}
WORKFLOW = ROOT / ".github/workflows/mlops-pipeline.yml"
REQUESTS = {"cpu": "500m", "memory": "2Gi"}
BOX = {"name": "one", "resources": {"requests": REQUESTS}}
POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": {"containers": [BOX]}}
# A Job told in moments, each a question for its conditions later; what it is asked for shows the real kubectl.
KUBECTL = f"""{PYTHON_HEAD}import json, pathlib, subprocess, sys
folder, words = pathlib.Path("FOLDER"), sys.argv[1:]
with (folder / "calls").open("a") as calls:
    print(*words, file=calls)
asked = (folder / "calls").read_text()
told = json.loads((folder / "moments.json").read_text())
moments = next(one for name, one in told.items() if any(name in word for word in words))
now = moments[min(max(asked.count("@.status"), 1), len(moments)) - 1] if moments else None
def ask(*options, resource=None):
    text = sys.stdin.read() if resource is None else json.dumps(resource)
    sys.exit(subprocess.run(["{PROGRAMS}/kubectl", *options], input=text, text=True).returncode)
def show(resource):
    ask("label", "--local", "--filename=-", "a=b", words[-1], resource=resource)
match words[:2]:
    case ["create", "job"] if not moments:
        sys.exit("Error from server (NotFound): cronjobs.batch not found")
    case ["create", "job"] if "--dry-run=client" in words:
        print(json.dumps({JOB}))
    case ["create", "--namespace"]:
        (folder / "created").write_text(text := sys.stdin.read())
        sys.exit(not text)
    case ["set", _]:
        ask(*words)
    case ["get", "job"]:
        show({JOB} | dict(status=now["job"]))
    case ["get", "pods"]:
        print(*(f"pod/{{name}}" for name in now["pods"]), sep="\\n")
    case ["get", pod]:
        if pod.removeprefix("pod/") not in now["pods"]:
            sys.exit("Error from server (NotFound): pods not found")
        show({POD} | dict(status=now["pods"][pod.removeprefix("pod/")]))
    case ["logs", _]:
        pod = now["pods"][words[-1].removeprefix("pod/")]
        if pod.get("phase") == "Pending" and not pod.get("containerStatuses"):
            sys.exit()  # the real one tells nothing of a pod that has no node, and has no complaint
        if pod.get("phase") == "Pending":
            sys.exit("Error from server (BadRequest): container is waiting to start: ContainerCreating")
        print("the log of", words[-1])
"""


def end(*kinds, **said):
    """A Job's status."""
    return {"conditions": [{"type": kind, "status": "True", **said} for kind in kinds]}


def leave(status, message=""):
    """A pod's status once its container has ended."""
    box = {"name": "one", "state": {"terminated": {"exitCode": status, "message": message}}}
    return {"phase": "Failed" if status else "Succeeded", "containerStatuses": [box]}


NO_NODE = "0/1 nodes are available: 1 Insufficient cpu."
UNSCHEDULED = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_NODE}],
}
STARTING = {
    "phase": "Pending",
    "containerStatuses": [{"name": "one", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such"}}}],
}


COMPLETE = {"job": end("SuccessCriteriaMet", "Complete"), "pods": {"one": leave(0, "7\n")}}
FAILED = {"job": end("FailureTarget", "Failed", reason="BackoffLimitExceeded"), "pods": {"one": leave(2)}}


def put(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


def run_make(folder, moments, *options, **given):
    """`make cluster-job` on a Job that goes through these moments; its status, output, calls, and the steps' output."""
    put(folder, "kubectl", KUBECTL.replace("FOLDER", str(folder)))
    for name in ("sleep", "date"):  # five seconds are half an hour here
        put(
            folder,
            name,
            f"#!/bin/sh\necho {name} >> {folder}/calls\nexpr 1800 \\* $(grep -c ^sleep {folder}/calls)\n:\n",
        )
    (folder / "moments.json").write_text(json.dumps({"": moments}), encoding="utf-8")
    for name in ("calls", "said"):
        (folder / name).unlink(missing_ok=True)
    # make puts the environment's own programs first
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(CURDIR)/$(BIN):$(PATH)", f"{folder}:$(PATH)")
    (folder / "Makefile").write_text(makefile, encoding="utf-8")
    command = ["make", "--silent", "--directory", folder, "cluster-job", "JOB=release-check", "RUN=7", *options]
    environment = {**os.environ, "MAKEFLAGS": "", "GITHUB_OUTPUT": str(folder / "said"), **given}
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    calls = (folder / "calls").read_text(encoding="utf-8").splitlines()
    said = (folder / "said").read_text(encoding="utf-8").split() if (folder / "said").is_file() else []
    return ran.returncode, ran.stdout, calls, said


def test_a_workflows_job_runs_in_the_cluster_and_its_end_is_the_workflows(tmp_path):
    status, output, calls, said = run_make(tmp_path, [COMPLETE])
    assert (status, said) == (0, ["status=0", "result=7"])
    assert "the log of pod/one" in output
    assert calls[0] == "create job --namespace closedloop --from=cronjob/closedloop-release-check release-check-7"
    assert all("--namespace closedloop" in call for call in calls if call not in ("date", "sleep"))
    status, output, _, said = run_make(tmp_path, [FAILED])
    assert (status, said) == (2, ["status=2", "result="])
    assert "job release-check-7: BackoffLimitExceeded" in output


def test_a_job_is_waited_for_from_before_it_has_a_pod(tmp_path):
    making = [{"job": {}, "pods": {}}, {"job": {}, "pods": {"one": STARTING}}]
    status, output, calls, _ = run_make(tmp_path, [*making, COMPLETE])
    assert status == 0
    assert calls.count("sleep") == 2
    assert output.count("the log of pod/one") == 1


def test_a_pod_that_no_node_takes_is_told_with_its_reason_and_its_log_once_it_has_run(tmp_path):
    unscheduled, starting = ({"job": {}, "pods": {"one": pod}} for pod in (UNSCHEDULED, STARTING))
    status, output, _, _ = run_make(tmp_path, [unscheduled, unscheduled, starting, COMPLETE])
    assert status == 0
    assert output.count(f"pod/one waits: {NO_NODE}") == 1
    assert json.dumps(REQUESTS, separators=(",", ":")) in output
    assert output.count("ImagePullBackOff no such") == 1
    assert output.count("the log of pod/one") == 1


def test_a_job_whose_second_try_succeeds_has_succeeded(tmp_path):
    first, second = leave(1), leave(0)
    moments = [{"job": {}, "pods": {"one": first}}, {"job": {}, "pods": {"one": first, "two": second}}]
    moments.append({"job": end("Complete"), "pods": {"one": first, "two": second}})
    status, output, _, said = run_make(tmp_path, moments)
    assert (status, said) == (0, ["status=0", "result="])
    assert re.findall("the log of (.*)", output) == ["pod/one", "pod/two"]


def test_a_job_that_its_deadline_ended_says_why_it_has_no_status(tmp_path):
    running = {"job": {}, "pods": {"one": leave(137)}}
    late = end("FailureTarget", "Failed", reason="DeadlineExceeded", message="longer than specified")
    status, output, _, said = run_make(tmp_path, [running, {"job": late, "pods": {}}])
    assert (status, said) == (2, [])
    assert "job release-check-7: DeadlineExceeded: longer than specified" in output
    assert "its deadline takes the pod along: there is no status" in output


def test_a_job_that_never_ends_is_given_up_soon_after_its_deadline(tmp_path):
    status, output, calls, said = run_make(tmp_path, [{"job": {}, "pods": {}}])
    assert (status, said) == (2, [])
    assert calls.count("sleep") == 3  # 3600 s are over after two; 300 s are the cluster's
    assert AFTERWARDS_SECONDS > 300
    assert "no end of it is known" in output


CHECKED = {0: (0, "none"), 2: (2, "rollback"), 3: (0, "none"), 1: (1, "none"), 137: (137, "none")}


@pytest.mark.parametrize("said", CHECKED)
def test_a_release_is_stopped_only_by_a_check_that_says_so(said, tmp_path):
    """The job of the workflow, with the Job's own command, on a cluster that has one pod."""
    (place := tmp_path / "repository").mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (place / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet", place], check=True)
    commit(place, "a project")
    (cron,) = (one for one in render("production") if one["metadata"]["name"] == "closedloop-release-check")
    (box,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "closedloop").write_text(f"#!/bin/sh\nexit {said}\n", encoding="utf-8")
    (tmp_path / "closedloop").chmod(0o755)
    ran = subprocess.run([*box["command"], *box["args"]], env={"PATH": f"{tmp_path}:/bin"}, check=False)
    kind = "Failed" if ran.returncode else "Complete"
    check = [{"job": end(kind), "pods": {"release-check-one": leave(ran.returncode)}}]
    moments = json.dumps({"release-check": check, "": [COMPLETE]})
    (tmp_path / "moments.json").write_text(moments, encoding="utf-8")
    programs = {"kubectl": KUBECTL.replace("FOLDER", str(tmp_path)), "aws": "#!/bin/sh\n"}
    runner = Runner(place, tmp_path / "runners", {}, {"CLUSTER": "closedloop"}, programs)
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    steps = runner.run_job("release", workflow["jobs"]["release"], needed={"needs.register.outputs.version": "12"})
    assert "MODEL_VERSION=12" in (tmp_path / "calls").read_text(encoding="utf-8")
    stopped = "rollback" if steps[-1].command == "make cluster-job JOB=release-stop" else "none"
    assert (ran.returncode, stopped) == CHECKED[said]
    assert any(step.status for step in steps) == (said not in (0, 3))  # undecided is no failure


@pytest.mark.parametrize("option", ["IMAGE=registry.example.com/closedloop-jobs:abc", "MODEL_VERSION=12"])
def test_a_job_is_what_is_asked_for_and_its_pods_on_kubeflow_run_its_image(option, tmp_path):
    assert run_make(tmp_path, [COMPLETE], option)[0] == 0
    made = json.loads((tmp_path / "created").read_text(encoding="utf-8"))
    (box,) = made["spec"]["template"]["spec"]["containers"]
    name, value = option.split("=")
    image, variable = (value, "CLOSEDLOOP_RETRAINING__BASE_IMAGE") if name == "IMAGE" else ("deployed:1", name)
    assert (box["image"], box["command"]) == (image, ["sh"])
    assert box["env"] == [{"name": variable, "value": value}]
    assert made["metadata"]["name"] == "release-check-7"
    assert run_make(tmp_path, [], option)[0] == 2  # there is no such CronJob


def expand(value, environment):
    """What Kubernetes makes of a variable's value: of $$ a $, of $(NAME) the variable of that name, if there is one."""
    return re.sub(
        r"\$(?:\$|\((.*?)\))", lambda found: environment.get(found[1], found[0]) if found[1] is not None else "$", value
    )


def run_erase(folder, environment):
    """The Job's own command beside a `closedloop` that keeps its arguments; its status, and those."""
    (cron,) = (one for one in read_overlay("production") if one["metadata"]["name"] == "closedloop-erase")
    (box,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    put(folder, "closedloop", '#!/bin/sh\nprintf "%s\\0" "$@" > arguments\n')
    environment = environment | {"PATH": f"{folder}:/usr/bin:/bin"}
    ran = subprocess.run([*box["command"], *box["args"]], cwd=folder, env=environment, check=False)
    said = (folder / "arguments").read_text(encoding="utf-8").split("\0") if (folder / "arguments").exists() else []
    return ran.returncode, said


CUSTOMERS = [
    "anna", "a; rm -rf /", "$(id)", "$(shell touch called)", "`touch called`", "$$", "$HOME", "$(POSTGRES)", "it's",
    'a"b', "a\\", "-a-", "--help", "a=b", "a #b", " a", "a\nb", "*", "größer",
]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("customer", CUSTOMERS)
def test_a_customers_id_is_a_value_and_no_word_of_make_a_shell_or_kubernetes(customer, tmp_path):
    status, output, _, _ = run_make(tmp_path, [COMPLETE], CUSTOMER=customer)
    assert status == 0, output
    made = json.loads((tmp_path / "created").read_text(encoding="utf-8"))
    (variable,) = made["spec"]["template"]["spec"]["containers"][0]["env"]
    told = {"POSTGRES": "a password", variable["name"]: expand(variable["value"], {"POSTGRES": "a password"})}
    assert run_erase(tmp_path, told) == (0, ["store", "erase", f"--customer-id={customer}", ""])
    assert not (tmp_path / "called").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("customer", ["a; rm -rf /", "$(id)", "$(shell touch called)", "$$", "it's", "a #b"])
def test_an_id_on_makes_command_line_is_not_expanded_either(customer, tmp_path):
    status, output, _, _ = run_make(tmp_path, [COMPLETE], f"CUSTOMER={customer}")
    assert status == 0, output
    made = json.loads((tmp_path / "created").read_text(encoding="utf-8"))
    (variable,) = made["spec"]["template"]["spec"]["containers"][0]["env"]
    assert expand(variable["value"], {}) == customer
    assert not (tmp_path / "called").exists()


def test_an_id_is_taken_as_it_is_before_make_starts_any_shell():
    """Newer versions of make than this machine's may give a shell the id as make expands it."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    used = [line for line in lines if not line.startswith("#")]
    first = next(number for number, line in enumerate(used) if "$(shell" in line)
    assert next(number for number, line in enumerate(used) if "$(eval $(call take," in line) < first


@pytest.mark.parametrize("told", [{}, {"CUSTOMER": ""}])
def test_nobody_is_erased_where_no_id_is_given(told, tmp_path):
    status, arguments = run_erase(tmp_path, told)
    assert (status != 0, arguments) == (True, [])


def test_no_version_is_released_where_none_was_registered(tmp_path):
    (step,) = (
        one
        for one in yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["release"]["steps"]
        if one.get("name") == "canary"
    )
    put(tmp_path, "make", "#!/bin/sh\ntouch called\n")
    environment = {"PATH": f"{tmp_path}:/bin", "MODEL_VERSION": ""}
    ran = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=False)
    assert ran.returncode != 0
    assert not (tmp_path / "called").exists()
