"""Sources of images, one module each. `config.dataset` is the module's name, or `my_module:SOURCE` of a file beside the configuration.

A name such as `tfds:svhn_cropped` names a set of a larger collection; see `registry`.
"""

from vffjax.config import Config
from vffjax.data.sets import Sizes, Source
from vffjax.registry import SOURCES


def find(config: Config) -> Source:
    """The source of a configuration. Raises `UserError` if it is not known, or is code from outside that may not be run or is none."""
    return find_source(config.dataset)


def find_source(name: str) -> Source:
    """The source that config.dataset would name so. Raises `UserError` as `find`."""
    source: Source = SOURCES.find(name, Source)
    return source


def sizes_of(config: Config) -> Sizes:
    """The sizes of a configuration's set. Raises `UserError` if they follow from the data, and these cannot be had or are damaged."""
    sizes = find(config).sizes
    return sizes(config) if callable(sizes) else sizes
