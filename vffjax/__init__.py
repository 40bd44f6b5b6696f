"""Visual forward-forward networks in JAX: convolutional networks trained without back-propagation across groups of layers.

    run = vffjax.train(vffjax.read("digits"))
    run.predict(images)

What is imported from here is loaded when it is first used; `import vffjax` imports no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vffjax.api import evaluate, load, read, train
    from vffjax.config import default_config
    from vffjax.errors import UserError
    from vffjax.run import Prediction, Run
    from vffjax.training.checks import make_config

__all__ = ["Prediction", "Run", "UserError", "__version__", "default_config", "evaluate", "load", "make_config", "read", "train"]

_HOMES = dict.fromkeys(("evaluate", "load", "read", "train"), "vffjax.api") | dict.fromkeys(("Prediction", "Run"), "vffjax.run")
_HOMES |= {"default_config": "vffjax.config", "make_config": "vffjax.training.checks", "UserError": "vffjax.errors"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("vffjax.versions").own()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vffjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
