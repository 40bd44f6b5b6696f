"""Sets of tensorflow-datasets, downloaded and prepared if they are not there."""

import os

from vffjax.config import Config
from vffjax.data import tfds_files
from vffjax.data.sets import Split
from vffjax.errors import bad_key


def tfds(config: Config) -> tuple[Split, Split, tuple[str, ...]]:
    root = tfds_files.data_root(config.data_dir)
    if config.data_dir and not os.path.isdir(root):
        # Not made on the fly: the download of a whole set into a misspelt folder is not what anyone wants.
        raise bad_key("data_dir", config.data_dir, "no such folder", "create it, or give the folder that holds the prepared sets")
    folder = tfds_files.find(config.dataset, root) or tfds_files.prepare(config.dataset, root)
    splits, names = tfds_files.read(config.dataset, folder)
    return Split(*splits["train"]), Split(*splits["test"]), names
