"""The folder of a run for which none was given."""

import contextlib
import json
import os
import pathlib

from vffjax import data
from vffjax.config import CHANGEABLE, FIELDS, Config
from vffjax.errors import UserError
from vffjax.files import sha256
from vffjax.keys import default_of


def usual_folder(config: Config, name: str) -> pathlib.Path:
    """A folder in runs/, called `name` and a hash of the keys that make it another run.

    config.data_dir is one of them where it says which images these are, and not only where they lie.
    """
    identity = config.to_dict() | {key: default_of(FIELDS[key]) for key in CHANGEABLE}
    with contextlib.suppress(UserError):  # of a source that does not exist or may not be run, which is said later
        identity |= {"data_dir": config.data_dir and os.path.normpath(config.data_dir)} if data.find(config).by_data_dir else {}
    return pathlib.Path(f"runs/{name}-{sha256(json.dumps(identity).encode())[:8]}")
