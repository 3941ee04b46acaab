"""A packaged model answers as the version that it was registered as, until a deployment row names one."""

from __future__ import annotations

import asyncio
import json

import pytest

from closedloop.contract import CONTRACT_FILE, MODEL_FILE, VERSION_FILE, CategoricalFeature, digest_folder
from closedloop.errors import DataError
from closedloop.serving.slots import holder as holder_module
from closedloop.serving.slots import slots as slots_module
from closedloop.serving.slots.holder import SlotHolder
from closedloop.serving.slots.slots import (
    BUNDLED,
    RefusedVersion,
    Slot,
    Slots,
    read_bundled,
    read_slots,
    take_up_waiting,
)
from tests.model_folders import FEATURES, write_model_folder, write_slots


@pytest.fixture
def folder(tmp_path):
    """A model folder as it stands in a Bento."""
    model = write_model_folder(tmp_path / "models/candidate")
    packaged = {"version": "3", "folder_sha256": digest_folder(model)}
    model.with_name(VERSION_FILE).write_text(json.dumps(packaged), encoding="utf-8")
    return model


@pytest.fixture
def holder(tmp_path, folder):
    return SlotHolder(tmp_path / "state", folder, range_margin=1.0)


def test_a_packaged_model_serves_as_its_version(holder, folder):
    assert read_bundled(folder) == Slot("3", str(folder), digest_folder(folder))
    holder.load_first()
    assert (holder.serving.champion.version, holder.serving.slots.revision) == ("3", 0)


def test_a_folder_given_by_hand_is_of_no_version(holder, folder):
    folder.with_name(VERSION_FILE).unlink()
    holder.load_first()
    assert holder.serving.champion.version == BUNDLED


def test_a_model_that_was_exchanged_since_is_not_served_as_that_version(holder, folder):
    write_model_folder(folder, bias=0.5)
    holder.load_first()
    assert holder.serving is None
    assert holder.refused["3"].startswith("digest: ")


@pytest.mark.parametrize("name", [MODEL_FILE, CONTRACT_FILE])
def test_a_refusal_names_no_path_of_this_machine(holder, folder, name, tmp_path):
    (folder / name).write_text("{}", encoding="utf-8")
    holder.load_first()
    reasons = list(holder.refused.values())  # it is not what was packaged
    folder.with_name(VERSION_FILE).unlink()
    holder.load_first()
    reasons += holder.refused.values()  # and it is no model
    assert len(reasons) == 2
    assert not [reason for reason in reasons if str(tmp_path) in reason]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 3}', '{"version": "3"}', '{"version": "../3", "folder_sha256": ""}']
)
def test_what_no_stage_wrote_is_named(folder, content):
    folder.with_name(VERSION_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=VERSION_FILE):
        read_bundled(folder)


def test_a_row_that_names_the_same_version_goes_on_with_it_and_another_takes_its_place(holder, folder, tmp_path):
    holder.load_first()
    packaged = holder.serving.champion
    for version, place in (("3", folder), ("4", write_model_folder(tmp_path / "4", bias=0.5))):
        write_slots(tmp_path / "state", Slots(int(version), "", Slot(version, str(place), digest_folder(place))))
        holder.load_first()
        assert (holder.serving.champion.version, holder.serving.slots.revision) == (version, int(version))
        assert (holder.serving.champion is packaged) == (version == "3")


@pytest.fixture
def other(tmp_path):
    """A version whose category has another name."""
    tariff = CategoricalFeature(name="tariff", categories=("basic", "plus"))
    folder = write_model_folder(tmp_path / "5", features=(*FEATURES[:2], tariff))
    return Slot("5", str(folder), digest_folder(folder))


@pytest.mark.parametrize("failures", [0, 2])
def test_a_rows_version_takes_the_place_of_a_bundled_model_whatever_features_it_takes(
    holder, other, tmp_path, monkeypatch, failures
):
    """Without a row the bundled model serves: it has no say in what comes after it, at once or at another try."""
    holder.load_first()
    load, left = slots_module.load_model, iter(range(failures))

    def load_in_the_end(*arguments, **options):
        if next(left, None) is not None:
            raise DataError("too many open files")
        return load(*arguments, **options)

    monkeypatch.setattr(slots_module, "load_model", load_in_the_end)
    monkeypatch.setattr(holder_module, "RETRY_SECONDS", 0)
    write_slots(tmp_path / "state", Slots(5, "", other))
    for _ in range(failures + 1):
        asyncio.run(holder.follow())
    assert (holder.serving.champion.version, holder.refused) == ("5", {})


def test_what_waits_for_a_start_is_what_new_workers_begin_with_and_running_ones_refuse(tmp_path, other):
    model, state = write_model_folder(tmp_path / "4"), tmp_path / "state"
    first = Slot("4", str(model), digest_folder(model))
    refusal = RefusedVersion("5", "contract: features differ")
    write_slots(state, Slots(2, "salt", first, refused=(refusal,), waiting=other))
    running, restarted = (SlotHolder(state, None, range_margin=1.0) for _ in range(2))
    running.load_first()
    assert running.serving.champion.version == "4"
    take_up_waiting(state)
    asyncio.run(running.follow())
    assert running.serving.champion.version == "4"
    assert running.refused["5"].startswith("contract: features differ from those being served: ")
    restarted.load_first()
    assert (restarted.serving.champion.version, restarted.serving.slots.revision, restarted.refused) == ("5", 2, {})


@pytest.mark.parametrize("waiting", [None, Slot("5", "/nowhere", "f" * 64)])
def test_without_a_whole_version_that_waits_workers_begin_with_what_served_last(tmp_path, waiting):
    model, state = write_model_folder(tmp_path / "4"), tmp_path / "state"
    take_up_waiting(state)
    assert read_slots(state) is None
    before = write_slots(state, Slots(2, "salt", Slot("4", str(model), digest_folder(model)), waiting=waiting))
    take_up_waiting(state)
    assert read_slots(state) == before


def test_slots_are_found_where_their_folder_was_moved_to(tmp_path):
    before, after = tmp_path / "before", tmp_path / "a b%2Fc"
    write_slots(before, Slots(2, "salt", Slot("7", str(before / "models/7"), "x")))
    assert read_slots(before).champion.folder == str(before / "models/7")
    before.rename(after)
    assert read_slots(after).champion.folder == str(after / "models/7")


@pytest.mark.parametrize("role", ["champion", "challenger", "waiting"])
@pytest.mark.parametrize("folder", ["../../../evil", "models/../../evil", "/etc", "", ".", "model\\..", "modelsx/7"])
def test_a_folder_elsewhere_is_read_by_nobody(tmp_path, caplog, role, folder):
    """Whoever can write this file alone lets no process read a folder of their choice."""
    state = tmp_path / "state"
    evil = write_model_folder(tmp_path / "evil")
    good = write_model_folder(state / "models/4/model")
    slots = {"champion": Slot("4", str(good), digest_folder(good))}
    write_slots(state, Slots(2, "salt", **{**slots, role: Slot("5", str(state / "models/5"), digest_folder(evil))}))
    path = state / "slots.json"
    path.write_text(path.read_text(encoding="utf-8").replace("models/5", json.dumps(folder)[1:-1]), encoding="utf-8")
    with pytest.raises(DataError, match=r"slots\.json: .* is not a folder in .*/state/models"):
        read_slots(state)
    take_up_waiting(state)
    holder = SlotHolder(state, None, range_margin=1.0)
    holder.load_first()
    assert holder.serving is None
    assert caplog.text.count("is not a folder in") == 2


def test_slots_that_cannot_be_read_keep_no_service_from_its_start(tmp_path, caplog):
    (tmp_path / "slots.json").write_text("{", encoding="utf-8")
    take_up_waiting(tmp_path)
    assert "slots.json" in caplog.text


def test_what_this_worker_alone_could_not_take_up_is_tried_again(holder, folder, tmp_path, monkeypatch):
    """As for want of memory or of file handles: the agent, which has proved the version, writes nothing anew."""
    monkeypatch.setattr(holder_module, "RETRY_SECONDS", 0.01)
    model, state = write_model_folder(tmp_path / "4"), tmp_path / "state"
    away = model.rename(tmp_path / "away")
    write_slots(state, Slots(4, "salt", Slot("4", str(model), digest_folder(away))))
    holder.load_first()
    assert holder.serving.champion.version == "3"  # what is packaged goes on
    assert set(holder.refused) == {"4"}
    asyncio.run(holder.follow())
    assert set(holder.refused) == {"4"}
    away.rename(model)
    asyncio.run(holder.follow())
    assert (holder.serving.champion.version, holder.refused) == ("4", {})

    async def wait():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(holder.follow(), 1.0)

    asyncio.run(wait())  # until the agent writes


def test_what_the_agent_refused_is_not_tried_again_here(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(holder_module, "RETRY_SECONDS", 0.01)
    write_slots(tmp_path / "state", Slots(4, "salt", None, refused=(RefusedVersion("4", "golden rows: none"),)))
    holder.load_first()
    assert holder.refused == {"4": "golden rows: none"}

    async def wait():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(holder.follow(), 1.0)

    asyncio.run(wait())
