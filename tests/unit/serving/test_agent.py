"""The slots file follows the deployment row as far as versions hold; whatever fails, what served goes on serving."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from closedloop.adapters.store import Deployment
from closedloop.contract import MODEL_FILE, digest_folder
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.serving.agent import NICE, Agent, SlotFollower
from closedloop.serving.slots import SlotHolder, read_slots
from tests.model_folders import write_model_folder

FIRST = Deployment("test_churn", 1, "1", "salt-1", dt.datetime(2024, 1, 1, tzinfo=dt.UTC))


@dataclass
class OneRow:
    """An operations store with one deployment row, or an outage."""

    row: Deployment | None = FIRST
    down: bool = False

    def read_deployment(self, model_name):
        if self.down:
            raise ServiceUnavailable("the database is away")
        return self.row


@dataclass
class Folders:
    """A registry of folders."""

    root: Path
    champion: str | None = "1"
    down: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def fetch_version(self, version, folder):
        self.asked.append(version)
        if self.down:
            raise ServiceUnavailable("no route to the registry")
        if not (self.root / version).is_dir():
            raise DataError(f"test_churn has no version {version}")
        shutil.copytree(self.root / version, folder)
        return folder, self.tags.get(version) or digest_folder(folder)

    def read_champion_version(self):
        if self.down:
            raise ServiceUnavailable("no route to the registry")
        return self.champion


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def registry(tmp_path):
    for version in ("1", "2"):
        write_model_folder(tmp_path / "registry" / version, bias=float(version))
    return Folders(tmp_path / "registry")


@pytest.fixture
def store():
    return OneRow()


@pytest.fixture
def follower(state, store, registry):
    return SlotFollower(state, "test_churn", store, registry)


def test_what_both_threads_import_is_there_before_they_start(project):
    code = "from pathlib import Path; from closedloop.bootstrap import *; build_agent(load_run(Path('params.yaml')))"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        cwd=project.root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"alembic.command", "alembic.migration", "alembic.script"} <= set(ran.stdout.split())


def test_before_the_first_release_nothing_is_written(follower, store, state):
    store.row = None
    follower.step()
    assert read_slots(state) is None


def test_a_row_is_fetched_once_and_can_be_served(follower, store, registry, state):
    for _ in range(3):
        follower.step()
    assert registry.asked == ["1"]
    slots = read_slots(state)
    assert (slots.revision, slots.salt, slots.champion.version, slots.challenger) == (1, "salt-1", "1", None)
    assert (slots.refused, slots.notes) == ((), ())
    holder = SlotHolder(state, None, range_margin=1.0)
    holder.load_first()
    assert holder.serving.champion.version == "1"


def test_a_canary_and_its_end_without_another_download(follower, store, registry, state):
    follower.step()
    store.row = replace(FIRST, revision=2, challenger_version="2", challenger_mode="canary", weight=0.05)
    follower.step()
    slots = read_slots(state)
    assert (slots.challenger.version, slots.challenger_mode, slots.weight) == ("2", "canary", 0.05)
    store.row = replace(FIRST, revision=3)
    follower.step()
    assert read_slots(state).challenger is None
    assert registry.asked == ["1", "2"]


def test_a_canarys_own_service_answers_with_the_challenger_alone_and_with_the_champion_without_one(
    store, registry, state
):
    follower = SlotFollower(state, "test_churn", store, registry, "challenger")
    store.row = replace(FIRST, challenger_version="2", challenger_mode="shadow", weight=0.05)
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.challenger, slots.notes) == ("2", None, ())
    store.row = replace(FIRST, revision=2)
    follower.step()
    assert read_slots(state).champion.version == "1"


def test_a_wrong_digest_is_refused_once_and_the_old_champion_stays(follower, store, registry, state):
    follower.step()
    registry.tags["2"] = "f" * 64
    store.row = replace(FIRST, revision=2, champion_version="2", salt="salt-2")
    for _ in range(3):
        follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    assert [refusal.version for refusal in slots.refused] == ["2"]
    assert "the registry says ffffffffffff" in slots.refused[0].reason
    assert registry.asked == ["1", "2"]
    assert not (state / "models/2").exists()


def test_a_truncated_model_is_refused(follower, store, registry, state):
    path = registry.root / "2" / MODEL_FILE
    registry.tags["2"] = digest_folder(registry.root / "2")
    path.write_bytes(path.read_bytes()[:-10])
    follower.step()
    store.row = replace(FIRST, revision=2, challenger_version="2", challenger_mode="shadow")
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.challenger) == ("1", None)
    assert slots.refused[0].reason.startswith("digest: ")


def test_a_registry_that_is_away_is_asked_again(follower, store, registry, state):
    follower.step()
    registry.down = True
    store.row = replace(FIRST, revision=2, champion_version="2")
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.refused) == ("1", ())
    assert slots.notes == ("registry: no route to the registry",)
    registry.down = False
    registry.champion = "2"
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.notes) == ("2", ())


def test_a_store_that_is_away_is_noted_and_changes_nothing(follower, store, state):
    follower.step()
    before = read_slots(state)
    store.down = True
    follower.step()
    noted = read_slots(state)
    assert noted.notes == ("operations store: the database is away",)
    assert (noted.champion, noted.revision) == (before.champion, before.revision)
    store.down = False
    follower.step()
    assert read_slots(state) == before


def test_an_alias_moved_by_hand_is_reported_and_not_served(follower, store, registry, state):
    registry.champion = "2"
    follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    assert slots.notes == ("alias champion names version 2, served is 1",)


def test_a_damaged_slots_file_is_written_again(follower, state):
    follower.step()
    before = read_slots(state)
    (state / "slots.json").write_text("{", encoding="utf-8")
    follower.step()
    assert read_slots(state) == before


def test_the_first_look_for_a_model_has_the_workers_priority_and_what_follows_a_lower_one(tmp_path):
    """Each thread has its own on Linux."""
    seen = {"follow": [], "drain": []}

    class Watched(OneRow):
        def upgrade(self):
            seen["drain"].append(os.getpriority(os.PRIO_PROCESS, 0))

        def read_deployment(self, model_name):
            seen["follow"].append(os.getpriority(os.PRIO_PROCESS, 0))
            if len(seen["follow"]) > 1 and seen["drain"]:
                agent.stop()

    agent = Agent(tmp_path, "shop_churn", Watched(None), None)
    thread = threading.Thread(target=agent.run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    first, *rest = seen["follow"]
    assert first == os.getpriority(os.PRIO_PROCESS, 0)
    assert {*rest, *seen["drain"]} == {min(first + NICE, 19)}
