"""What images are made of: locked subsets of the one lock, and a compose file that fits its schema and the images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def read_pins(name: str) -> set[tuple[str, str]]:
    return {(found, version) for found, version in PIN.findall((ROOT / name).read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", ["docker/serving.lock", "docker/jobs.lock", "spark.lock"])
def test_an_image_installs_versions_of_the_one_lock_with_hashes(name: str) -> None:
    pins, text = read_pins(name), (ROOT / name).read_text(encoding="utf-8")
    assert pins
    extra = {"py4j", "pyspark"} if name == "spark.lock" else set()  # no newcomer pays for it
    assert {pin for pin in pins if pin[0] not in extra} <= read_pins("requirements.lock")
    assert extra <= {found for found, _ in pins}
    assert all("--hash=sha256:" in entry for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:])


def all_of(extras: dict[str, list[str]]) -> list[str]:
    """What the extra ``all`` stands for."""
    names = re.findall(r"[\w-]+", extras["all"][0].partition("[")[2])
    return [one for name in names for one in extras[name] if not one.startswith("closedloop")]


def test_each_image_has_what_is_declared_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        "docker/serving.lock": extras["serving"],
        "docker/jobs.lock": project["dependencies"]
        + all_of(extras)
        + extras["postgres"]
        + extras["s3"]
        + extras["kafka"],
    }
    for lock, declared in wanted.items():
        names = {re.split(r"[^\w.-]", text)[0].lower() for text in declared}
        assert names <= {name for name, _ in read_pins(lock)}, lock
    assert {name for name, _ in read_pins("docker/build.lock")} >= {"hatchling", "uv"}


def test_an_image_without_git_imports_what_mlflow_needs_without_a_warning() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    quiet = dict(re.findall(r"^\s+(GIT_\w+)=(\w+) \\$", text, re.MULTILINE))
    environment = {"PATH": "/nowhere", **quiet}
    ran = subprocess.run([sys.executable, "-c", "import git"], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def run_make(folder: Path, *words: str) -> list[str]:
    """What the real make has Docker do, which is not asked."""
    (folder / "docker").write_text('#!/bin/sh\necho docker "$@"\n', encoding="utf-8")
    (folder / "docker").chmod(0o755)
    environment = {**os.environ, "MAKEFLAGS": "", "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "--silent", "--assume-old=install", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return ran.stdout.splitlines()


@pytest.mark.parametrize("tag", ["", "v1.2.3"])
def test_make_labels_images_with_version_and_commit_whatever_their_tag_is(tag: str, tmp_path: Path) -> None:
    lines = run_make(tmp_path, "images", "push-images", f"COMMIT={'ab' * 6}", *([f"TAG={tag}"] if tag else []))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name in ("serving", "jobs"):
        image = f"closedloop-{name}:{tag or 'ab' * 6}"
        given = f"--build-arg VERSION={version} --build-arg COMMIT={'ab' * 6}"
        assert f"docker build --target {name} {given} --tag {image} ." in lines
        assert f"docker push registry.example.com/{image}" in lines


def test_a_digest_of_the_base_image_holds_both_images(tmp_path: Path) -> None:
    base = f"python:3.11-slim@sha256:{'0' * 64}"
    assert "\n".join(run_make(tmp_path, "images", f"BASE_IMAGE={base}")).count(f"--build-arg PYTHON={base} ") == 2
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    made = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+) ", text, re.MULTILINE)) - set(made) == {"${PYTHON}"}


def test_the_compose_file_fits_its_schema_and_the_dockerfile() -> None:
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "compose.yaml")]
    ran = subprocess.run(check, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, service in compose["services"].items():
        if "build" in service:
            assert service["build"]["target"] in targets, name
            assert service["read_only"], name
        for needed in service.get("depends_on", {}):
            assert needed in compose["services"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        for secret in service.get("secrets", []):
            assert secret["source"] in compose["secrets"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), port


def test_prometheus_in_the_compose_file_scrapes_the_jobs_that_the_rules_are_about() -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text(encoding="utf-8"))
    rules = (ROOT / "k8s/base/observability/rules.yaml").read_text(encoding="utf-8")
    jobs = {one["job_name"]: one["static_configs"][0]["targets"][0] for one in config["scrape_configs"]}
    assert set(jobs) == set(re.findall('job="([^"]+)"', rules))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert {target.split(":")[0] for target in jobs.values()} <= set(services)
    mounted = {volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_addresses_in_the_compose_file_are_those_of_its_services() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name in ("migrate", "exporter", "serving"):
        given = services[name]["environment"]
        addresses = [given[f"CLOSEDLOOP_{key}"] for key in ("TRACKING__URI", "RELEASE__PROMETHEUS")]
        assert {urlsplit(address).hostname for address in addresses} <= set(services), name
    (allowed,) = (word for word in services["mlflow"]["entrypoint"] if word.startswith("--allowed-hosts="))
    assert urlsplit(services["migrate"]["environment"]["CLOSEDLOOP_TRACKING__URI"]).netloc in allowed.split("=")[
        1
    ].split(",")
