"""A workflow as GitHub runs it for a push to the main branch: job after job, step after step, each command as written.

An action does what it would do here - a checkout, credentials - or nothing; one that is not known is an error.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.manifests import ROOT
from tests.production import link_environment, put_program

CREDENTIALS = "aws-actions/configure-aws-credentials"
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/upload-artifact", CREDENTIALS}
OWN = "github.event.pull_request.head.repo.full_name == github.repository"
# what a job's or a step's condition says of a push, by how steps before it ended, and by what they put out
CONDITIONS: dict[str, Callable[[dict[str, str]], bool]] = {
    "": lambda ended: "failure" not in ended.values(),
    "always()": lambda ended: True,
    "github.event_name != 'pull_request' && github.ref == 'refs/heads/main'": lambda ended: (
        "failure" not in ended.values()
    ),
    f"github.event_name != 'pull_request' || {OWN}": lambda ended: "failure" not in ended.values(),
    f"github.event_name == 'pull_request' && {OWN}": lambda ended: False,
    "failure() && steps.check.outputs.status == '2'": lambda ended: (
        "failure" in ended.values() and ended.get("check.status") == "2"
    ),
}


@dataclass(frozen=True)
class Step:
    """A command that was run."""

    job: str
    command: str
    status: int
    output: str


@dataclass(frozen=True)
class Runner:
    """Machines that run a repository's workflows, a new one for each job.

    ``account`` are the variables that the action for credentials sets; ``variables`` what ``vars`` means;
    ``programs`` stand in for others, by name.
    """

    repository: Path
    folder: Path
    account: dict[str, str]
    variables: dict[str, str]
    programs: dict[str, str]

    def run(self, name: str, before: Callable[[str], None] = lambda step: None) -> list[Step]:
        """Run a workflow; ``before`` is called with the name of each step that has one, before it."""
        workflow = yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
        ended: dict[str, str] = {}
        needed: dict[str, str] = {}
        done: list[Step] = []
        waiting = dict(workflow["jobs"])
        while waiting:
            job = next(one for one, said in waiting.items() if said.get("needs") not in waiting)
            said = waiting.pop(job)
            good = ended.get(said.get("needs"), "success") == "success"
            if not good or not CONDITIONS[said.get("if", "")](ended):
                ended[job] = "skipped"
                continue
            steps = self.run_job(job, said, before, needed)
            ended[job] = "failure" if any(step.status for step in steps) else "success"
            done += steps
        return done

    def run_job(
        self,
        job: str,
        said: dict[str, Any],
        before: Callable[[str], None] = lambda step: None,
        needed: dict[str, str] | None = None,
    ) -> list[Step]:
        """One machine, with the steps that have to run; ``needed`` is what jobs hand on, by its name."""
        needed = {} if needed is None else needed
        place = self.folder / job
        place.mkdir(parents=True)
        kept = ("CLOSEDLOOP_", "MLFLOW_", "AWS_", "MAKE")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(kept)}
        environment |= {"HOME": str(place), "CI": "true"}
        ended: dict[str, str] = {}
        done: list[Step] = []
        for number, step in enumerate(said["steps"]):
            if not CONDITIONS[step.get("if", "")](ended):
                continue
            if "uses" in step:
                self._act(step["uses"].partition("@")[0], place, environment)
                continue
            before(step.get("name", ""))
            variables = {key: self._expand(value, needed) for key, value in step.get("env", {}).items()}
            output = place / f"output-{number}"
            output.touch()
            variables["GITHUB_OUTPUT"] = str(output)
            ran = subprocess.run(
                ["bash", "-e", "-c", step["run"]], cwd=place / "checkout", env=environment | variables, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            name = step.get("id", str(number))
            ended[name] = "failure" if ran.returncode else "success"
            pairs = (line.partition("=") for line in output.read_text("utf-8").splitlines())
            ended |= {f"{name}.{key}": value for key, _, value in pairs}
            done.append(Step(job, step["run"], ran.returncode, ran.stdout))
        steps = {f"steps.{name.replace('.', '.outputs.')}": value for name, value in ended.items()}
        for name, value in said.get("outputs", {}).items():
            needed[f"needs.{job}.outputs.{name}"] = self._expand(value, steps)
        return done

    def _act(self, action: str, place: Path, environment: dict[str, str]) -> None:
        assert action in ACTIONS, f"what {action} does is not known here"
        if action == "actions/checkout":
            subprocess.run(["git", "clone", "--quiet", self.repository, place / "checkout"], check=True)
            link_environment(place / "checkout")
            for name, text in self.programs.items():
                put_program(place / "checkout", name, text)
        elif action == CREDENTIALS:
            environment |= self.account

    def _expand(self, text: str, known: dict[str, str]) -> str:
        known = known | {f"vars.{name}": value for name, value in self.variables.items()}
        return re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda found: known.get(found[1], ""), text)
