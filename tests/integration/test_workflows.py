"""GitHub's workflows: their schema, what zizmor says, and that every command in them exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.test_docs import list_commands
from tests.manifests import ROOT, render

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROGRAMS = Path(sys.executable).parent
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
UNSAFE = {
    "schema": ("timeout-minutes: 20", "timeout-minutes: soon"),
    "a tag instead of a commit": ("actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2", "a/b@v4"),
    "write access to everything": ("permissions:\n      contents: read", "permissions: write-all"),
    "text of strangers in a shell": ("run: make check", "run: echo ${{ github.event.pull_request.title }}"),
}


def check(file):
    schema = subprocess.run(
        [PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", file],
        capture_output=True,
        check=False,
    )
    lint = subprocess.run([PROGRAMS / "zizmor", "--offline", "--no-progress", file], capture_output=True, check=False)
    return schema.returncode + lint.returncode


@pytest.mark.thorough
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_workflow_fits_its_schema_and_is_safe(file):
    assert check(file) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("fault", UNSAFE)
def test_a_workflow_that_is_unsafe_is_found_out(fault, tmp_path):
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert UNSAFE[fault][0] in text
    (tmp_path / ".github/workflows").mkdir(parents=True)
    file = tmp_path / ".github/workflows/ci.yml"
    file.write_text(text.replace(*UNSAFE[fault]), encoding="utf-8")
    assert check(file) != 0


def read_jobs():
    for file in FILES:
        for name, job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].items():
            yield f"{file.name} {name}", job


def find_wrong_commands(line, scheduled):
    """What a step names that is not there: make targets, cluster jobs, commands of closedloop, programs."""
    words = [word for word in shlex.split(line) if word != "sudo" and not word.startswith("--preserve-env=")]
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        jobs = [word.removeprefix("JOB=") for word in words if word.startswith("JOB=")]
        return [word for word in targets if word not in TARGETS] + [job for job in jobs if job not in scheduled]
    if words[0].endswith("closedloop"):
        return [] if words[1] in {command.split()[0] for command in list_commands()} else [words[1]]
    known = words[0] in (".venv/bin/dvc", "gh") or (ROOT / words[0]).is_file()
    return [] if known else [words[0]]


def test_every_command_in_the_workflows_exists():
    scheduled = {
        one["metadata"]["name"].removeprefix("closedloop-") for one in render("production") if one["kind"] == "CronJob"
    }
    lines = [step["run"] for _, job in read_jobs() for step in job["steps"] if "run" in step]
    assert len(lines) > 15
    for line in lines:
        assert "\n" not in line
        assert find_wrong_commands(line, scheduled) == []
    assert find_wrong_commands("make chekc", scheduled) == ["chekc"]
    assert find_wrong_commands("make cluster-job JOB=gone", scheduled) == ["gone"]
    assert find_wrong_commands("closedloop trian", scheduled) == ["trian"]
    assert find_wrong_commands("curl x", scheduled) == ["curl"]


BEFORE = ("mlops-pipeline.yml train", "release.yml images")  # keep what the jobs that call gh fetch
# what runs the commands that mlops-pipeline.yml does not have: those tests/e2e/test_pipeline_workflow.py runs
RUN_BY = {
    "make check": ".ci/run",
    "make scan": ".ci/run",
    "make test": ".ci/run",
    "make workflows": "tests/integration/test_workflows.py",
    "gh pr": "tests/integration/test_workflows.py",
    "gh release": "tests/integration/test_workflows.py",
}


def list_targets(line):
    """What a step runs, without its options: one or more targets, or a program's command."""
    words = [word for word in shlex.split(line) if "=" not in word]
    return [f"make {word}" for word in words[1:]] if words[0] == "make" else [" ".join(words[:2])]


def test_every_command_in_the_workflows_is_run():
    piped = {
        target
        for name, job in read_jobs()
        for step in job["steps"]
        if name.startswith("mlops-pipeline.yml") and "comment" not in name and "run" in step
        for target in list_targets(step["run"])
    }
    for name, job in read_jobs():
        for line in [step["run"] for step in job["steps"] if "run" in step]:
            for target in list_targets(line):
                if target in piped or target == "sudo .ci/run":  # CI itself
                    continue
                assert target in RUN_BY, name
                assert target.split()[-1] in (ROOT / RUN_BY[target]).read_text(encoding="utf-8"), name


@pytest.mark.thorough
def test_make_workflows_finds_nothing():
    ran = subprocess.run(["make", "--silent", "workflows"], cwd=ROOT, env={**os.environ, "MAKEFLAGS": ""}, check=False)
    assert ran.returncode == 0


def test_gh_is_given_the_files_that_the_job_before_it_kept(tmp_path):
    """With a program called gh that looks for them: what GitHub does with it cannot be had."""
    said = {name: job for name, job in read_jobs() if name in ("mlops-pipeline.yml comment", "release.yml publish")}
    kept = {"mlops-pipeline.yml comment": ["artifacts/metrics-diff.md"]}
    kept["release.yml publish"] = ["sbom-jobs.json", "sbom-serving.json"]
    jobs = dict(read_jobs())
    texts = {name: yaml.safe_dump(jobs[before]) for name, before in zip(said, BEFORE, strict=True)}
    for number, (name, job) in enumerate(said.items()):
        place = tmp_path / str(number)
        for file in kept[name]:
            assert file in texts[name]
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).touch()
        (place / "gh").write_text('#!/bin/sh\necho "$@" > said\n', encoding="utf-8")
        (place / "gh").chmod(0o755)
        variables = {"GITHUB_REPOSITORY": "we/closedloop", "GITHUB_REF_NAME": "v1.2.3", "NUMBER": "17"}
        (line,) = [step["run"] for step in job["steps"] if "run" in step]
        environment = {**variables, "PATH": f"{place}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-e", "-c", line], cwd=place, env=environment, check=True)
        words = (place / "said").read_text(encoding="utf-8").split()
        assert ("17" in words, "v1.2.3" in words) == (name.endswith("comment"), name.endswith("publish"))
        assert words[words.index("--repo") + 1] == "we/closedloop"
        assert sorted(word for word in words if word.endswith((".md", ".json"))) == kept[name]


def test_the_workflows_identity_may_start_the_jobs_that_they_name_and_no_other():
    (role,) = (
        one for one in render("production") if (one["kind"], one["metadata"]["name"]) == ("Role", "closedloop-ci")
    )
    text = "".join(file.read_text(encoding="utf-8") for file in FILES)
    named = {f"closedloop-{name}" for name in re.findall(r"cluster-job JOB=([a-z-]+)", text)}
    assert set(role["rules"][0]["resourceNames"]) == named


OWN_BRANCH = "head.repo.full_name == github.repository"


def find_leaks(text):
    """Where a workflow gives what a fork must not have: a secret, an identity, a right to write."""
    workflow, leaks = yaml.safe_load(text), [word for word in ("secrets.", "pull_request_target") if word in text]
    if "pull_request" not in workflow[True]:  # YAML 1.1 takes `on` for a truth value
        return leaks

    def is_ours(job):  # a job that is skipped takes those that need it along
        condition = job.get("if", "")
        if "event_name != 'pull_request'" in condition or OWN_BRANCH in condition:
            return True
        return not condition and "needs" in job and is_ours(workflow["jobs"][job["needs"]])

    for name, job in workflow["jobs"].items():
        if is_ours(job):
            continue
        leaks += [
            f"{name}: {key}" for key, value in job["permissions"].items() if value == "write" and key != "id-token"
        ]
        leaks += [f"{name}: {step['uses']}" for step in job["steps"]
                  if "credentials" in step.get("uses", "") and OWN_BRANCH not in step.get("if", "")]  # fmt: skip
    return leaks


def test_no_pull_request_of_a_fork_gets_an_identity_or_a_secret():
    texts = {file.name: file.read_text(encoding="utf-8") for file in FILES}
    assert {name: found for name, text in texts.items() if (found := find_leaks(text))} == {}
    pipeline = texts["mlops-pipeline.yml"]
    open_to_all = pipeline.replace("if: github.event_name != 'pull_request'", "if: always()")
    assert {leak.split(":")[0] for leak in find_leaks(open_to_all)} == {"images", "register", "release"}
    assert find_leaks(pipeline.replace(f" && github.event.pull_request.{OWN_BRANCH}", "")) == ["comment: pull-requests"]
    assert find_leaks(pipeline.replace("vars.AWS_DATA_ROLE", "secrets.AWS_DATA_ROLE")) == ["secrets."]


def find_open_to_branches(text):
    """Jobs that touch production for a commit that is not on the main branch: started by hand there, or not at all."""
    workflow = yaml.safe_load(text)
    if workflow[True] == {"push": {"tags": ["v*"]}}:
        return []

    def is_mains(job):
        return "github.ref == 'refs/heads/main'" in job.get("if", "").split(" && ") or (
            "if" not in job and "needs" in job and is_mains(workflow["jobs"][job["needs"]])
        )

    return [
        name for name, job in workflow["jobs"].items() if job.get("environment") == "production" and not is_mains(job)
    ]


def test_production_is_touched_for_the_main_branch_alone():
    texts = {file.name: file.read_text(encoding="utf-8") for file in FILES}
    assert {name: found for name, text in texts.items() if (found := find_open_to_branches(text))} == {}
    everywhere = texts["mlops-pipeline.yml"].replace(" && github.ref == 'refs/heads/main'", "")
    assert find_open_to_branches(everywhere) == ["images", "register", "release"]


def find_excess(text):
    """Rights that a whole workflow has, jobs without a limit of their time, runs beside each other."""
    workflow = yaml.safe_load(text)
    found = [] if workflow.get("permissions") == {} else ["permissions"]
    if "group" not in workflow.get("concurrency", {}):
        found.append("concurrency")
    for name, job in workflow["jobs"].items():
        found += [f"{name}: {key}" for key in ("permissions", "timeout-minutes") if key not in job]
        logs_in = any("credentials" in step.get("uses", "") for step in job["steps"])
        if ("id-token" in job.get("permissions", {})) != logs_in:
            found.append(f"{name}: id-token")
        # what ends at the same production goes one after the other
        if any("cluster-job" in step.get("run", "") for step in job["steps"]) and job["environment"] != "production":
            found.append(f"{name}: environment")
        found += [f"{name}: {step['uses']}" for step in job["steps"]
                  if not re.search(r"@[0-9a-f]{40}$", step.get("uses", f"@{'0' * 40}"))]  # fmt: skip
    return found


def test_a_workflow_has_no_more_than_it_needs():
    texts = {file.name: file.read_text(encoding="utf-8") for file in FILES}
    assert {name: found for name, text in texts.items() if (found := find_excess(text))} == {}
    monitor = texts["monitor.yml"]
    for old, new, found in (
        ("permissions: {}", "permissions: read-all", "permissions"),
        ("concurrency:\n  group: monitor\n", "env:\n  GROUP: x\n", "concurrency"),
        ("    timeout-minutes: 345\n", "", "monitor: timeout-minutes"),
        ("      id-token: write\n", "", "monitor: id-token"),
        ("environment: production", "environment: any", "monitor: environment"),
        ("@11bd71901bbe5b1630ceea73d27597364c9af683", "@v4", "monitor: actions/checkout@v4"),
    ):
        assert old in monitor
        assert found in find_excess(monitor.replace(old, new)), found


def test_ci_builds_the_images_once_and_scans_each():
    (job,) = (job for name, job in read_jobs() if name == "ci.yml images")
    built = re.findall(r"--tag (closedloop-\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(built) == 2
    assert "strategy" not in job  # which would build all of them for each
    assert [step["with"]["image-ref"] for step in job["steps"] if "trivy" in step.get("uses", "")] == [
        f"{image}:ci" for image in built
    ]


AFTERWARDS_SECONDS, HOSTED_SECONDS = 6 * 60, 6 * 3600  # what `make cluster-job` waits besides; GitHub's limit of a job


def find_short_waits(job, deadlines):
    """What ends before the Jobs that this waits for must have: the workflow's job, or its login."""
    jobs = [found[1] for step in job["steps"] if (found := re.search("cluster-job JOB=([a-z-]+)", step.get("run", "")))]
    needed = sum(deadlines[name] + AFTERWARDS_SECONDS for name in jobs)
    logins = [step["with"] for step in job["steps"] if "configure-aws" in step.get("uses", "")]
    lasts = {"job": job["timeout-minutes"] * 60} | (
        {"login": logins[-1].get("role-duration-seconds", 3600)} if jobs else {}
    )
    return [name for name, seconds in lasts.items() if not needed <= seconds <= HOSTED_SECONDS]


def test_a_workflow_waits_and_is_logged_in_as_long_as_its_jobs_may_run():
    deadlines = {
        one["metadata"]["name"].removeprefix("closedloop-"): one["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
        for one in render("production")
        if one["kind"] == "CronJob"
    }
    for name, job in read_jobs():
        assert find_short_waits(job, deadlines) == [], name
    (job,) = (job for name, job in read_jobs() if "monitor" in name)
    assert find_short_waits(job, deadlines | {"monitor": 28800}) == ["job", "login"]
    login = next(step for step in job["steps"] if "configure-aws" in step.get("uses", ""))
    del login["with"]["role-duration-seconds"]
    assert find_short_waits(job, deadlines) == ["login"]


def test_github_monitors_when_the_cluster_does():
    (own,) = (one["spec"] for one in render("production") if one["metadata"]["name"] == "closedloop-monitor")
    text = (ROOT / ".github/workflows/monitor.yml").read_text(encoding="utf-8")
    assert re.findall('cron: "(.*)"', text) == [own["schedule"]] == ["0 9 * * *"]
