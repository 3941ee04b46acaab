"""A cluster, an image registry and a cloud in a folder: stand-ins for docker, kubectl and aws, as workflows use them.

`docker build` keeps what the Dockerfile copies of the project, and `kubectl create` runs a Job's container from there
as a process, with what its manifest gives it and no more: a ConfigMap's variables, a Secret's keys, the volume.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.manifests import ROOT, Resource, render
from tests.scripts import PYTHON_HEAD

PROGRAMS = ("docker", "kubectl", "aws")
SETTINGS, REGISTRY, DAEMON = "cluster.json", "registry", "daemon"
ENTRYPOINT = ["closedloop"]  # the Dockerfile's


def write_program(name: str, folder: Path) -> str:
    """The text of a program that does for ``folder`` what the function of its name below does."""
    return (
        f"{PYTHON_HEAD}import pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.cluster import {name}\n{name}(pathlib.Path({str(folder)!r}), sys.argv[1:])\n"
    )


@dataclass(frozen=True)
class Cluster:
    """What was applied to the cluster, its Secrets, and what its clock says."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, secrets: dict[str, dict[str, str]], instead: dict[str, str]) -> Cluster:
        """With the production overlay applied; ``instead`` are variables of hosts that are elsewhere here."""
        folder.mkdir()
        for name in ("bin", "tmp"):
            (folder / name).mkdir()
        said = {"resources": render("production"), "secrets": secrets, "instead": instead}
        (folder / SETTINGS).write_text(json.dumps(said), encoding="utf-8")
        return cls(folder)

    def put_program(self, name: str, text: str) -> None:
        """A program that the containers find before the environment's."""
        (self.folder / "bin" / name).write_text(text, encoding="utf-8")
        (self.folder / "bin" / name).chmod(0o755)

    def find(self, kind: str, name: str) -> Resource:
        """A resource of the overlay."""
        for one in self._read()["resources"]:
            if (one["kind"], one["metadata"]["name"]) == (kind, name):
                return one
        sys.exit(f'Error from server (NotFound): {kind} "{name}" not found')

    def prepare(self, pod: dict[str, Any], place: Path) -> tuple[list[str], dict[str, str]]:
        """Unpack the image of a pod's container in ``place``; its command and all of its environment."""
        (box,) = pod["containers"]
        image = self.folder / REGISTRY / box["image"]
        if not image.is_dir():
            sys.exit(f'Failed to pull image "{box["image"]}": not found')
        shutil.copytree(image, place, dirs_exist_ok=True)
        (place / "state").unlink(missing_ok=True)  # of the pod before
        (place / "state").symlink_to("/proc/a-read-only-file-system")  # to the image's /state, unless a volume is there
        volumes = {one["name"]: one for one in pod["volumes"]}
        for mount in box["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                data = self.find("ConfigMap", volume["configMap"]["name"])["data"]
                (place / Path(mount["mountPath"]).relative_to("/app")).write_text(data[mount["subPath"]], "utf-8")
            elif "persistentVolumeClaim" in volume:
                claim = self.folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
                claim.mkdir(parents=True, exist_ok=True)
                (place / "state").unlink()
                (place / "state").symlink_to(claim)
        return box.get("command", ENTRYPOINT) + box["args"], self._describe_environment(box, image)

    def _describe_environment(self, box: dict[str, Any], image: Path) -> dict[str, str]:
        said = self._read()
        programs = [str(self.folder / "bin"), str(Path(sys.executable).parent), "/usr/bin", "/bin"]
        found = {
            "PATH": os.pathsep.join(programs),
            "HOME": str(self.folder / "tmp"),
            "CLOSEDLOOP_GIT_COMMIT": (image.with_name(f"{image.name}.commit")).read_text("utf-8"),
        }
        for source in box["envFrom"]:
            found |= self.find("ConfigMap", source["configMapRef"]["name"])["data"]
        for one in box["env"]:
            key = one.get("valueFrom", {}).get("secretKeyRef")
            found[one["name"]] = said["secrets"][key["name"]][key["key"]] if key else one["value"]
        return found | said["instead"]

    def _read(self) -> Any:
        return json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))


def list_copied(target: str) -> list[tuple[str, str]]:
    """What the Dockerfile copies from the project into an image: sources and destinations below /app."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = {
        found[2]: (found[1], re.findall(r"^COPY (?!--from)(\S+) (\S+)$", found[3], re.MULTILINE))
        for found in re.finditer(r"^FROM (\S+) AS (\S+)\n((?:(?!^FROM).*\n)*)", text, re.MULTILINE)
    }
    copied: list[tuple[str, str]] = []
    while target in stages:
        target, own = stages[target]
        copied += own
    return copied


def build_image(project: Path, target: str, commit: str, image: Path) -> None:
    """What an image holds of the project, beside its environment."""
    image.mkdir(parents=True)
    for source, destination in list_copied(target):
        if (project / source).is_dir():
            shutil.copytree(project / source, image / destination, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(project / source, image / destination)
    image.with_name(f"{image.name}.commit").write_text(commit, encoding="utf-8")


def docker(folder: Path, arguments: list[str]) -> None:
    """build, tag, login, push."""
    words, options = _read_options(arguments, "target", "build-arg", "tag", "username")
    login = Path(os.environ["HOME"]) / ".docker/login"
    match words:
        case ["build", context]:
            (commit,) = (word.removeprefix("COMMIT=") for word in arguments if word.startswith("COMMIT="))
            build_image(Path(context), options["target"], commit, folder / DAEMON / options["tag"])
        case ["tag", old, new]:
            _copy_image(folder / DAEMON / old, folder / DAEMON / new)
        case ["login", registry] if "password-stdin" in options and sys.stdin.read().strip():
            login.parent.mkdir()
            login.write_text(registry, encoding="utf-8")
        case ["push", image] if login.is_file() and image.startswith(f"{login.read_text('utf-8')}/"):
            _copy_image(folder / DAEMON / image, folder / REGISTRY / image)
        case _:
            sys.exit(f"not understood, or not logged in: docker {' '.join(arguments)}")


def aws(folder: Path, arguments: list[str]) -> None:
    """Login to the image registry and to the cluster, for whoever has credentials."""
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        sys.exit("Unable to locate credentials")
    match arguments:
        case ["ecr", "get-login-password"]:
            print("a-short-lived-password")
        case ["eks", "update-kubeconfig", "--name", "closedloop"]:
            (Path(os.environ["HOME"]) / ".kube").mkdir()
            (Path(os.environ["HOME"]) / ".kube/config").touch()
        case _:
            sys.exit(f"not understood: aws {' '.join(arguments)}")


def kubectl(folder: Path, arguments: list[str]) -> None:
    """create, logs and end of a Job in the namespace; what asks no cluster does the real one."""
    if arguments[0] == "set" and "--local" in arguments:
        os.execv(Path(sys.executable).parent / "kubectl", ["kubectl", *arguments])  # noqa: S606
    if not (Path(os.environ["HOME"]) / ".kube/config").is_file():
        sys.exit("error: You must be logged in to the server (Unauthorized)")
    words, options = _read_options(arguments, "namespace")
    cluster = Cluster(folder)
    if options.get("namespace") != "closedloop":
        sys.exit("error: another namespace")
    match words:
        case ["create", "job", name]:
            cron = cluster.find("CronJob", options["from"].removeprefix("cronjob/"))
            job = {"metadata": {"name": name, "namespace": "closedloop"}, "spec": cron["spec"]["jobTemplate"]["spec"]}
            job |= {"apiVersion": "batch/v1", "kind": "Job"}
            if options.get("dry-run") == "client":
                print(json.dumps(job))
            else:
                _start(cluster, job)
        case ["create"]:
            _start(cluster, json.load(sys.stdin))
        case ["get", "job", name]:
            print(show(_describe_job(_find_job(folder, name)), options["output"]), end="")
        case ["get", "pods"]:
            print(f"pod/{_find_job(folder, options['selector'].removeprefix('job-name=')).name}")
        case ["get", pod]:
            print(show(_describe_pod(_find_job(folder, pod.removeprefix("pod/"))), options["output"]), end="")
        case ["logs", pod]:
            found = _find_job(folder, pod.removeprefix("pod/"))
            while not (found / "status").is_file():
                time.sleep(0.1)
            print((found / "log").read_text("utf-8"))
        case _:
            sys.exit(f"not understood: kubectl {' '.join(arguments)}")


def _start(cluster: Cluster, job: Resource) -> None:
    """A Job's pod as a process that outlives this one."""
    place = cluster.folder / "jobs" / job["metadata"]["name"]
    place.mkdir(parents=True)
    command, environment = cluster.prepare(job["spec"]["template"]["spec"], place / "app")
    command = [word.replace("/dev/termination-log", str(place / "message")) for word in command]
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = '"$@" > ../log 2>&1; echo $? > ../status.new; mv ../status.new ../status'
    subprocess.Popen(
        ["sh", "-c", script, "sh", *command],
        cwd=place / "app",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def show(resource: Resource, output: str) -> str:
    """What the real kubectl prints of a resource."""
    command = [str(Path(sys.executable).parent / "kubectl"), "label", "--local", "--filename=-", "a=b"]
    ran = subprocess.run(
        [*command, f"--output={output}"], input=json.dumps(resource), capture_output=True, text=True, check=True
    )
    return ran.stdout


def _describe_job(place: Path) -> Resource:
    """With the condition that says how it ended, once its pod, of which there is one, has."""
    job: Resource = json.loads((place / "job.json").read_text("utf-8"))
    if (place / "status").is_file():
        good = (place / "status").read_text("utf-8").strip() == "0"
        kind, reason = ("Complete", "CompletionsReached") if good else ("Failed", "BackoffLimitExceeded")
        job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": "it ended"}]}
    return job


def _describe_pod(place: Path) -> Resource:
    box = {"name": "one", "image": "one"}
    status: dict[str, Any] = {"phase": "Running"}
    if (place / "status").is_file():
        said = place / "message"
        ended = {"exitCode": int((place / "status").read_text("utf-8"))}
        ended |= {"message": said.read_text("utf-8")} if said.is_file() else {}
        one = {**box, "ready": False, "restartCount": 0, "state": {"terminated": ended}}
        status = {"phase": "Failed" if ended["exitCode"] else "Succeeded", "containerStatuses": [one]}
    metadata = {"name": place.name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [box]}, "status": status}


def _find_job(folder: Path, name: str) -> Path:
    if not (folder / "jobs" / name).is_dir():
        sys.exit(f'Error from server (NotFound): jobs.batch "{name}" not found')
    return folder / "jobs" / name


def _copy_image(old: Path, new: Path) -> None:
    shutil.copytree(old, new)
    shutil.copy(old.with_name(f"{old.name}.commit"), new.with_name(f"{new.name}.commit"))


def _read_options(arguments: list[str], *with_value: str) -> tuple[list[str], dict[str, str]]:
    """Words, and options by name, whether their value stands behind "=" or, of some, in the next word."""
    words, options, rest = [], {}, iter(arguments)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            words.append(word)
        else:
            options[name] = next(rest) if name in with_value and not equals else value
    return words, options
