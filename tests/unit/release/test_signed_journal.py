"""A journal with a key: who can write the store alone, or the registry alone, changes nothing that serves."""

from __future__ import annotations

import dataclasses
import datetime as dt
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from closedloop.core.release.hash_chain import extend_chain
from closedloop.core.release.policy import ReleasePolicy
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.release.by_hand import describe_proof, verify
from closedloop.release.controller import run_pass
from closedloop.release.evidence import Evidence
from closedloop.release.moves import Releases, deploy_champion
from closedloop.serving.slots.downloads import ReleasedVersions
from closedloop.store.database import Database
from closedloop.store.journal import Journal, read_entry
from closedloop.store.migrations.tables import JOURNAL
from tests.deployments import change_row
from tests.releases import DIGESTS, NAME, NOW, Registry, Traffic

OLD, NEW = b"o" * 32, b"n" * 32


@pytest.fixture
def unsigned(tmp_path: Path) -> Any:
    """Releases without a key: version 1 serves, then 2."""
    with closing(Database(f"sqlite:///{tmp_path / 'operations.db'}")) as database:
        database.upgrade()
        releases = Releases(Registry(), Journal(database))  # type: ignore[arg-type]
        promote(releases, "1")
        promote(releases, "2")
        yield releases


def promote(releases: Releases, version: str) -> None:
    deploy_champion(releases, version, now=NOW, actor="a test", reason="for the test")


def give_keys(releases: Releases, *keys: bytes) -> Releases:
    return dataclasses.replace(releases, journal=Journal(releases.journal.database, keys))


def pass_once(releases: Releases) -> None:
    traffic = Traffic()
    run_pass(releases, Evidence(traffic, traffic, traffic, "customer", 30), ReleasePolicy(), now=NOW, as_of=NOW)


def forge(releases: Releases, version: str) -> None:
    """Write the next entry and its row, as who can write the store alone does."""
    row, head = releases.journal.read_newest(NAME)
    entry = read_entry(head)  # type: ignore[arg-type]
    row = msgspec.structs.replace(entry.row, revision=entry.row.revision + 1, champion_version=version)
    forged = msgspec.structs.replace(entry, row=row)
    link = extend_chain(NAME, head, msgspec.json.encode(forged, order="sorted").decode())
    with releases.journal.database.begin() as connection:
        connection.execute(sa.insert(JOURNAL).values(dataclasses.asdict(link)))
    change_row(releases.journal.database, NAME, revision=row.revision, champion_version=version)


def test_a_journal_from_before_the_key_is_signed_by_the_next_pass_and_goes_on(unsigned: Releases) -> None:
    assert describe_proof(verify(unsigned))[1].startswith("not protected: no key is set, so whoever can write")
    signed = give_keys(unsigned, OLD)
    assert "the first 2 are from before the key" in describe_proof(verify(signed))[1]
    pass_once(signed)
    assert [entry.action for entry in signed.read_entries()] == ["promote", "promote", "signed"]
    proof = verify(signed)
    assert (proof.entries, proof.signed) == (3, 1)
    assert signed.journal.read_deployment(NAME) == unsigned.read_entries()[-1].row
    pass_once(signed)
    assert len(signed.read_entries()) == 3


def test_keys_are_rotated_and_the_old_one_signs_nothing_more(unsigned: Releases) -> None:
    pass_once(give_keys(unsigned, OLD))
    both = give_keys(unsigned, NEW, OLD)
    promote(both, "3")
    assert verify(both).signed == 2
    stolen = give_keys(unsigned, OLD)
    head = both.journal.read_newest(NAME)[1]
    entry = read_entry(head)  # type: ignore[arg-type]
    row = msgspec.structs.replace(entry.row, revision=4, champion_version="6")
    stolen.journal.append_entry(msgspec.structs.replace(entry, row=row), after=head)
    with pytest.raises(GateFailed, match="entry 5 is signed with the older key"):
        verify(both)


def test_without_the_key_a_signed_journal_is_neither_proved_nor_continued(unsigned: Releases) -> None:
    pass_once(give_keys(unsigned, OLD))
    with pytest.raises(ConfigError, match="is signed: set CLOSEDLOOP_RELEASE__JOURNAL_KEY to prove it"):
        verify(unsigned)
    with pytest.raises(ConfigError, match="without which no move is made"):
        promote(unsigned, "3")


@pytest.mark.parametrize("before", ["unsigned", "signed"])
def test_the_next_entry_of_who_can_write_the_store_alone_is_put_in_force_by_nobody(
    unsigned: Releases, before: str
) -> None:
    signed = give_keys(unsigned, OLD)
    if before == "signed":
        pass_once(signed)
    forge(signed, "6")
    with pytest.raises(DataError, match=r"entry \d is not signed, though CLOSEDLOOP_RELEASE__JOURNAL_KEY is set"):
        signed.journal.read_deployment(NAME)  # the service
    with pytest.raises(DataError, match=r"entry \d is not signed"):
        pass_once(signed)
    assert signed.tracking.champion == "2"  # type: ignore[attr-defined]
    with pytest.raises(GateFailed, match=r"entry \d is not signed"):
        verify(signed)


def test_a_digest_that_was_changed_in_the_registry_fails_and_is_not_taken_over(unsigned: Releases) -> None:
    assert unsigned.read_entries()[-1].row.digests == {"2": DIGESTS[2]}
    tags = unsigned.tracking.tags["2"]  # type: ignore[attr-defined]
    tags["closedloop.folder_sha256"] = "e" * 64
    with pytest.raises(GateFailed, match=f"version 2 was released with the digest {DIGESTS[2][:12]}, the"):
        verify(unsigned)
    promote(unsigned, "3")
    promote(unsigned, "2")  # the journal remembers
    assert unsigned.read_entries()[-1].row.digests == {"2": DIGESTS[2]}


def test_a_changed_model_is_refused_by_whoever_reads_a_version_by_its_number(
    unsigned: Releases, tmp_path: Path
) -> None:
    """`why`, `reproduce` and the import of edge records: the registry alone is not believed."""
    versions = ReleasedVersions(unsigned.tracking, unsigned.journal.read_digests(NAME))
    assert unsigned.journal.read_digests(NAME) == {"1": DIGESTS[1], "2": DIGESTS[2]}
    for number in ("1", "2", "3"):  # 3 was never released: the registry's digest is all that there is
        (tmp_path / number).mkdir()
        assert versions.fetch_version(number, tmp_path / number)[1] == DIGESTS[int(number)]
    unsigned.tracking.tags["1"]["closedloop.folder_sha256"] = DIGESTS[4]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=f"names the digest {DIGESTS[4][:12]}, the journal released it with"):
        versions.fetch_version("1", tmp_path / "1")


@pytest.mark.parametrize("version", ["../../../evil", "2\n", "0", "", "-1", "\uff12", "2/../3", "bundled", "9" * 30])
def test_a_version_that_is_no_number_of_the_registry_is_read_by_nobody(unsigned: Releases, version: str) -> None:
    for column in ("champion_version", "challenger_version"):
        values = {"challenger_version": "1", "challenger_mode": "shadow", column: version}
        change_row(unsigned.journal.database, NAME, **values)
        for read in (unsigned.read_state, lambda: unsigned.journal.read_deployment(NAME)):
            with pytest.raises(DataError, match=rf"shop_churn: the deployment row cannot be read: .*{column}"):
                read()
        change_row(unsigned.journal.database, NAME, champion_version="2")
    link = unsigned.journal.read(NAME)[-1]
    named = f'"champion_version":{msgspec.json.encode(version).decode()}'
    changed = dataclasses.replace(link, entry=link.entry.replace('"champion_version":"2"', named))
    with pytest.raises(DataError, match=r"entry 2: .*champion_version"):
        read_entry(changed)


@pytest.mark.parametrize(
    "values",
    [
        {"revision": 1, "champion_version": "1"},
        {"champion_version": "3"},
        {"salt": "known"},
        {"updated_at": NOW - dt.timedelta(seconds=1)},
        {"challenger_version": "1", "challenger_mode": "canary", "weight": 1.0},
    ],
)
def test_a_row_that_no_entry_wrote_is_read_by_nobody(unsigned: Releases, values: dict[str, Any]) -> None:
    change_row(unsigned.journal.database, NAME, **values)
    for read in (unsigned.read_state, lambda: unsigned.journal.read_deployment(NAME)):
        with pytest.raises(DataError, match="entry 2 of the journal did not write it"):
            read()
