"""Opens weight files of every kind that is read, as tensors by their names. A file that cannot be read is refused by what it is."""

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

# Prefixes that DataParallel, trainers and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.", "net.")


@contextlib.contextmanager
def opened(path: pathlib.Path | str, most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Opens a weight file; gives its tensors by their names, whose content can be read while the file is open.

    Args:
        path: a safetensors file, or one of PyTorch's.
        most_bytes: the largest file of PyTorch's that is accepted, since PyTorch reads a file whole.

    Raises:
        UserError: the file cannot be opened, is damaged, or holds other things than tensors. The message names it.
    """
    if not str(path).endswith(WEIGHT_FILES):
        what = f"{file_kinds.not_weights(str(path))}, nor PyTorch's"
        raise UserError(f"{path}: {what}; give one that vffjax export, torchvision or timm has written")
    if re.search(r"-\d{5}-of-(?!00001\.)\d{5}\.\w+$", str(path)):
        raise UserError(f"{path}: one of several files that together hold the weights; save them as one, and give that")
    with _open(path) as file:
        found = of_safetensors(path, file) if str(path).endswith(WEIGHT_FILES[0]) else torch_files.tensors(path, file, most_bytes)
        found = unwrapped(found)
        if any(re.search(r"(^|\.)lora_", name) for name in found):
            raise UserError(f"{path}: a LoRA adapter, which holds changes to the weights of another file; merge both, and give the result")
        yield found


def unwrapped(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the `PREFIXES` that all their names share, several of them and in any order.

    The counter `n_averaged`, which torch.optim.swa_utils.AveragedModel keeps beside the network, is ignored.
    """
    while True:
        rest = {name: tensor for name, tensor in found.items() if name != "n_averaged"}
        prefix = next((prefix for prefix in PREFIXES if rest and all(name.startswith(prefix) for name in rest)), "")
        if not prefix:
            return found
        found = {name.removeprefix(prefix): tensor for name, tensor in rest.items()}


def _open(path: pathlib.Path | str) -> IO[bytes]:
    try:
        return files.opened(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a file that vffjax export, torchvision or timm has written") from None
