"""The wire format of Protocol Buffers, as much of it as OTLP needs: reading fields, writing what stands around them.

Promises: what `fields` yields lies within the bytes it was given; anything else raises Malformed. Knows no message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Buffer = bytes | memoryview

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

_MAX_VARINT_BITS = 64


class Malformed(ValueError):
    """Bytes that are not the message they should be."""


def varint(value: int) -> bytes:
    """A number from 0 on."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < _MAX_VARINT_BITS:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise Malformed("a number is cut off")


def fields(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Every field of the message in data[at:end]: number, wire type, and the bounds of its value; of a VARINT the value
    itself stands in place of the first bound."""
    while at < end:
        # Most tags and lengths are one byte, and what is read here is read often.
        tag = data[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = read_varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise Malformed("a field has the number 0")
        if kind == LENGTH:
            if at < end and (length := data[at]) < 0x80:
                at += 1
            else:
                length, at = read_varint(data, at, end)
            stop = at + length
        elif kind == VARINT:
            value, at = read_varint(data, at, end)
            yield number, kind, value, at
            continue
        elif kind == FIXED64:
            stop = at + 8
        elif kind == FIXED32:
            stop = at + 4
        else:
            raise Malformed(f"a field has the wire type {kind}")
        if stop > end:
            raise Malformed("a field is cut off")
        yield number, kind, at, stop
        at = stop


def read_fixed64(data: Buffer, at: int) -> int:
    """The value of a FIXED64 field, as an unsigned number."""
    return int(struct.unpack_from("<Q", data, at)[0])


def read_double(data: Buffer, at: int) -> float:
    """The value of a FIXED64 field, as a double."""
    return float(struct.unpack_from("<d", data, at)[0])


def number_field(number: int, value: int) -> bytes:
    """A VARINT field; a negative value as two's complement."""
    return varint(number << 3 | VARINT) + varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def length_field(number: int, data: bytes) -> bytes:
    """A LENGTH field: a string, bytes or a message."""
    return varint(number << 3 | LENGTH) + varint(len(data)) + data
