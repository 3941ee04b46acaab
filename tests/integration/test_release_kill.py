"""kill -9 of the controller by every write and commit of every move, on both databases, with the real registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from closedloop.processes import start_process
from tests.conftest import SOURCE_ROOT, Project
from tests.releases import register_versions

pytestmark = pytest.mark.thorough
TABLES = ("deployments", "journal", "release_passes")
# What has happened before, and the move during which it is killed.
STEPS = ("pass",) * 4
MOVES = {
    "start": ((), "start"),
    **{f"step {number + 1}": (("start", *STEPS[:number]), "pass") for number in range(4)},
    "end of the watch": (("start", *STEPS), "end"),
    "rejected in canary": (("start", *STEPS[:2]), "fail"),
    "canary ended by hand": (("start", *STEPS[:3]), "roll back"),
    "champion taken back by hand": (("start", *STEPS), "roll back"),
}


class Controller:
    """The process that forks one for each command."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "tests.release_controller", str(root)]
        self._process = start_process(
            command, cwd=SOURCE_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate(timeout=300)


class Databases:
    """What is in the operations store and the registry, to go back to; nobody has them open then."""

    def __init__(self, root: Path, url: str | None) -> None:
        self._root, self._url = root, url
        # with their logs, which the killed leave; SQLite makes its shared memory anew
        self._files = {path: path.read_bytes() for path in self._list() if not path.name.endswith("-shm")}
        self._rows: dict[str, bytes] = {}
        if url is not None:
            with psycopg.connect(url) as connection:
                for table in TABLES:
                    with connection.cursor().copy(f"COPY {table} TO STDOUT") as rows:
                        self._rows[table] = b"".join(rows)

    def _list(self) -> list[Path]:
        return [path for name in ("mlflow.db", "state/operations.db") for path in self._root.glob(f"{name}*")]

    def restore(self) -> None:
        for left_over in self._list():
            left_over.unlink()
        for path, content in self._files.items():
            path.write_bytes(content)
        if self._url is not None:
            with psycopg.connect(self._url) as connection:
                connection.execute(f"TRUNCATE {', '.join(TABLES)}")
                for table, content in self._rows.items():
                    with connection.cursor().copy(f"COPY {table} FROM STDIN") as rows:
                        rows.write(content)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_project: Any) -> Any:
    """A project with two registered versions, the first of which serves, and its controller."""
    url = None
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "postgresql":
            url = request.getfixturevalue("postgres").create_database()
            environment.setenv("CLOSEDLOOP_OPERATIONS__URL", url)
        made: Project = make_project(tmp_path_factory.mktemp("kill") / "project")
        register_versions(made.root, {"1": 0.0, "2": 0.01})
        controller = Controller(made.root)
        yield controller, Databases(made.root, url), made.root, url
        controller.end()


@pytest.mark.parametrize("name", MOVES)
def test_a_move_killed_by_any_write_is_done_whole_or_not_at_all(shop: Any, name: str) -> None:
    controller, first, root, url = shop
    first.restore()
    earlier, move = MOVES[name]
    before = {"entries": 1, "aliases": {"champion": "1"}}
    for action in earlier:
        before = controller.ask(act=action)
    ready = Databases(root, url)
    after = controller.ask(act=move)
    assert after["broken"] is None
    assert after["entries"] == before["entries"] + 1
    assert after["aliases"]["champion"] == after["row"][0]
    number = 0
    while True:
        ready.restore()
        number += 1
        if controller.ask(act=move, kill=number) != -9:
            break
        found, end, step = controller.ask(resume=move, entries=before["entries"])
        champion, challenger, _, weight = found["row"]
        assert champion != challenger
        assert 0.0 <= weight <= 0.5
        assert found["aliases"]["champion"] in (before["aliases"]["champion"], after["aliases"]["champion"])
        assert end == after, f"killed by write {number}"
        assert (step is None) == (name in list(MOVES)[-4:])
    assert number > 4  # entry, row, their commit and the registry at the least
