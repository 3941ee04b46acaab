"""The slots file follows the deployment row as far as versions hold; whatever fails, what served goes on serving."""

from __future__ import annotations

import datetime as dt
import errno
import inspect
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from closedloop.contract import MODEL_FILE, CategoricalFeature, digest_folder
from closedloop.core.release.entries import Deployment
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.records import Outcome
from closedloop.serving import models
from closedloop.serving.exposition import build_registry
from closedloop.serving.log.progress import read_progress
from closedloop.serving.log.spool import SpoolWriter
from closedloop.serving.models import OtherFeatures
from closedloop.serving.process.agent import NICE, Agent, OperationsStore
from closedloop.serving.slots import downloads
from closedloop.serving.slots.follower import SlotFollower
from closedloop.serving.slots.holder import SlotHolder
from closedloop.serving.slots.proof import prove_slot, read_fitting
from closedloop.serving.slots.slots import Slot, load_slot, read_slots, take_up_waiting
from closedloop.store.predictions import InsertResult
from tests.model_folders import FEATURES, write_model_folder

OTHER = CategoricalFeature(name="tariff", categories=("basic", "plus"))
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


def whole(store):
    """The operations store, of which each part is the same object."""
    return OperationsStore(lambda: store.upgrade(), store, store)


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


def prove_here(slot, beside, is_wanted):
    """As the process does that the agent starts for it, without its imports."""
    load_slot(slot, read_fitting(beside))
    return True


def make_follower(state, store, registry, slot="champion"):
    return SlotFollower(state, "test_churn", store, registry, slot, prove_here)


@pytest.fixture
def follower(state, store, registry):
    return make_follower(state, store, registry)


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
    follower = make_follower(state, store, registry, "challenger")
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
    assert str(state) not in slots.refused[0].reason  # clients are told of it, and of no path
    assert registry.asked == ["1", "2"]
    assert not (state / "models/2").exists()


def test_a_refused_first_version_is_downloaded_once_and_told(follower, store, registry, state, tmp_path):
    registry.tags["1"] = "f" * 64
    for one in (follower, follower, make_follower(state, store, registry)):
        one.step()
    assert registry.asked == ["1"]
    slots = read_slots(state)
    assert (slots.champion, [refusal.version for refusal in slots.refused]) == (None, ["1"])
    holder = SlotHolder(state, write_model_folder(tmp_path / "bundled"), range_margin=1.0)
    holder.load_first()
    assert holder.serving.champion.version == "bundled"  # as long as there is nothing better
    assert "the registry says ffffffffffff" in holder.refused["1"]
    store.row = replace(FIRST, revision=2, champion_version="2")
    follower.step()
    holder.load_first()
    assert (holder.serving.champion.version, holder.refused) == ("2", {})


def test_a_rollback_needs_no_registry(follower, store, registry, state):
    follower.step()
    for revision, version in ((2, "2"), (3, "1")):
        registry.down = revision == 3
        store.row = replace(FIRST, revision=revision, champion_version=version)
        follower.step()
    assert registry.asked == ["1", "2"]
    slots = read_slots(state)
    assert (slots.revision, slots.champion.version, slots.champion.folder_sha256) == (
        3,
        "1",
        digest_folder(state / "models/1/model"),
    )


def test_a_download_that_stalls_does_not_hold_up_a_rollback(follower, store, registry, state):
    """What the row wants next is here; the stalled version is waited for where it is wanted again."""
    for revision, version in ((1, "1"), (2, "2")):
        store.row = replace(FIRST, revision=revision, champion_version=version)
        follower.step()
    write_model_folder(registry.root / "3", bias=3.0)
    answer, fetch = threading.Event(), registry.fetch_version

    def stall(version, folder):
        store.row = replace(FIRST, revision=4)
        answer.wait()
        return fetch(version, folder)

    registry.fetch_version = stall
    store.row = replace(FIRST, revision=3, champion_version="3")
    step_aside(follower)
    assert read_slots(state).revision == 2  # what serves is the last revision that was had whole
    step_aside(follower)
    assert (read_slots(state).revision, read_slots(state).champion.version) == (4, "1")
    answer.set()
    store.row = replace(FIRST, revision=5, champion_version="3")
    step_aside(follower)
    assert read_slots(state).champion.version == "3"
    assert registry.asked == ["1", "2", "3"]


def test_a_download_goes_on_while_the_store_is_away(follower, store, registry, state, monkeypatch):
    monkeypatch.setattr(downloads, "WANTED_SECONDS", 0.001)
    answer, fetch, read = threading.Event(), registry.fetch_version, store.read_deployment

    def read_deployment(model_name):
        if registry.asked:
            answer.set()
            raise ServiceUnavailable("the database is away")
        return read(model_name)

    def stall(version, folder):
        found = fetch(version, folder)
        answer.wait()
        return found

    registry.fetch_version, store.read_deployment = stall, read_deployment
    step_aside(follower)
    assert read_slots(state).champion.version == "1"


def step_aside(follower):
    """A step that is given up after a minute: it may wait for what never comes."""
    thread = threading.Thread(target=follower.step, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_folder_that_was_damaged_meanwhile_is_downloaded_again(follower, store, registry, state):
    follower.step()
    store.row = replace(FIRST, revision=2, champion_version="2")
    follower.step()
    path = state / "models/1/model" / MODEL_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    store.row = replace(FIRST, revision=3)
    follower.step()
    assert registry.asked == ["1", "2", "1"]
    assert path.read_bytes() == content
    assert read_slots(state).champion.version == "1"


def test_a_model_that_was_changed_in_the_registry_since_its_release_is_not_served(follower, store, registry, state):
    """Folder and tag were changed together, so that they fit each other; the journal names another digest."""
    digests = {version: digest_folder(registry.root / version) for version in ("1", "2")}
    store.row = replace(FIRST, digests=digests)
    follower.step()
    write_model_folder(registry.root / "2", bias=-5.0)
    store.row = replace(FIRST, revision=2, champion_version="2", digests=digests)
    follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    (refused,) = slots.refused
    assert f"the journal released it with {digests['2'][:12]}: the registered model was changed since" in refused.reason
    write_model_folder(registry.root / "2", bias=2.0)  # repaired: it is downloaded anew
    store.row = replace(FIRST, revision=3, champion_version="2", digests=digests)
    follower.step()
    assert read_slots(state).champion.version == "2"


def test_of_what_was_downloaded_the_last_few_stay_and_the_champion_before(follower, store, registry, state):
    """A champion of a year ago, which many challengers have not replaced, is what a rollback asks for."""
    for place, version in enumerate([str(number) for number in range(3, 12)]):
        write_model_folder(registry.root / version, bias=float(version))
        store.row = replace(FIRST, revision=place, challenger_version=version, challenger_mode="shadow")
        follower.step()
    store.row = replace(FIRST, revision=20, champion_version="11")
    follower.step()
    assert {path.name for path in (state / "models").iterdir()} == {"1", "8", "9", "10", "11"}


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


def test_a_version_that_the_disk_has_no_room_for_is_tried_again(follower, store, registry, state, monkeypatch):
    follower.step()
    store.row = replace(FIRST, revision=2, champion_version="2")
    with monkeypatch.context() as full:
        full.setattr(registry, "fetch_version", fail_to_write)
        follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.refused, slots.notes) == ("1", (), ("state folder: No space left on device",))
    follower.step()
    assert read_slots(state).champion.version == "2"


def fail_to_write(version, folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


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
    follower.check_alias()  # nothing is known yet of what it should name
    follower.step()
    assert read_slots(state).notes == ()
    follower.check_alias()
    follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    assert slots.notes == ("alias champion names version 2, served is 1",)
    registry.champion = "1"
    follower.check_alias()
    follower.step()
    assert read_slots(state).notes == ()


@pytest.mark.parametrize("challenger", [False, True])
def test_what_does_not_hold_is_refused_before_a_worker_is_told(follower, store, registry, state, challenger):
    """Else a worker that starts after it would find no version in the file that it may serve."""
    follower.step()
    write_model_folder(registry.root / "2", bias=2.0, golden_shift=0.01)
    release = {"challenger_version": "2", "challenger_mode": "shadow"} if challenger else {"champion_version": "2"}
    store.row = replace(FIRST, revision=2, **release)
    for _ in range(2):
        follower.step()
    slots = read_slots(state)
    assert (slots.revision, slots.champion.version, slots.challenger) == (2, "1", None)
    assert [refusal.version for refusal in slots.refused] == ["2"]
    assert slots.refused[0].reason.startswith("golden rows: row 0 scores ")
    assert registry.asked == ["1", "2"]
    restarted = SlotHolder(state, None, range_margin=1.0)
    restarted.load_first()
    assert restarted.serving.champion.version == "1"
    assert restarted.refused == {"2": slots.refused[0].reason}


def test_a_graph_that_does_not_end_is_refused_and_the_next_row_is_taken_up(store, registry, state, monkeypatch):
    monkeypatch.setattr(models, "GOLDEN_SECONDS", 0.2)
    follower = make_follower(state, store, registry)
    follower.step()
    write_model_folder(registry.root / "3", rounds=10**12)
    store.row = replace(FIRST, revision=2, champion_version="3")
    follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    assert [refusal.version for refusal in slots.refused] == ["3"]
    assert slots.refused[0].reason == "golden rows: the graph gives no score within 0.2 s"
    store.row = replace(FIRST, revision=3, champion_version="2")
    follower.step()
    assert (read_slots(state).revision, read_slots(state).champion.version) == (3, "2")


def prove(root, version, beside=None, *, wanted=lambda: True, seconds=120.0):
    slot, fitting = (
        Slot(one, str(root / one), digest_folder(root / one)) if one else None for one in (version, beside)
    )
    return prove_slot(slot, fitting, wanted, seconds)


def test_a_version_is_proved_in_a_process_that_ends_when_its_time_is_over_or_nobody_wants_it(registry):
    write_model_folder(registry.root / "3", rounds=10**12)
    with pytest.raises(DataError, match=r"loading: version 3 is not loaded within 0\.1 s"):
        prove(registry.root, "3", seconds=0.1)
    assert prove(registry.root, "3", wanted=lambda: False) is False


def test_a_follower_proves_versions_in_that_process_unless_it_is_told_otherwise():
    assert inspect.signature(SlotFollower).parameters["prove"].default is prove_slot


def test_the_process_that_proves_a_version_says_what_it_found(registry):
    write_model_folder(registry.root / "3", features=(*FEATURES[:2], OTHER))
    write_model_folder(registry.root / "4", golden_shift=0.01)
    assert prove(registry.root, "2", "1")
    with pytest.raises(OtherFeatures, match="features differ from those being served"):
        prove(registry.root, "3", "1")
    with pytest.raises(DataError, match="golden rows: row 0 scores"):
        prove(registry.root, "4")


def test_a_version_of_other_features_is_refused_before_a_worker_is_told(follower, store, registry, state):
    follower.step()
    write_model_folder(registry.root / "3", features=(*FEATURES[:2], OTHER))
    store.row = replace(FIRST, revision=2, champion_version="3")
    follower.step()
    slots = read_slots(state)
    assert slots.champion.version == "1"
    assert slots.refused[0].reason.startswith("contract: features differ from those being served: ")


def test_a_version_of_other_features_is_taken_up_when_the_service_is_started_again(follower, store, registry, state):
    follower.step()
    write_model_folder(registry.root / "3", features=(*FEATURES[:2], OTHER))
    store.row = replace(FIRST, revision=2, champion_version="3")
    for _ in range(2):
        follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.waiting.version) == ("1", "3")
    assert slots.notes == ("version 3 takes other features: start the service again to serve it",)
    take_up_waiting(state)
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.waiting, slots.refused, slots.notes) == ("3", None, (), ())
    assert registry.asked == ["1", "3"]


def test_a_version_of_other_features_waits_for_no_start_once_the_row_names_another(follower, store, registry, state):
    follower.step()
    write_model_folder(registry.root / "3", features=(*FEATURES[:2], OTHER))
    for revision, version in ((2, "3"), (3, "1")):
        store.row = replace(FIRST, revision=revision, champion_version=version)
        follower.step()
    take_up_waiting(state)
    assert (read_slots(state).champion.version, read_slots(state).waiting) == ("1", None)


def test_a_challenger_of_other_features_waits_for_no_start(follower, store, registry, state):
    write_model_folder(registry.root / "3", features=(*FEATURES[:2], OTHER))
    store.row = replace(FIRST, challenger_version="3", challenger_mode="shadow")
    for _ in range(2):
        follower.step()
    slots = read_slots(state)
    assert ([refusal.version for refusal in slots.refused], slots.waiting, slots.notes) == (["3"], None, ())


def test_a_version_that_was_repaired_is_looked_at_again_with_the_next_revision(follower, store, registry, state):
    follower.step()
    registry.tags["2"] = "f" * 64
    store.row = replace(FIRST, revision=2, champion_version="2")
    follower.step()
    del registry.tags["2"]
    follower.step()
    assert registry.asked == ["1", "2"]  # not twice a second
    store.row = replace(FIRST, revision=3, champion_version="2")
    follower.step()
    slots = read_slots(state)
    assert (slots.champion.version, slots.refused) == ("2", ())


def test_a_store_of_a_newer_release_is_noted(follower, store, state, monkeypatch):
    follower.step()
    with monkeypatch.context() as newer:
        newer.setattr(store, "read_deployment", refuse_schema)
        follower.step()
    assert read_slots(state).notes == ("operations store: the schema is newer",)


def refuse_schema(model_name):
    raise ConfigError("the schema is newer")


def test_a_damaged_slots_file_is_written_again(follower, state):
    follower.step()
    before = read_slots(state)
    (state / "slots.json").write_text("{", encoding="utf-8")
    follower.step()
    assert read_slots(state) == before


def run_agent(agent):
    thread = threading.Thread(target=agent.run)
    thread.start()
    return thread


def test_a_registry_that_hangs_holds_up_neither_the_store_nor_a_rollback_nor_the_end(state, store, registry):
    """One that takes connections and says nothing: what it is asked, it never answers."""
    asked, drained = threading.Event(), threading.Event()
    make_follower(state, store, registry).step()
    store.row = replace(FIRST, revision=2, champion_version="2")
    make_follower(state, store, registry).step()

    def hang():
        asked.set()
        threading.Event().wait()

    def upgrade():
        if asked.is_set():
            drained.set()
        raise ServiceUnavailable("away")

    registry.read_champion_version, store.upgrade = hang, upgrade
    agent = Agent(state, "test_churn", whole(store), registry, last_drain_seconds=0)
    thread = run_agent(agent)
    assert asked.wait(60)
    assert drained.wait(60)
    store.row = replace(FIRST, revision=3)
    while read_slots(state).champion.version != "1":
        assert thread.is_alive()
    agent.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_a_store_that_comes_back_while_the_pod_ends_is_given_what_waits(state, store, registry):
    """Its volume goes with the pod: nobody would drain it later."""
    (state / "spool/one").mkdir(parents=True)
    failed, stored = [], []

    def upgrade():
        agent.stop()
        if len(failed) < 3:
            failed.append("away")
            raise ServiceUnavailable("away")

    def read_position(_, spool):
        stored.append(spool)

    store.upgrade, store.read_position = upgrade, read_position
    agent = Agent(state, "test_churn", whole(store), registry)
    thread = run_agent(agent)
    thread.join(60)
    assert not thread.is_alive()
    assert (len(failed), stored) == (3, ["one"])


def test_a_pass_under_way_does_not_hold_up_the_end(state, store, registry):
    """A pod's grace time is for the last drain: a pass over all that a slow store has left would use it up."""
    for name in ("one", "two", "three", "four"):
        writer = SpoolWriter(state / "spool" / name, 1_000_000)
        writer.append([Outcome(name, 1, FIRST.updated_at)])
        writer.close()
    offered = []

    def insert(records, position, **_):
        offered.extend(record.prediction_id for record in records)
        agent.stop()
        return InsertResult(0, len(records), 0, ())

    store.upgrade, store.insert, store.read_position = lambda: None, insert, lambda *_: None
    agent = Agent(state, "test_churn", whole(store), registry, last_drain_seconds=0)
    thread = run_agent(agent)
    thread.join(60)
    assert not thread.is_alive()
    assert len(offered) == 2  # a batch of the pass under way, a batch of the last one


def test_how_long_the_store_would_take_for_what_waits_is_shown(state, store, registry):
    writer = SpoolWriter(state / "spool/one", 1_000_000)
    writer.append([Outcome("a", 1, FIRST.updated_at)])
    writer.close()

    def insert(records, position, **_):
        time.sleep(0.01)
        return InsertResult(0, len(records), 0, ())

    store.upgrade, store.insert, store.read_position = lambda: None, insert, lambda *_: agent.stop()
    agent = Agent(state, "test_churn", whole(store), registry)
    thread = run_agent(agent)
    thread.join(60)
    assert build_registry(state / "metrics").get_sample_value("spool_drain_seconds") == 0
    assert read_progress(state / "spool").bytes_per_second < 50_000 / 0.01


def test_what_waits_is_measured_whatever_keeps_it_from_the_store(state, store, registry):
    """A newer release has upgraded the store: nothing is stored, and the alert goes by this figure."""
    (state / "spool/one").mkdir(parents=True)
    (state / "spool/one/00000001.log").write_bytes(b"0123456789")

    def refuse():
        agent.stop()
        raise ConfigError("the schema is newer")

    store.upgrade = refuse
    agent = Agent(state, "test_churn", whole(store), registry, last_drain_seconds=0)
    thread = run_agent(agent)
    thread.join(60)
    assert not thread.is_alive()
    assert build_registry(state / "metrics").get_sample_value("spool_depth_bytes") == 10


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

    agent = Agent(tmp_path, "shop_churn", whole(Watched(None)), None, last_drain_seconds=0)
    thread = threading.Thread(target=agent.run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    first, *rest = seen["follow"]
    assert first == os.getpriority(os.PRIO_PROCESS, 0)
    assert {*rest, *seen["drain"]} == {min(first + NICE, 19)}
