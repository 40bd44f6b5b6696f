"""The checksums of TFRecord files."""

import numpy as np

CRC_MASK = 0xA282EAD8  # what the TFRecord format adds to every rotated checksum


def crc32c(strings: list[bytes]) -> np.ndarray:
    """CRC-32C (Castagnoli) of each string, uint32 [n]; each at least 4 bytes. The loop runs over positions, not over strings."""
    width = max(map(len, strings), default=0)
    width += width % 2
    # Right-aligned: a register of zeros stays zero over leading zeros. Its true start, all ones, is then inverting the first four bytes.
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


def masked_crc32c(strings: list[bytes]) -> np.ndarray:
    """The checksums as TFRecord files store them, uint32 [n]."""
    crc = crc32c(strings)
    return ((crc >> 15) | (crc << 17)) + np.uint32(CRC_MASK)


def bad_checksums(parts: list[bytes]) -> np.ndarray:
    """Which strings, each ending in its stored checksum, are damaged."""
    if min(map(len, parts)) < 8:  # too short for an image, and for `crc32c`
        return np.flatnonzero([len(part) < 8 for part in parts])
    return np.flatnonzero(masked_crc32c([part[:-4] for part in parts]) != np.frombuffer(b"".join(part[-4:] for part in parts), "<u4"))
