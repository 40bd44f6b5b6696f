"""Trains tiny runs in a process that has eight fake devices, and writes what came out. Nothing here is a test: see test_devices.py."""

import collections
import contextlib
import hashlib
import io
import json
import pathlib
import re
import sys

import jax
import numpy as np

from runs import TINY, leave_at
from vffjax.errors import UserError
from vffjax.ops.conv import conv
from vffjax.ops.rows import over_devices
from vffjax.proofs import locality
from vffjax.runs import experiment, summary
from vffjax.runs.logbook import read_metrics
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run
from vffjax.training import mesh
from vffjax.training.checks import make_config
from vffjax.uses.evaluation import evaluate


def trained(folder, changes, *leave):
    """Records, lines on stderr, a digest of the states, and the errors that `evaluate` finds, of one run.

    With `numbers` in the place of `devices`, each epoch is trained by the next of these numbers of devices. A run that is told to leave at
    an epoch and step gives what it says then.
    """
    numbers = changes.pop("numbers", [])
    for number in numbers[:-1]:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Terminated):
            experiment.train(make_config(TINY | changes | {"devices": number}), folder, after_epoch=lambda _: True)
    changes |= {"devices": numbers[-1]} if numbers else {}
    err = io.StringIO()
    with contextlib.redirect_stderr(err), leave_at(*leave) if leave else contextlib.nullcontext():
        try:
            found = experiment.train(make_config(TINY | changes), folder)
        except UserError as error:
            return {"error": str(error)}
        except Terminated as left:
            return {"left": str(left), "err": err.getvalue()}
    states = load_run(folder).states
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(states))).hexdigest()
    return {
        "records": read_metrics(folder),
        "devices": found["devices"],
        "errors": [found["val_error"], found["test_error"]],
        "evaluated": [evaluate(folder)[name] for name in ("val_error", "test_error")],
        "states": digest,
        "err": err.getvalue(),
    }


def collectives():
    """How many of each kind the devices need for a convolution and its gradients, whose rows they have divided among them."""

    def gradients(x, kernel, g):
        value, pull = jax.vjp(conv, over_devices(x), kernel)
        return over_devices(value), pull(over_devices(g))

    with mesh.within(mesh.mesh_of(8)):
        shapes = ((64, 32, 32, 16), (3, 3, 16, 32), (64, 32, 32, 32))
        given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        program = jax.jit(gradients).lower(*given).compile().as_text()
    kinds = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return collections.Counter(re.findall(kinds, program))


def main(out, cases):
    summary.draw_features = summary.plot_curves = lambda *_: None
    found = {name: trained(pathlib.Path(out) / folder, *rest) for name, (folder, *rest) in json.loads(cases).items()}
    proofs = {grouping: locality.certify(make_config(TINY | {"grouping": grouping}), numeric=False) for grouping in ("layer", "all")}
    print(json.dumps({"number": len(jax.devices()), "runs": found, "proofs": proofs, "collectives": collectives()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
