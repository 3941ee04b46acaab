"""A controller of releases that dies by the n-th write: `python -m tests.release_controller PROJECT`, a line a command.

Each command is done by a fork of a process that has imported everything and opened nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from mlflow import MlflowClient

from closedloop.adapters.mlflow import CHALLENGER, CHAMPION, REJECTED_TAG
from closedloop.bootstrap import build_releases, load_run
from closedloop.core.release.hash_chain import find_break
from closedloop.core.release.policy import ReleasePolicy
from closedloop.release.by_hand import roll_back
from closedloop.release.controller import run_pass, start_release
from closedloop.release.evidence import Evidence
from closedloop.release.moves import Releases
from tests.releases import HOUR, NOW, Traffic, flow

POLICY = ReleasePolicy()
REGISTRY_WRITES = (
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "set_registered_model_tag",
)


class Services:
    """A feature store that holds whatever it is asked for."""

    def has_service(self, _: str) -> bool:
        return True


def act(releases: Releases, action: str) -> None:
    """Start version 2; let its step pass, fail or end; or take it back by hand."""
    traffic = Traffic()
    evidence = Evidence(traffic, traffic, traffic, "customer", 30)
    if action == "start":
        start_release(releases, evidence, "2", actor="a test", now=NOW)
    elif action == "roll back":
        roll_back(releases, Services(), to=None, actor="a test", reason="complaints", now=NOW + HOUR)
    else:
        rollout = releases.read_state().rollout
        assert rollout is not None
        slow: dict[str, Any] = {"latency_p95_ms": 400.0} if action == "fail" else {}
        flow(traffic, rollout.step, scores=rollout.reference_scores, **slow)
        now = NOW + (61 * 24 if action == "end" else 10) * HOUR
        run_pass(releases, evidence, POLICY, now=now, as_of=now)


def look(releases: Releases) -> dict[str, Any]:
    """What serves, and what the registry says, without touching either."""
    tracking, links = releases.tracking, releases.journal.read(releases.model_name)
    row = releases.journal.read_deployment(releases.model_name)
    assert row is not None
    aliases = {name: tracking.read_alias(name) for name in (CHAMPION, CHALLENGER)}
    return {
        "row": [row.champion_version, row.challenger_version, row.challenger_mode, row.weight],
        "aliases": {name: found and str(found.version) for name, found in aliases.items()},
        "rejected": REJECTED_TAG in tracking.read_version("2").tags,
        "entries": len(links),
        "broken": find_break(links, tracking.read_journal_mark()),
    }


def die_at(releases: Releases, number: int) -> None:
    """Let this process kill itself, which no process can resist, before its n-th write or commit, or after the last."""
    left = [number]

    def count(*_: Any, **__: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_statement(connection: sa.Connection, _: Any, statement: str, *__: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE")):
            connection.info["wrote"] = True
            count()

    def count_commit(connection: sa.Connection) -> None:
        if connection.info.pop("wrote", False):
            count()

    def write(inner: Any) -> Any:
        return lambda *arguments, **named: (count(), inner(*arguments, **named))[1]

    engine = releases.journal.database.engine
    sa.event.listen(engine, "before_cursor_execute", count_statement)
    sa.event.listen(engine, "commit", count_commit)
    for name in REGISTRY_WRITES:
        setattr(MlflowClient, name, write(getattr(MlflowClient, name)))


def run(root: Path, command: dict[str, Any]) -> Any:
    """``act``, dying by the write ``kill`` (0: by none), or ``resume``: look, go on as the next pass does, look."""
    releases = build_releases(load_run(root / "params.yaml", root=root))
    if kill := command.get("kill", 0):
        die_at(releases, kill)
    if "act" in command:
        act(releases, command["act"])
        return look(releases)
    found = look(releases)
    state = releases.mirror(releases.read_state())
    if found["entries"] == command["entries"]:
        act(releases, command["resume"])
        state = releases.read_state()
    return [found, look(releases), state.rollout and state.rollout.step]


def main() -> None:
    for kind in ("tracking", "model_registry"):  # which MLflow imports late
        importlib.import_module(f"mlflow.store.{kind}.sqlalchemy_store")
    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            print(json.dumps(run(Path(sys.argv[1]), json.loads(line))), flush=True)
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(json.dumps(code), flush=True)


if __name__ == "__main__":
    main()
