"""Your own images in one file of NumPy: x_train, y_train, x_test, y_test, or images and labels."""

import functools
import os
import zipfile
import zlib

import numpy as np

from vffjax import paths
from vffjax.config import Config
from vffjax.data import own_sets
from vffjax.data.in_memory import NAMES, from_mapping
from vffjax.errors import bad_key, said


def _own(config: Config) -> own_sets.Own:
    if not config.data_dir:
        raise bad_key("data_dir", "", "dataset=npz needs the file of your images", f"give an .npz file with {NAMES}")
    path = paths.local(config.data_dir, "config.data_dir")
    if not os.path.isfile(path):
        problem = "a folder, not a file" if os.path.exists(path) else own_sets.no_such("file", path)
        raise bad_key("data_dir", config.data_dir, problem, f"give an .npz file with {NAMES}")
    about = os.stat(path)
    return _read(config.data_dir, str(path), about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=1)
def _read(given: str, path: str, *_: int) -> own_sets.Own:
    try:
        if not zipfile.is_zipfile(path):
            raise bad_key("data_dir", given, "not an .npz file, which is an archive of arrays", f"make one by np.savez, with {NAMES}")
        # np.load leaves a file open that it has opened and cannot read.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        fix = "save texts as np.array(names, dtype=str), not as objects" if "pickle" in str(error) else "save it again by np.savez"
        raise bad_key("data_dir", given, f"cannot be read as an .npz file ({said(error)})", fix) from None
    return from_mapping(arrays, given)


SOURCE = own_sets.source(_own, resizes=False)
