"""A packaged model answers as the version that it was registered as, until a deployment row names one."""

from __future__ import annotations

import json

import pytest

from closedloop.contract import VERSION_FILE, digest_folder
from closedloop.errors import DataError
from closedloop.serving.slots import BUNDLED, Slot, SlotHolder, Slots, read_bundled, write_slots
from tests.model_folders import write_model_folder


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


@pytest.mark.parametrize("content", ["", "[]", '{"version": 3}', '{"version": "3"}'])
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
