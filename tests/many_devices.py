"""Trains tiny runs in a process that has eight fake devices, and writes what came out. Nothing here is a test: see test_devices.py."""

import contextlib
import hashlib
import io
import json
import pathlib
import sys
from unittest import mock

import jax
import numpy as np

from runs import TINY, tell_to_leave
from vffjax.errors import UserError
from vffjax.runs import experiment, summary
from vffjax.runs.logbook import Logbook, read_metrics
from vffjax.runs.termination import Terminated
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config


def leave_at(epoch, step):
    """Runs in here are told to leave, by SIGTERM, when so many steps of an epoch (from 0) have been dispatched."""
    sound = Logbook.step

    def told(self, now, done, steps):
        sound(self, now, done, steps)
        if (now, done >= step) == (epoch, True):
            tell_to_leave()

    return mock.patch.object(Logbook, "step", told)


def trained(folder, changes, *leave):
    """Records, lines on stderr, and a digest of the states of one run; or what it says if it is told to leave at an epoch and step."""
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
        "test_error": found["test_error"],
        "states": digest,
        "err": err.getvalue(),
    }


def main(out, cases):
    summary.draw_features = summary.plot_curves = lambda *_: None
    found = {name: trained(pathlib.Path(out) / folder, *rest) for name, (folder, *rest) in json.loads(cases).items()}
    print(json.dumps({"number": len(jax.devices()), "runs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
