"""Weight files: what a run has learnt, in safetensors, to hand on or to start from. No pickle, nothing in them is executed.

Each group's parameters and batch statistics are float32 tensors named after their place, such as `group0.params.layers_0.kernel`. One
metadata entry, `vffjax`, holds JSON: format, network, classes, image shape. Files may come from anyone: sizes that a header claims are
compared with the file's length and with the network before anything is allocated by them.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from vffjax.config import Config
from vffjax.data import SIZES
from vffjax.errors import UserError, printable
from vffjax.logbook import replace_file

if TYPE_CHECKING:
    from vffjax.groups import GroupState
    from vffjax.trainer import Plan

_KINDS = ("params", "batch_stats")
SUFFIX, FORMAT = ".safetensors", "vffjax weights 1"
# A thousand layers need less than 1 MiB, and JSON of 2 MiB takes at most some 100 MB to parse.
MAX_HEADER = 2**21
_AGAIN = "export it again with vffjax export, or set config.init_from=''"
_OTHER = "give weights of this network, as vffjax export writes them, or set config.init_from=''"


def write_weights(path: pathlib.Path | str, plan: "Plan", states: tuple["GroupState", ...], about: Mapping[str, Any]) -> None:
    """Writes every group's parameters and batch statistics, float32, to a .safetensors file; equal weights give equal bytes.

    `about` holds JSON values such as class_names and image_shape. An existing file is replaced in one step. Raises `OSError`.
    """
    tensors = {name: np.array(leaf, np.float32, order="C") for name, leaf in _named(states).items()}
    keys = ("network", "widths", "pools", "norm", "grouping")
    described = {"format": FORMAT, "network": {key: getattr(plan.config, key) for key in keys}, **about}
    # One entry, because safetensors writes several in random order.
    replace_file(pathlib.Path(path), safetensors.numpy.save(tensors, {"vffjax": json.dumps(described)}))


def read_weights(path: pathlib.Path | str, plan: "Plan", states: tuple["GroupState", ...]) -> tuple["GroupState", ...]:
    """`states` with the parameters and statistics of a file, to the bit; optimizer states stay. The given leaves need only a shape.

    Raises `UserError` naming the file and the tensor: not a sound safetensors file, a tensor that is missing, not of this network,
    misshapen, not float32, not finite, or a negative variance.
    """
    import jax.numpy as jnp

    wanted = {name: f"F32{list(leaf.shape)}" for name, leaf in _named(states).items()}
    with _opened(path) as file:
        found = _header(path, file)
        for name in sorted(wanted.keys() | found.keys()):
            here, there = found.get(name, "missing"), wanted.get(name, f"of this {plan.config.network} network")
            if here != there:
                raise UserError(f"{path}: tensor {printable(name, 200)} is {printable(here, 200)}, not {there}; {_OTHER}")
        # No more than the network takes: `_header` has compared the length with the sizes, which are the network's own.
        file.seek(0)
        content = file.read()
    try:
        arrays = safetensors.numpy.load(content)
    except Exception as error:  # its own, and what NumPy says to shapes
        raise UserError(f"{path}: damaged ({printable(str(error), 200)}); {_AGAIN}") from None
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name.endswith(".var") and (array < 0).any()):
            raise UserError(f"{path}: tensor {name} holds infinity, NaN or a negative variance; {_AGAIN}")

    def read(i: int, kind: str, tree: Any) -> Any:
        return _mapped(lambda name, _: jnp.asarray(arrays[name]), tree, f"group{i}.{kind}")

    return tuple(state._replace(**{kind: read(i, kind, getattr(state, kind)) for kind in _KINDS}) for i, state in enumerate(states))


def check_start(config: Config) -> None:
    """Raises `UserError` if a run of `config` could not start from config.init_from. Needs no data; nothing is compiled."""
    if config.init_from:
        with _opened(config.init_from) as file:  # a header is checked without JAX
            _header(config.init_from, file)
        import jax

        from vffjax.trainer import init_states, make_plan

        sizes = SIZES[config.dataset]
        plan = make_plan(config, sizes.train_images, sizes.classes)
        read_weights(config.init_from, plan, jax.eval_shape(lambda: init_states(plan, sizes.image_shape)))


def _named(states: tuple["GroupState", ...]) -> dict[str, Any]:
    """Every leaf of parameters and statistics by its name in the file."""
    out: dict[str, Any] = {}
    for i, state in enumerate(states):
        for kind in _KINDS:
            _mapped(out.__setitem__, getattr(state, kind), f"group{i}.{kind}")
    return out


def _mapped(function: Callable[[str, Any], Any], tree: Any, prefix: str) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(function, value, f"{prefix}.{key}") for key, value in tree.items()}
    return function(prefix, tree)


def _opened(path: pathlib.Path | str) -> IO[bytes]:
    if not str(path).endswith(SUFFIX):
        raise UserError(f"{path}: not a {SUFFIX} file; give one that vffjax export has written")
    try:
        if os.path.isfile(path) or not os.path.exists(path):  # to open a pipe would wait for ever
            return open(path, "rb")
        reason: Any = "not a file"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"{path}: cannot be read ({reason}); give a {SUFFIX} file that vffjax export has written")


def _header(path: pathlib.Path | str, file: IO[bytes]) -> dict[str, str]:
    """Type and shape of each tensor, such as F32[3, 4], all within the file's length and together exactly of it."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise UserError(f"{path}: not safetensors, or truncated ({size} bytes, a header of {length}); {_AGAIN}")
    try:
        plain = json.loads(file.read(length).decode(), object_pairs_hook=_distinct)
        plain.pop("__metadata__", None)
        total, found = 0, {}
        for name, entry in plain.items():
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            # NumPy has no more axes, and a product of many long numbers would take minutes.
            sound = isinstance(dtype, str) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
            if not sound or start > end or (dtype == "F32" and 4 * math.prod(shape) != end - start):
                raise ValueError(f"type, shape and bytes of tensor {printable(name, 100)} do not agree")
            found[name] = f"{dtype}{shape}"
            total += end - start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: a damaged header ({type(error).__name__}: {printable(str(error), 200)}); {_AGAIN}") from None
    if total != size - 8 - length:
        raise UserError(f"{path}: truncated or damaged: {size - 8 - length} bytes of tensors, not {total}; {_AGAIN}")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
