"""A hash chain: each entry's hash covers its text and the hash before, so that no past entry changes unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
    def mark(self) -> str:
        """Sequence and hash, as they are kept elsewhere: with them a cut tail is seen."""
        return f"{self.sequence} {self.hash}"


def hash_entry(model_name: str, sequence: int, entry: str, previous_hash: str) -> str:
    """SHA-256 over name, place, the hash before and the text, as hexadecimal digits.

    Examples
    --------
    >>> hash_entry("shop", 1, "{}", GENESIS)[:12]
    'ac8fa5fb93de'
    """
    return hashlib.sha256(f"{model_name}\n{sequence}\n{previous_hash}\n{entry}".encode()).hexdigest()


def extend_chain(model_name: str, head: Link | None, entry: str) -> Link:
    """The link that comes after ``head``; None begins a chain."""
    sequence, previous = (head.sequence + 1, head.hash) if head else (1, GENESIS)
    return Link(model_name, sequence, entry, previous, hash_entry(model_name, sequence, entry, previous))


def find_break(links: Sequence[Link], mark: str | None = None) -> str | None:
    """Where a chain is broken, and how; None if it holds.

    Parameters
    ----------
    links
        All of a chain, in the order of their sequence.
    mark
        `Link.mark` of what was its head at some time, as it is kept elsewhere.
    """
    head: Link | None = None
    for link in links:
        expected = head.sequence + 1 if head else 1
        if link.sequence != expected:
            return f"entry {expected} is missing: entry {link.sequence} follows {expected - 1 or 'the beginning'}"
        if link.hash != hash_entry(link.model_name, link.sequence, link.entry, link.previous_hash):
            return f"entry {link.sequence} was changed: its hash is not that of its content"
        if link.previous_hash != (head.hash if head else GENESIS):
            return f"entry {link.sequence} does not follow entry {expected - 1}: it names another hash before it"
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
