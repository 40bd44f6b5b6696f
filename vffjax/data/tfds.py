"""Sets of tensorflow-datasets, downloaded and prepared if they are not there. TensorFlow is not needed."""

import os
import pathlib

from vffjax.config import Config
from vffjax.data import tfds_files
from vffjax.data.sets import Sizes, Source, Split
from vffjax.errors import bad_key


def tfds(name: str, sizes: Sizes) -> Source:
    """The set that tensorflow-datasets calls `name`."""

    def read(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
        root = tfds_files.data_root(config.data_dir)
        if config.data_dir and not os.path.isdir(root):
            # Not made on the fly: the download of a whole set into a misspelt folder is not what anyone wants.
            raise bad_key("data_dir", config.data_dir, "no such folder", "create it, or give the folder that holds the prepared sets")
        folder = tfds_files.find(name, root) or tfds_files.prepare(name, root)
        splits, names = tfds_files.read(name, folder)
        return Split(*splits["train"]), Split(*splits["test"]), names

    def prepare(data_dir: str) -> pathlib.Path:
        return tfds_files.prepare(name, tfds_files.data_root(data_dir))

    return Source(sizes, read, prepare)
