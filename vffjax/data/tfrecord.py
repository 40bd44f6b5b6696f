"""TFRecord files, read without TensorFlow.

A file is a sequence of records. Each record is stored as its length (8 bytes), the checksum of the length (4 bytes), the record itself, and
the checksum of the record (4 bytes). Numbers are little-endian.
"""

import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt32

CRC_MASK = 0xA282EAD8  # the format adds this to every rotated checksum
CHUNK = 5_000  # records whose checksums are computed at once: enough to be fast, and few enough to bound the memory


def records(path: pathlib.Path) -> list[memoryview]:
    """Reads all records of a file, as views of its bytes, and verifies their checksums.

    Raises:
        ValueError: the file is truncated or a checksum does not match. The message names the record.
    """
    data, at = memoryview(path.read_bytes()), 0
    heads: list[memoryview] = []
    bodies: list[memoryview] = []
    while at < len(data):
        size = struct.unpack_from("<Q", data, at)[0] if at + 16 <= len(data) else len(data)
        if at + 16 + size > len(data):
            raise ValueError(f"truncated or damaged: record {len(bodies)} does not fit in the file")
        heads.append(data[at : at + 12])
        bodies.append(data[at + 12 : at + 16 + size])
        at += 16 + size
    # Lengths first: after a wrong length, the rest of the file is not divided into records correctly.
    for parts in (heads, bodies):
        for start in range(0, len(parts), CHUNK):
            bad = bad_checksums(parts[start : start + CHUNK])
            if bad.size:
                raise ValueError(f"the checksum of record {start + bad[0]} does not match")
    return [body[:-4] for body in bodies]


def crc32c(strings: Sequence[bytes | memoryview]) -> UInt32[np.ndarray, " n"]:
    """CRC-32C (Castagnoli; RFC 3720, appendix B.4) of each string. Every string has at least 4 bytes.

    All strings are processed at once, two bytes in each turn of the loop.

    >>> [hex(crc) for crc in crc32c([b"123456789"])]
    ['0xe3069283']
    """
    width = max(map(len, strings), default=0)
    width += width % 2
    # Strings are aligned at their ends, behind zeros: a register of zeros stays zero over leading zeros. The register has to start with all
    # ones, which is the same as inverting the first four bytes of the string.
    block = np.zeros((len(strings), width), np.uint8)
    for row, string in zip(block, strings, strict=True):
        start = width - len(string)
        row[start:] = np.frombuffer(string, np.uint8)
        row[start : start + 4] ^= 0xFF
    table: np.ndarray = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    crc: np.ndarray = np.zeros(len(strings), np.uint32)
    for pair in np.ascontiguousarray(block.view("<u2").T):
        crc = table[(crc ^ pair) & 0xFFFF] ^ (crc >> 16)
    return ~crc


def masked_crc32c(strings: Sequence[bytes | memoryview]) -> UInt32[np.ndarray, " n"]:
    """The checksums of strings in the form that TFRecord files store: rotated by 15 bits, plus a constant."""
    crc = crc32c(strings)
    return ((crc >> 15) | (crc << 17)) + np.uint32(CRC_MASK)


def bad_checksums(parts: Sequence[bytes | memoryview]) -> Int[np.ndarray, " bad"]:
    """The indices of damaged strings. Each string ends with its stored checksum."""
    if min(map(len, parts)) < 8:  # too short for an image, and for `crc32c`
        return np.flatnonzero([len(part) < 8 for part in parts])
    return np.flatnonzero(masked_crc32c([part[:-4] for part in parts]) != np.frombuffer(b"".join(part[-4:] for part in parts), "<u4"))
