"""Trains some steps on one device and on eight, and writes how far apart they end. Nothing here is a test: see test_devices.py.

In float32 sums in another order differ by about as much as a small fault of the division would change them. In float64 they agree to
1e-12, and a fault stays as large as it is. The library computes in `jnp.float32` by name. So for float64 this process gives that name to
float64 before it imports the library, and then checks that every number of the states has become one.
"""

import json
import sys

import jax
import jax.numpy as jnp

PRECISION = sys.argv[1]
if PRECISION == "float64":
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

import numpy as np  # noqa: E402

from runs import TINY  # noqa: E402
from vffjax.data.load import load  # noqa: E402
from vffjax.runs import experiment, loop  # noqa: E402
from vffjax.training.checks import make_config  # noqa: E402
from vffjax.training.epochs import Epoch  # noqa: E402
from vffjax.training.mesh import everywhere, mesh_of, within  # noqa: E402


def after(config, steps, number):
    """The losses and the states after the first steps of an epoch on so many devices."""
    data, mesh = load(config), mesh_of(number)
    plan = experiment.plan_for(config, data)
    states, task = jax.tree.map(in_precision, everywhere(mesh, experiment.start(plan, data)))
    images = loop.training_images(data.train, config.data_on, mesh)
    with within(mesh):
        for part in Epoch(plan, None, steps, mesh).segments(task, states, images, 0):
            if part.done >= steps:
                return np.asarray(part.metrics["loss"]), jax.device_get(part.states)


def in_precision(leaf):
    """A leaf that NumPy has read or made as float32, such as pixel statistics and the codebook, in the precision of this process."""
    return leaf.astype(PRECISION) if leaf.dtype == np.float32 else leaf


def compared(config, steps):
    """The largest difference of a loss, and of a number of the states, from one device to eight: relative to the largest of its leaf."""
    (one, first), (many, second) = after(config, steps, 1), after(config, steps, 8)
    assert len(one) == steps
    pairs = [(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True) if a.dtype.kind == "f"]
    assert {leaf.dtype.name for pair in pairs for leaf in pair} == {PRECISION}, "a part of the program has another precision"
    apart = [np.abs(a - b).max() / max(1e-3, np.abs(a).max()) for a, b in pairs]
    return {"losses": float(np.abs(one / many - 1).max()), "states": float(max(apart)), "devices": len(jax.devices())}


if __name__ == "__main__":
    many_steps = 20 if PRECISION == "float64" else 1
    print(json.dumps({name: compared(make_config(TINY | changes), many_steps) for name, changes in json.loads(sys.argv[2]).items()}))
