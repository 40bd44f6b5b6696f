"""What a file is, in words, where it is not a file of weights that can be read: by its name, or by its first bytes."""

import io
import re
from typing import IO

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, with which PyTorch's files began before 1.6
_BY_NAME = {
    r"\.index\.json": "the index of weights that lie in several files",
    r"\.json": "JSON",
    r"\.npz|\.npy": "NumPy arrays",
    r"\.onnx": "an ONNX model",
    r"\.h5|\.hdf5|\.keras": "a Keras model",
    r"\.pb|\.tflite": "a TensorFlow model",
    r"\.(index|meta|data-\d+-of-\d+)": "a part of a TensorFlow checkpoint",
    r"\.msgpack": "Flax's own serialization",
    r"\.gguf|\.ggml": "a language model in llama.cpp's format",
    r"\.pkl|\.pickle|\.joblib": "a Python pickle",
    r"\.stablehlo": "an exported program, whose weights have no names",
    r"\.zip|\.tar|\.gz|\.tgz": "an archive",
}
_BY_BYTES = (
    (0, b"\x89HDF\r\n\x1a\n", "HDF5, such as a Keras model"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a language model in llama.cpp's format"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"PK\x03\x04", "a zip archive, such as PyTorch's or NumPy's"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (257, b"ustar", "a tar archive"),
    (0, LEGACY_TORCH, "PyTorch's, of the format before 1.6"),
    (0, b"\x80", "a Python pickle"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file itself (git lfs pull fetches it)"),
    (8, b"{", "safetensors"),
)


def by_name(name: str) -> str:
    """What a file of this name usually is; empty if there is nothing to say."""
    return next((kind for ending, kind in _BY_NAME.items() if re.search(rf"({ending})$", name, re.IGNORECASE)), "")


def not_weights(name: str) -> str:
    """Says that a file of this name is no file of weights as we write them, and what it usually is, if that is known."""
    kind = by_name(name)
    return f"{kind}{', ' * bool(kind)}not a .safetensors file"


def by_content(file: IO[bytes] | io.BytesIO) -> str:
    """What a file is by its first bytes; empty if they tell nothing. Afterwards it is read from where it was."""
    at = file.tell()
    file.seek(0)
    start = file.read(512)
    file.seek(at)
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, perhaps of a download that failed"
    if re.match(rb"\x08[\x01-\x14](\x12|:|B|\x1a|\")", start):  # protocol buffers: the version first, then who wrote it
        return "a protocol buffer, such as an ONNX model"
    return next((kind for offset, magic, kind in _BY_BYTES if start[offset : offset + len(magic)] == magic), "")
