"""A hash chain: each entry's hash covers its text and the hash before, so that no past entry changes unseen.

With a key the hash is an HMAC: who does not hold the key cannot write the next entry either. Keys are given newest
first: the first one signs, all of them prove. A chain that began without a key goes on with one, and never back.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

KEYED_HASH = re.compile(r"([0-9a-f]{8}):[0-9a-f]{64}")
GENESIS = "0" * 64


@dataclass(frozen=True)
class Link:
    """One entry of a chain; ``entry`` is its text, ``sequence`` counts from 1."""

    model_name: str
    sequence: int
    entry: str
    previous_hash: str
    hash: str

    @property
    def key_name(self) -> str | None:
        """`name_key` of the key that signed it; None: it is not signed."""
        found = KEYED_HASH.fullmatch(self.hash)
        return found[1] if found else None

    @property
    def mark(self) -> str:
        """Sequence and hash, as they are kept elsewhere: with them a cut tail is seen."""
        return f"{self.sequence} {self.hash}"


def name_key(key: bytes) -> str:
    """The name by which a hash says which key made it: 8 hexadecimal digits, of which the key does not follow."""
    return hashlib.sha256(b"closedloop journal key\n" + key).hexdigest()[:8]


def hash_entry(model_name: str, sequence: int, entry: str, previous_hash: str, key: bytes = b"") -> str:
    """SHA-256, or HMAC with a key, over name, place, the hash before and the text; hexadecimal, after the key's name.

    Examples
    --------
    >>> hash_entry("shop", 1, "{}", GENESIS)[:12]
    'ac8fa5fb93de'
    >>> hash_entry("shop", 1, "{}", GENESIS, b"secret")[:12]
    'a7d6bac4:11f'
    """
    text = f"{model_name}\n{sequence}\n{previous_hash}\n{entry}".encode()
    if not key:
        return hashlib.sha256(text).hexdigest()
    return f"{name_key(key)}:{hmac.new(key, text, hashlib.sha256).hexdigest()}"


def extend_chain(model_name: str, head: Link | None, entry: str, keys: Sequence[bytes] = ()) -> Link:
    """The link that comes after ``head``, signed with the first key; None begins a chain."""
    sequence, previous = (head.sequence + 1, head.hash) if head else (1, GENESIS)
    signed = hash_entry(model_name, sequence, entry, previous, keys[0] if keys else b"")
    return Link(model_name, sequence, entry, previous, signed)


def check_link(link: Link, keys: Sequence[bytes]) -> str | None:
    """The fault of a link by itself; None if its hash is that of its content, by a key that is known."""
    key = b"" if link.key_name is None else next((one for one in keys if name_key(one) == link.key_name), None)
    if key is None:
        return f"entry {link.sequence} is signed with the key {link.key_name}, which is not among the keys given"
    expected = hash_entry(link.model_name, link.sequence, link.entry, link.previous_hash, key)
    if not hmac.compare_digest(link.hash, expected):
        return f"entry {link.sequence} was changed: its hash is not that of its content"
    return None


def find_break(links: Sequence[Link], mark: str | None = None, keys: Sequence[bytes] = ()) -> str | None:
    """Where a chain is broken, and how; None if it holds.

    Parameters
    ----------
    links
        All of a chain, in the order of their sequence.
    mark
        `Link.mark` of what was its head at some time, as it is kept elsewhere.
    keys
        All keys that ever signed it, the newest first.
    """
    head: Link | None = None
    # the places of keys, of which a chain takes ever newer ones; none at all comes before the oldest
    places = {None: len(keys)} | {name_key(key): place for place, key in enumerate(keys)}
    for link in links:
        expected = head.sequence + 1 if head else 1
        if link.sequence != expected:
            return f"entry {expected} is missing: entry {link.sequence} follows {expected - 1 or 'the beginning'}"
        if wrong := check_link(link, keys):
            return wrong
        if link.previous_hash != (head.hash if head else GENESIS):
            return f"entry {link.sequence} does not follow entry {expected - 1}: it names another hash before it"
        if head and places[link.key_name] > places[head.key_name]:
            found = "is not signed" if link.key_name is None else f"is signed with the older key {link.key_name}"
            return f"entry {link.sequence} {found}, though entry {head.sequence} is signed with {head.key_name}"
        head = link
    if mark is None:
        return None
    place, _, found = mark.partition(" ")
    if not place.isdecimal() or not int(place) > 0:
        return f"the head that the registry names is no entry: {mark!r}"
    if int(place) > len(links):
        return f"entry {len(links) + 1} is missing: the journal ends before entry {place}, which the registry names"
    if links[int(place) - 1].hash != found:
        return f"entry {place} was changed: the registry names another hash for it"
    return None
