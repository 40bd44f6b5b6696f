"""Networks, one module each. `config.network` is the module's name, or `my_module:NETWORK` of a file beside the configuration."""

from vffjax.config import Config
from vffjax.networks.network import Network
from vffjax.registry import NETWORKS


def find(config: Config) -> Network:
    """The network of a configuration. Raises `UserError` if it is not known, or is code from outside that may not be run or is none."""
    return NETWORKS.find(config.network, Network)
