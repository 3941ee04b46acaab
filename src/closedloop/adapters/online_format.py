"""The formats of Feast's online store: keys, values and times.

They are those of Feast 0.67 with entity keys of version 3; the integration test compares every type with Feast's own
client. A value is a ``ValueProto`` message, of which only numbers and text are decoded.
"""

from __future__ import annotations

import datetime as dt
import logging
import struct
from collections.abc import Sequence
from typing import NamedTuple

from closedloop.contract import JOIN_KEY
from closedloop.rules import Value

logger = logging.getLogger(__name__)
STRING_TYPE = 2  # feast.types.ValueType.STRING
KEY_START = struct.pack("<III", 1, STRING_TYPE, len(JOIN_KEY)) + JOIN_KEY.encode() + struct.pack("<I", STRING_TYPE)
# A message's first byte holds field number and wire type; these are the fields of a ValueProto
TEXT, INT32, INT64, DOUBLE, FLOAT, BOOL = 0x12, 0x18, 0x20, 0x29, 0x35, 0x38
NULL = b"\x98\x01"
SECONDS, NANOSECONDS = b"\x08", b"\x10"  # of a Timestamp
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_unpack_double, _unpack_float = struct.Struct("<xd").unpack, struct.Struct("<xf").unpack


class OnlineRow(NamedTuple):
    """A customer's values in the requested order (numbers are floats), and their snapshot (UTC); None if unknown.

    A snapshot without values means that this customer's stored row cannot be decoded.
    """

    values: tuple[Value, ...] | None
    snapshot_at: dt.datetime | None


UNKNOWN = OnlineRow(None, None)
UNREADABLE = OnlineRow(None, dt.datetime.fromtimestamp(0, dt.UTC))


def encode_key(customer_id: str) -> bytes:
    """Feast's entity key; an id that is not valid Unicode gets a key that no customer has."""
    encoded = customer_id.encode("utf-8", "surrogatepass")
    return KEY_START + struct.pack("<I", len(encoded)) + encoded


def encode_text(value: str) -> bytes:
    """A ``ValueProto`` of a text."""
    encoded = value.encode()
    return bytes([TEXT]) + _write_varint(len(encoded)) + encoded


def encode_time(at: dt.datetime) -> bytes:
    """A ``Timestamp`` of a time from 1970 on; nothing stands for a number that is 0."""
    whole, parts = divmod(at - EPOCH, dt.timedelta(seconds=1))
    fields = ((SECONDS, whole), (NANOSECONDS, parts // dt.timedelta(microseconds=1) * 1_000))
    return b"".join(tag + _write_varint(number) for tag, number in fields if number)


def decode_row(values: Sequence[bytes | None], stamp: int | bytes) -> OnlineRow:
    """The row of these messages; `UNREADABLE` where one is neither number nor text."""
    try:
        return OnlineRow(tuple([_decode_value(value) if value else None for value in values]), _decode_time(stamp))
    except (IndexError, OverflowError, TypeError, ValueError, struct.error) as error:
        logger.error("online store: a value that is neither number nor text: %s", error)
        return UNREADABLE  # the other rows of this read are not affected


def _decode_value(message: bytes) -> Value:
    """Decode a ``ValueProto`` that is not empty: it holds one field, so its first tag gives the type."""
    tag = message[0]
    if tag == DOUBLE:
        return _unpack_double(message)[0]  # type: ignore[no-any-return]
    if tag == TEXT:
        return message[_read_varint(message, 1)[1] :].decode()
    if tag in (INT64, INT32, BOOL):
        return float(_read_varint(message, 1)[0])
    if tag == FLOAT:
        return _unpack_float(message)[0]  # type: ignore[no-any-return]
    if message.startswith(NULL):
        return None
    raise ValueError(f"a message that starts with byte {tag:#04x}")


def _decode_time(stamp: int | bytes) -> dt.datetime:
    """Decode a row's time: Redis holds a ``Timestamp`` message, SQLite a UTC time that Feast wrote as a local one."""
    if isinstance(stamp, bytes):
        seconds = _read_varint(stamp, 1)[0] if stamp[:1] == SECONDS else 0
        return dt.datetime.fromtimestamp(seconds, dt.UTC)
    return dt.datetime.fromtimestamp(stamp, dt.UTC).astimezone().replace(tzinfo=dt.UTC)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Decode a signed 64-bit integer (seven bits a byte, the lowest first); return it and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value - (1 << 64 if value >> 63 else 0), position


def _write_varint(number: int) -> bytes:
    """Encode a number that is not negative, as `_read_varint` reads it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
