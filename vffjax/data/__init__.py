"""Sources of images, one module each. `config.dataset` is the module's name, or `my_module:SOURCE` of a file beside the configuration."""

from vffjax.config import Config
from vffjax.data.sets import Sizes, Source
from vffjax.registry import SOURCES


def find(config: Config) -> Source:
    """The source of a configuration. Raises `UserError` if it is not known, or is code from outside that may not be run or is none."""
    return SOURCES.find(config.dataset, Source)


def sizes_of(config: Config) -> Sizes:
    """What there is to know of a configuration's set without reading it."""
    return find(config).sizes
