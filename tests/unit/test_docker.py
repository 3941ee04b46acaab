"""What images are made of: locked subsets of the one lock, and a compose file that fits its schema and the images."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def read_pins(name: str) -> set[tuple[str, str]]:
    return {(found, version) for found, version in PIN.findall((ROOT / name).read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", ["docker/serving.lock", "docker/jobs.lock"])
def test_an_image_installs_versions_of_the_one_lock_with_hashes(name: str) -> None:
    pins, text = read_pins(name), (ROOT / name).read_text(encoding="utf-8")
    assert pins
    assert pins <= read_pins("requirements.lock")
    assert all("--hash=sha256:" in entry for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:])


def test_each_image_has_what_is_declared_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        "docker/serving.lock": extras["serving"],
        "docker/jobs.lock": project["dependencies"] + extras["postgres"] + extras["s3"] + extras["kafka"],
    }
    for lock, declared in wanted.items():
        names = {re.split(r"[^\w.-]", text)[0].lower() for text in declared}
        assert names <= {name for name, _ in read_pins(lock)}, lock
    assert {name for name, _ in read_pins("docker/build.lock")} >= {"hatchling", "uv"}


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
