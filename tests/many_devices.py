"""Trains tiny runs in a process that has eight fake devices, and writes what came out. Nothing here is a test: see test_devices.py."""

import contextlib
import hashlib
import io
import json
import pathlib
import sys

import jax
import numpy as np

from runs import TINY
from vffjax.errors import UserError
from vffjax.runs import experiment, summary
from vffjax.runs.logbook import read_metrics
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config


def trained(folder, changes):
    """Records, lines on stderr, and a digest of the states of one run."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            found = experiment.train(make_config(TINY | changes), folder)
        except UserError as error:
            return {"error": str(error)}
    states = load_run(folder).states
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(states))).hexdigest()
    return {
        "records": read_metrics(folder),
        "devices": found["devices"],
        "test_error": found["test_error"],
        "states": digest,
        "err": err.getvalue(),
    }


def main(out, cases):
    summary.draw_features = summary.plot_curves = lambda *_: None
    found = {name: trained(pathlib.Path(out) / folder, changes) for name, (folder, changes) in json.loads(cases).items()}
    print(json.dumps({"number": len(jax.devices()), "runs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
