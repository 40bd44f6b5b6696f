"""A weight file as tensors by their names, whatever it is saved by and wrapped in. What cannot be taken is named as what it is."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import IO

from vffjax import file_kinds, files
from vffjax.config import WEIGHT_FILES
from vffjax.errors import UserError
from vffjax.weights import torch_files
from vffjax.weights.tensor_files import Tensor, of_safetensors

# What DataParallel, trainers and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "net.")


@contextlib.contextmanager
def opened(path: pathlib.Path | str, most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, by name, to be read while it is open. PyTorch reads a file whole, so it may have `most_bytes`.

    Raises `UserError` naming the file: none that can be read, not sound, or not of tensors alone.
    """
    if not str(path).endswith(WEIGHT_FILES):
        kind = file_kinds.by_name(str(path))
        what = f"{kind}{', ' * bool(kind)}not a {WEIGHT_FILES[0]} file, nor PyTorch's"
        raise UserError(f"{path}: {what}; give one that vffjax export, torchvision or timm has written")
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", str(path)):
        raise UserError(f"{path}: one of several files that hold the weights together; save them as one, and give that")
    with _open(path) as file:
        found = of_safetensors(path, file) if str(path).endswith(WEIGHT_FILES[0]) else torch_files.tensors(path, file, most_bytes)
        found = unwrapped(found)
        if any(re.search(r"(^|\.)lora_", name) for name in found):
            raise UserError(f"{path}: a LoRA adapter, which holds changes to the weights of another file; merge both, and give the result")
        yield found


def unwrapped(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the `PREFIXES` that all their names share, in whatever order they stand.

    torch.optim.swa_utils.AveragedModel keeps a counter beside the network, `n_averaged`, which is passed over.
    """
    if any(name.startswith(PREFIXES) for name in found):
        found = {name: tensor for name, tensor in found.items() if name != "n_averaged"}
    while found and (prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in found)), "")):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _open(path: pathlib.Path | str) -> IO[bytes]:
    try:
        return files.opened(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: cannot be read ({reason}); give a file that vffjax export, torchvision or timm has written")
