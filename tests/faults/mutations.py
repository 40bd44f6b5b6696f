"""Sound images of many kinds, and mutations of images and safetensors files. Nothing here is a test; used by `fuzz.py`."""

import functools
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@functools.cache
def images():
    """{"png": [bytes, ...], "jpg": [...], ...}: modes, depths, sizes, interlaced and progressive, with and without metadata."""
    rng = np.random.default_rng(0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time of day, so that the files are the same in every process
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words " * 20
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a text")
    text.add_text("Long", "z" * 5_000, zip=True)
    text.add_itxt("International", "ä" * 300, "de", "Wort", zip=True)

    def picture(mode, width, height):
        smooth = Image.fromarray(rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)).resize((width, height))
        if mode == "I;16":
            return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
        return smooth.convert(mode)

    def saved(image, form, **options):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    png = [saved(picture(mode, 17, 13), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    png += [saved(picture("RGB", *size), "PNG") for size in ((1, 1), (64, 3), (200, 150))]
    png.append(saved(picture("RGB", 20, 20), "PNG", pnginfo=text, icc_profile=profile, exif=exif, dpi=(72, 72)))
    png.append(saved(picture("P", 20, 20), "PNG", transparency=3, bits=4))
    png.append(saved(picture("RGB", 20, 20), "PNG", transparency=(1, 2, 3)))
    png.append(saved(picture("RGB", 9, 9), "PNG", save_all=True, append_images=[picture("RGB", 9, 9)]))  # animated
    png += [png_of(rng, 11, 9, depth, colour, adam7) for depth, colour in ((8, 2), (16, 2), (16, 6), (8, 0), (2, 0)) for adam7 in (0, 1)]
    jpg = [saved(picture(mode, 33, 21), "JPEG") for mode in ("L", "RGB", "CMYK")]
    jpg += [saved(picture("RGB", *size), "JPEG", quality=90, subsampling=0) for size in ((1, 1), (8, 64), (160, 120))]
    jpg += [saved(picture(mode, 40, 40), "JPEG", progressive=True, optimize=True) for mode in ("L", "RGB")]
    jpg.append(saved(picture("RGB", 24, 24), "JPEG", exif=exif, icc_profile=profile, comment=b"words"))
    jpg.append(saved(picture("RGB", 48, 48), "JPEG", restart_marker_blocks=2))
    webp = [saved(picture(mode, 17, 13), "WEBP", lossless=lossless) for mode in ("RGB", "RGBA") for lossless in (False, True)]
    webp += [saved(picture("RGB", *size), "WEBP", exif=exif, icc_profile=profile) for size in ((1, 1), (200, 150))]
    webp.append(saved(picture("RGB", 9, 9), "WEBP", save_all=True, append_images=[picture("RGB", 9, 9)]))  # animated
    bmp = [saved(picture(mode, 17, 13), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    return {"png": png, "jpg": jpg, "webp": webp, "bmp": bmp}


def png_of(rng, width, height, depth, colour, adam7):
    """A PNG as Pillow does not write them: interlaced, or of 16-bit colours."""
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)] if adam7 else [(0, 0, 1, 1)]
    rows = b""
    for x, y, across, down in grid:
        columns, lines = len(range(x, width, across)), len(range(y, height, down))
        rows += b"".join(b"\0" + rng.bytes((columns * bits + 7) // 8) for _ in range(lines if columns else 0))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, adam7)
    return join_png([(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def join_png(chunks):
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return SIGNATURE + b"".join(framed)


def cut_png(content):
    chunks, at = [], len(SIGNATURE)
    while at + 12 <= len(content):
        size = struct.unpack_from(">I", content, at)[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


# ----------------------------------------------------------------------------------------------------------------------------------
# Mutations of any file


def flip(rng, content, _):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwrite(rng, content, _):
    content, at = bytearray(content), rng.randrange(len(content) + 1)
    content[at : at + rng.choice([1, 2, 4, 8])] = rng.choice(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff", b"\0"]
    )
    return bytes(content)


def truncate(rng, content, _):
    return content[: rng.randrange(len(content) + 1)]


def splice(rng, content, others):
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def repeat(rng, content, _):
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice([1, 4, 16, 256]))
    return content[:end] + content[start:end] * rng.choice([1, 2, 50]) + content[end:]


def drop(rng, content, _):
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice([1, 2, 4, 16, 256]) :]


def noise(rng, content, _):
    return rng.choice([b"", rng.randbytes(rng.randrange(200)), content[:16] + rng.randbytes(300)])


ANY = [flip, flip, overwrite, truncate, splice, repeat, drop]


# Mutations of PNG, whose checksums are right again, so that what lies behind the checksums is reached


def png_chunk(rng, content, others):
    chunks = cut_png(content)
    i = rng.randrange(len(chunks))
    kind, data = chunks[i]
    chunks[i] = (kind, rng.choice(ANY)(rng, data, [d for _, d in chunks] + [b"x"]) if data else rng.randbytes(8))
    return join_png(chunks)


def png_head(rng, content, _):
    chunks = cut_png(content)
    head = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    for _ in range(rng.choice([1, 1, 2])):
        field = rng.randrange(7)
        sizes = [0, 1, 7, 4_000, 8_191, 8_192, 8_193, 30_000, 2**31 - 1, 2**31, 2**32 - 1]
        head[field] = rng.choice(sizes) if field < 2 else rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
    chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *head))
    return join_png(chunks)


def png_order(rng, content, others):
    chunks = [*cut_png(content), rng.choice(cut_png(rng.choice(others)))]
    body = chunks[1:]
    rng.shuffle(body)
    return join_png(chunks[:1] + body)


def png_pixels(rng, content, _):
    chunks = cut_png(content)
    packed = b"".join(d for k, d in chunks if k == b"IDAT")
    rows = rng.choice(ANY)(rng, zlib.decompress(packed), [packed])
    return join_png([chunks[0], *(c for c in chunks[1:] if c[0] not in (b"IDAT", b"IEND")), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def png_length(rng, content, _):
    at, ends = len(SIGNATURE), []
    while at + 12 <= len(content):
        ends.append(at)
        at += 12 + struct.unpack_from(">I", content, at)[0]
    at = rng.choice(ends)
    return content[:at] + struct.pack(">I", rng.choice([0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**16)])) + content[at + 4 :]


def png_bomb(rng, content, _):
    """Little to send, much to hold: text that unpacks to megabytes, or as many pixels as are allowed."""
    if rng.random() < 0.9:
        chunks, bomb = cut_png(content), zlib.compress(b"A" * rng.choice([10**5, 10**7]), 1)
        extra = rng.choice([(b"zTXt", b"k\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)])
        return join_png([chunks[0], *[extra] * rng.choice([1, 3]), *chunks[1:]])
    side, colour = 8_192, rng.choice([0, 2, 6])
    line = bytes(1 + side * {0: 1, 2: 3, 6: 4}[colour])
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    return join_png([(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")])


# Mutations of JPEG: its segments


def jpg_segment(rng, content, _):
    at, found = 2, []
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        found.append(at)
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    at = rng.choice(found or [0])
    size = struct.unpack_from(">H", content, at + 2)[0]
    segment = content[at : at + 2 + size]
    change = rng.randrange(4)
    if change == 0:  # another length
        segment = segment[:2] + struct.pack(">H", rng.choice([0, 1, 2, 65_535, rng.randrange(2**16)])) + segment[4:]
    elif change == 1:  # another marker
        segment = (
            segment[:1]
            + bytes([rng.choice([0xC0, 0xC2, 0xC4, 0xC9, 0xDB, 0xDD, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, rng.randrange(256)])])
            + segment[2:]
        )
    elif change == 2:  # other content
        segment = segment[:4] + rng.choice([flip, overwrite])(rng, segment[4:] or b"x", None)
    else:
        segment *= rng.choice([0, 2, 300])
    return content[:at] + segment + content[at + 2 + size :]


def jpg_size(rng, content, _):
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = content.find(marker)
        if at > 0:
            sizes = [0, 1, 7, 4_000, 8_191, 30_000, 65_535]
            return content[: at + 5] + struct.pack(">HH", rng.choice(sizes), rng.choice(sizes)) + content[at + 9 :]
    return content


# Mutations of BMP and WebP: the sizes that they claim


def bmp_head(rng, content, _):
    head = list(struct.unpack_from("<iiHH", content, 18))  # width, height, planes, bits
    field = rng.randrange(4)
    sizes = [-1, 0, 1, 7, -13, 4_000, 8_191, 8_193, 30_000, 2**31 - 1, -(2**31)]
    head[field] = rng.choice(sizes) if field < 2 else rng.choice([0, 1, 4, 8, 16, 24, 32, 255])
    return content[:18] + struct.pack("<iiHH", *head) + content[30:]


def webp_size(rng, content, _):
    size = rng.choice([0, 1, 7, 4_000, 5_792, 5_793, 16_383])
    for chunk, at, packed in (
        (b"VP8X", 12, (size & 0xFFFFFF).to_bytes(3, "little") * 2),
        (b"VP8 ", 14, struct.pack("<HH", size, size)),
        (b"VP8L", 9, struct.pack("<I", size | size << 14)),
    ):
        start = content.find(chunk)
        if start > 0:
            content = content[: start + at] + packed + content[start + at + len(packed) :]
    return content


# Mutations of safetensors


def cut_tensors(content):
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def join_tensors(header, data):
    return len(header).to_bytes(8, "little") + header + data


def tensors_length(rng, content, _):
    length = rng.choice([0, 1, 2, len(content), len(content) - 8, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, rng.randrange(len(content))])
    return length.to_bytes(8, "little") + content[8:]


def tensors_entry(rng, content, _):
    header, data = cut_tensors(content)
    plain = json.loads(header)
    name = rng.choice(list(plain))
    odd: list[Any] = [0, 1, -1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, 1e400, None, True, "3", [], {}, [2**40] * 3, [0], [1] * 100]
    entry = plain[name]
    change = rng.randrange(5)
    if change == 0 or name == "__metadata__":
        plain[name] = rng.choice([*odd, {"a": 1}, {"x": "y" * 10**5}])
    elif change == 1:
        entry["shape"] = rng.choice([*odd, [*entry["shape"], 1], [2**31, 2**31], [2**32, 2**32], [0, 2**60], entry["shape"][::-1]])
    elif change == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [*odd, [end, start], [start, end + 4], [start - 4, end], [0, 2**62], [start, end, 0], [2**64, 2**64]]
        )
    elif change == 3:
        entry["dtype"] = rng.choice([*odd, "F64", "F16", "BF16", "I8", "F8_E4M3", "F4", "C64", "U64", "f32", "F32 ", "X" * 10**5])
    else:
        renamed = rng.choice(["", name + ".", "__metadata__", "ä\0\n\x1b[2J", "x" * 10**5, "group0", "../../x"])
        plain[renamed] = plain.pop(name) if rng.random() < 0.5 else entry
    return join_tensors(json.dumps(plain, allow_nan=True).encode(), data)


def tensors_text(rng, content, _):
    """The header as text: names twice, deep nesting, long numbers, padding, what is no JSON."""
    header, data = cut_tensors(content)
    header = header.rstrip()
    change = rng.randrange(8)
    if change == 0:  # everything twice
        header = header[:-1] + b"," + header[1:]
    elif change == 1:
        depth = rng.choice([100, 1_000, 10**5])
        header = header[:-1] + b',"deep":' + b"[" * depth + b"]" * depth + b"}"
    elif change == 2:
        header = header[:-1] + b',"deep":' + b'{"a":' * rng.choice([100, 10**5]) + b"}"
    elif change == 3:
        header = header.replace(b'"shape":[', b'"shape":[' + b"9" * rng.choice([10, 400, 4_400, 10**5]) + b",", 1)
    elif change == 4:
        header += b" " * rng.choice([1, 7, 10**6, 3 * 10**6])
    elif change == 5:
        header = rng.choice([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"NaN", b'{"a":NaN}', b"{" * 10, b'"' + b"\\" * 99])
    elif change == 6:
        header = header[:-1] + b"," + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10_000)) + b"}"
    else:
        header = rng.choice(ANY)(rng, header, [header])
    return join_tensors(header, data)


def tensors_data(rng, content, _):
    header, data = cut_tensors(content)
    values = bytearray(data)
    at = 4 * rng.randrange(len(values) // 4)
    values[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -1.0, 0.5, 3e38, 1e-45]))
    return join_tensors(header, bytes(values))


OF_KIND = {
    "pth": [flip],
    "png": [png_chunk, png_chunk, png_head, png_head, png_order, png_pixels, png_pixels, png_length],
    "jpg": [jpg_segment, jpg_segment, jpg_size],
    "bmp": [bmp_head, flip, overwrite],
    "webp": [webp_size, flip, overwrite],
    "safetensors": [tensors_length, tensors_entry, tensors_entry, tensors_text, tensors_text, tensors_data],
}


def mutated(rng, kind, sound):
    """One of the `sound` files, changed once or a few times."""
    content = rng.choice(sound)
    if kind == "png" and rng.random() < 0.01:
        return png_bomb(rng, content, sound)
    known = rng.random() < 0.7
    if known:  # first what needs a sound file; more would often hide it behind a wrong checksum
        content = rng.choice(OF_KIND[kind])(rng, content, sound)
    for _ in range(rng.choice([0, 0, 0, 1] if known else [1, 1, 3])):
        content = rng.choice([*ANY, noise] if rng.random() < 0.1 else ANY)(rng, content, sound)
    return content
