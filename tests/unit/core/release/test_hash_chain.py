"""The chain of hashes: any change of what was written is named with its place."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.release.hash_chain import GENESIS, Link, extend_chain, find_break, name_key


def make_chain(count: int, name: str = "shop") -> list[Link]:
    links: list[Link] = []
    for number in range(1, count + 1):
        links.append(extend_chain(name, links[-1] if links else None, f'{{"move":{number}}}'))
    return links


def test_a_hash_is_over_name_place_hash_before_and_text() -> None:
    first, second = make_chain(2)
    expected = hashlib.sha256(b"shop\n1\n" + b"0" * 64 + b'\n{"move":1}').hexdigest()
    assert (first.sequence, first.previous_hash, first.hash) == (1, GENESIS, expected)
    assert (second.sequence, second.previous_hash) == (2, first.hash)
    assert second.mark == f"2 {second.hash}"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_whole_chain_holds_whichever_of_its_entries_was_the_head(count: int) -> None:
    links = make_chain(count)
    assert find_break(links) is None
    for link in links:
        assert find_break(links, link.mark) is None


@given(
    place=st.integers(0, 4),
    name=st.sampled_from(["entry", "previous_hash", "hash", "model_name"]),
    position=st.integers(0, 10**6),
    bit=st.integers(0, 6),
)
def test_any_changed_bit_is_found_at_its_entry_or_the_next(place: int, name: str, position: int, bit: int) -> None:
    links = make_chain(5)
    value = getattr(links[place], name)
    at = position % len(value)
    changed = value[:at] + chr(ord(value[at]) ^ (1 << bit)) + value[at + 1 :]
    links[place] = dataclasses.replace(links[place], **{name: changed})
    assert find_break(links) == f"entry {place + 1} was changed: its hash is not that of its content"


def test_an_entry_that_was_hashed_anew_is_found_by_the_next_and_the_last_by_the_mark() -> None:
    links = make_chain(3)
    forged = extend_chain("shop", links[0], '{"move":22}')
    expected = "entry 3 does not follow entry 2: it names another hash before it"
    assert find_break([links[0], forged, links[2]]) == expected
    forged = extend_chain("shop", links[1], '{"move":33}')
    assert find_break([*links[:2], forged]) is None
    expected = "entry 3 was changed: the registry names another hash for it"
    assert find_break([*links[:2], forged], links[2].mark) == expected


def test_missing_entries_are_named() -> None:
    links = make_chain(5)
    assert find_break(links[1:]) == "entry 1 is missing: entry 2 follows the beginning"
    assert find_break([*links[:2], *links[3:]]) == "entry 3 is missing: entry 4 follows 2"
    cut = "entry 5 is missing: the journal ends before entry 5, which the registry names"
    assert find_break(links[:4]) is None
    assert find_break(links[:4], links[4].mark) == cut
    cut = "entry 1 is missing: the journal ends before entry 1, which the registry names"
    assert find_break([], links[0].mark) == cut


def test_an_entry_of_another_model_is_no_entry_of_this_one() -> None:
    links = make_chain(2)
    other = make_chain(2, "bank")
    assert find_break([links[0], other[1]]) == "entry 2 does not follow entry 1: it names another hash before it"


@pytest.mark.parametrize("mark", ["", "x", "0 abc", "-1 abc"])
def test_a_mark_that_names_no_entry_is_a_break(mark: str) -> None:
    assert find_break(make_chain(2), mark) == f"the head that the registry names is no entry: {mark!r}"


NEW, OLD = b"n" * 32, b"o" * 32


def sign_chain(*signed: tuple[bytes, ...]) -> list[Link]:
    """A chain of which each entry was written where these keys were given."""
    links: list[Link] = []
    for number, keys in enumerate(signed, start=1):
        links.append(extend_chain("shop", links[-1] if links else None, f'{{"move":{number}}}', keys))
    return links


def test_a_signed_hash_is_an_hmac_and_names_its_key() -> None:
    (link,) = sign_chain((NEW, OLD))
    text = b"shop\n1\n" + b"0" * 64 + b'\n{"move":1}'
    assert link.hash == f"{name_key(NEW)}:{hmac.new(NEW, text, hashlib.sha256).hexdigest()}"
    assert link.key_name == name_key(NEW) != name_key(OLD)
    assert find_break([link], link.mark, (NEW,)) is None


def test_a_chain_goes_on_with_a_key_and_with_the_next_one() -> None:
    links = sign_chain((), (), (OLD,), (OLD,), (NEW, OLD))
    assert find_break(links, links[2].mark, (NEW, OLD)) is None
    gone = f"entry 3 is signed with the key {name_key(OLD)}, which is not among the keys given"
    assert find_break(links, keys=(NEW,)) == gone
    assert find_break(links) == gone


@pytest.mark.parametrize(
    ("signed", "words"),
    [
        (((NEW,), ()), f"entry 2 is not signed, though entry 1 is signed with {name_key(NEW)}"),
        (((NEW,), (OLD,)), f"entry 2 is signed with the older key {name_key(OLD)}, though entry 1 is signed"),
        (((), (NEW,), ()), "entry 3 is not signed"),
    ],
)
def test_a_chain_never_goes_back_to_an_older_key_or_to_none(signed: tuple[tuple[bytes, ...], ...], words: str) -> None:
    """Who got at an old key, or has none, can compute such an entry."""
    assert str(find_break(sign_chain(*signed), keys=(NEW, OLD))).startswith(words)


def test_a_signed_entry_that_was_computed_without_the_key_is_named() -> None:
    first, second = sign_chain((NEW,), (NEW,))
    forged = dataclasses.replace(second, entry='{"move":9}')
    guessed = extend_chain("shop", first, '{"move":9}', (b"g" * 32,))
    renamed = dataclasses.replace(guessed, hash=f"{name_key(NEW)}:{guessed.hash.partition(':')[2]}")
    for wrong in (forged, renamed):
        assert find_break([first, wrong], keys=(NEW,)) == "entry 2 was changed: its hash is not that of its content"
