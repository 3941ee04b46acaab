"""The files of a spool, as the drain and others read them.

A line is eight hexadecimal digits of CRC-32, a space, the record as JSON and a newline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from closedloop.records import Record

CHECKSUM_LENGTH = 8

_decode = msgspec.json.Decoder(Record).decode


class SpoolLine(NamedTuple):
    """A line and where it stands in its segment, in bytes; ``problem`` says why ``record`` is None."""

    start: int
    content: bytes
    record: Record | None
    problem: str = ""

    @property
    def end(self) -> int:
        """Where the next line starts."""
        return self.start + len(self.content)

    @property
    def torn(self) -> bool:
        """Whether its end is not there: not yet, or never, if its writer is dead."""
        return not self.content.endswith(b"\n")


def read_lines(segment: Path, offset: int = 0) -> Iterator[SpoolLine]:
    """The lines of a segment from a position on; only the last one can be torn."""
    with segment.open("rb") as stream:
        stream.seek(offset)
        for content in stream:
            yield SpoolLine(offset, content, *_read_line(content))
            offset += len(content)


def _read_line(content: bytes) -> tuple[Record | None, str]:
    checksum, body = content[: CHECKSUM_LENGTH + 1], content[CHECKSUM_LENGTH + 1 : -1]
    if not content.endswith(b"\n"):
        return None, "the line is torn"
    if checksum != b"%08x " % crc32(body):
        return None, "the checksum is wrong"
    try:
        return _decode(body), ""
    except msgspec.MsgspecError as error:
        return None, f"not a record of this release: {error}"


def list_spools(root: Path) -> list[Path]:
    """The folders of all writers, living and dead, by name."""
    return sorted(path for path in root.glob("[!.]*") if path.is_dir())


def list_segments(spool: Path) -> list[Path]:
    """The files of a spool, oldest first; only the last one of a living writer can still grow."""
    return sorted(spool.glob("[0-9]*.log"))
