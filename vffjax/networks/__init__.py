"""Networks, one module each. `config.network` is the module's name, or `my_module:NETWORK` of a file beside the configuration."""

from vffjax.config import Config
from vffjax.errors import bad_key
from vffjax.networks.network import Network
from vffjax.registry import NETWORKS


def find(config: Config) -> Network:
    """The network of a configuration. Raises `UserError` if it is not known, or is code from outside that may not be run or is none."""
    network = NETWORKS.find(config.network)
    if not isinstance(network, Network):
        raise bad_key("network", config.network, f"is {type(network).__name__}, not a network", "make it a vffjax.networks.network.Network")
    return network
