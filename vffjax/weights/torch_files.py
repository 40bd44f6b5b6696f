"""PyTorch's weight files, read by PyTorch. Nothing in them is executed.

A file holds a pickle and the bytes of its tensors. We first go through the pickle's instructions without following any of them: it may only
ask for the functions that plain values and tensors need, and may not claim more memory than the file has bytes. Only then does
`torch.load(weights_only=True)` load the file.
"""

import argparse
import collections
import io
import os
import pathlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from vffjax import file_kinds
from vffjax.errors import UserError, printable
from vffjax.weights.tensor_files import AGAIN, Tensor

# The keys under which trainers save the state dict beside other things; one may contain another.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net")
# In earlier versions a file could make `torch.load` run code in spite of weights_only (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# A state dict of a thousand layers, with that of an optimizer, takes less than 1 MiB. A much longer one would take minutes to go through.
_MAX_PICKLE = 2**22
# What a pickle may ask for. None of these allocates as much memory as a number in the file says, as bytearray and torch.Tensor do, nor can
# a chain of them make data grow without bound, as _codecs.encode can.
_ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|(builtins|__builtin__)\.(set|complex)|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Size|device|[A-Z]\w*Storage|b?float\w*|u?int\d+|bool|complex\d+|half|double|long|short)"
)
_WIDTHS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
_PLAIN = "save a plain state dict by torch.save, or use safetensors"


class _Unfit(Exception):
    """A file that is not accepted; the message says what it is or holds."""


def tensors(path: pathlib.Path | str, file: IO[bytes], most_bytes: int) -> dict[str, Tensor]:
    """The tensors of the state dict in a file, by their names.

    Raises `UserError`, which names the file, if it is larger than `most_bytes`, unsafe, damaged, or holds no state dict, or if PyTorch is
    missing or too old.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: only PyTorch can read it; pip install torch, or convert it to safetensors") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise UserError(f"{path}: PyTorch {torch.__version__} could run code in it; pip install -U torch, or convert it to safetensors")
    size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        raise UserError(f"{path}: {size} bytes, where this network and any classifier take less than {most_bytes}; {AGAIN}")
    try:
        content = io.BytesIO(file.read())  # reading from a file, pickle would allocate whatever length a string claims to have
        storages = _storages(content)
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's warnings take several lines
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments that trainers save beside the weights
                loaded = torch.load(content, map_location="cpu", weights_only=True)
        plain = _state_dict(loaded)
        for name, value in plain.items():
            if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
                raise ValueError(f"{printable(str(name), 100)} is no plain tensor with a name ({type(value).__name__})")
        found = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in plain.values()}
        if collections.Counter(size for size in found.values() if size) - storages:
            raise ValueError("tensors of other sizes than the file holds")
    except _Unfit as what:
        raise UserError(f"{path}: {what}; {_PLAIN}") from None
    except Exception as error:  # PyTorch raises many kinds
        asks, why = re.search(r"GLOBAL (\S+)", str(error)), type(error).__name__
        if asks:
            why = f"it asks for {printable(asks[1], 100)}"
        elif "weights_only" not in str(error):  # a message with that word advises to load the file unsafely
            why = f"{why}: {printable(str(error), 200)}"
        raise UserError(f"{path}: not tensors alone, or damaged ({why}); {_PLAIN}") from None
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}

    def tensor(value: Any) -> Tensor:
        # A copy with bytes of its own, because an expanded tensor has fewer bytes than elements.
        dtype = names.get(value.dtype, str(value.dtype))
        return Tensor(dtype, tuple(value.shape), lambda: np.array(value.to(torch.float32).numpy(force=True)))

    return {name: tensor(value) for name, value in plain.items()}


def _state_dict(loaded: Any) -> Mapping[Any, Any]:
    """The state dict in a loaded object, without what a trainer saved beside it. Raises `_Unfit` if there is none."""
    for _ in range(len(STATE_DICTS)):
        if not isinstance(loaded, Mapping):
            break
        loaded = next((loaded[key] for key in STATE_DICTS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping):
        raise _Unfit(f"holds a {type(loaded).__name__}, which is no state dict")
    if {"state", "param_groups"} <= loaded.keys():
        raise _Unfit("the state of an optimizer, not a network's weights")
    if loaded and not any(hasattr(value, "untyped_storage") for value in loaded.values()):
        keys = ", ".join(printable(str(key), 40) for key in list(loaded)[:5])
        raise _Unfit(f"a checkpoint without a state dict under {', '.join(STATE_DICTS)}; its keys are {keys}")
    return loaded


def _storages(file: io.BytesIO) -> collections.Counter[int]:
    """The sizes in bytes of the storages in a file of either format, each with its count.

    Raises `_Unfit` or `ValueError` if the file is not as `torch.save` writes it.
    """
    if file.getvalue().startswith(file_kinds.LEGACY_TORCH):
        return _of_legacy(file)
    if file.read(4) != b"PK\x03\x04":
        kind = file_kinds.by_content(file)
        raise _Unfit(f"{kind or 'of an unknown kind'}, not a file of torch.save")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if any(name.endswith("/constants.pkl") for name in names):
            raise _Unfit("a TorchScript archive, which holds a program")
        if any(name.endswith(".npy") for name in names):
            raise _Unfit("NumPy arrays (.npz), not a file of torch.save")
        if any(name.endswith(".h5") for name in names):
            raise _Unfit("a Keras model, not a file of torch.save")
        # Compressed entries could take far more memory than the file has bytes.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed")
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise _Unfit("a zip archive, but not of torch.save")
        _walk(io.BytesIO(archive.read(pickles[0])))
    return collections.Counter(entry.file_size for entry in entries)


def _of_legacy(file: io.BytesIO) -> collections.Counter[int]:
    """The same for the format before PyTorch 1.6: five pickles, the fourth of which is the object and the fifth the keys of the storages,
    and then the storages."""
    file.seek(0)
    claims: dict[str, int] = {}
    for _ in range(5):
        claims |= _walk(file, legacy=True)
    here = file.getbuffer().nbytes - file.tell()
    if sum(claims.values()) > here:  # PyTorch would allocate them before it reads
        raise ValueError(f"tensors of {sum(claims.values())} bytes, where the file holds {here}")
    return collections.Counter(claims.values())


def _walk(file: io.BytesIO, legacy: bool = False) -> dict[str, int]:
    """Goes through the instructions of one pickle without following any; returns the bytes of each storage that it claims, by its key.

    Raises `_Unfit` if it asks for anything that plain values do not need, and `ValueError` if it is not as `torch.save` writes it.
    """
    start, claims = file.tell(), dict[str, int]()
    recent, memo = list[tuple[str, Any]](), dict[Any, tuple[str, Any]]()
    for code, argument, position in pickletools.genops(file):
        if position is not None and position - start > _MAX_PICKLE:
            raise ValueError(f"a pickle of more than {_MAX_PICKLE} bytes")
        name = code.name
        if name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"the instruction {name}, which torch.save writes only with an unusual pickle_protocol")
        if name == "GLOBAL":
            asked = str(argument).replace(" ", ".")
            if not _ALLOWED.fullmatch(asked):
                what = "a whole pickled module, not its state dict: " if asked.startswith("torch.nn.modules.") else "not tensors alone: "
                raise _Unfit(f"{what}it asks for {printable(asked, 100)}")
        if name == "BINPERSID":
            key, width, count = _claim(recent, legacy)
            claims[key] = max(claims.get(key, 0), width * count)
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = recent[-1] if recent else ("", None)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            recent.append(memo.get(argument, ("", None)))
        else:
            recent.append((name, argument))
        del recent[:-8]
    return claims


def _claim(recent: list[tuple[str, Any]], legacy: bool) -> tuple[str, int, int]:
    """The key, bytes per element and number of elements of the storage that the last instructions describe.

    They must build exactly this tuple: 'storage', its type, key, device, number of elements and, in the older format, None.
    """
    ends = ["NONE", "TUPLE"] if legacy else ["TUPLE"]
    stated = recent[-4 - len(ends) :]
    nothing: list[tuple[str, Any]] = [("", None)] * 4
    (_, kind), (_, key), _, (number, count) = stated[:4] if len(stated) == 4 + len(ends) else nothing
    sound = [name for name, _ in stated[4:]] == ends and number in ("BININT", "BININT1", "BININT2", "LONG1")
    if not sound or not isinstance(key, str) or count < 0:
        raise ValueError("a storage that is not stated as torch.save does")
    storage = re.fullmatch(r"torch (\w+)Storage", str(kind))
    return key, _WIDTHS.get(storage[1] if storage else "", 16), count
