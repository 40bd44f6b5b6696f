"""Trains a network by a configuration; python train.py does the same.

usage: vffjax train --config NAME|FILE[:VARIANT] [--config.KEY=VALUE ...]
                    [--workdir DIR] [--code DIR]
                    [--coordinator HOST:PORT --processes N --process I]
                    [--coordinator auto] [--heartbeat SECONDS]
       vffjax train --help [KEY]

Trains the network of a configuration, group by group, without back-propagation
across groups. The same command with the same workdir continues where it
stopped. The workdir gets config.json, metrics.jsonl, checkpoints/, summary.json
(errors in percent), curves.png and features.png.

  --config NAME       a configuration that comes with vffjax, such as digits
                      (embedded data, seconds) or cifar10:small; vffjax configs
                      lists them
  --config FILE       a file of your own, such as mine.py or mine.py:small
  --config.KEY=VALUE  sets a key; it overrides the configuration. In a
                      dictionary it can set a single entry:
                      --config.overrides.group1.learning_rate=1e-4
  --workdir DIR       default: a folder in runs/, named after the configuration
                      and a hash of its values
  --code DIR          folder of a rule, network or source of your own
                      (MODULE:NAME), if it does not lie beside FILE; its code is
                      run
  --coordinator HOST:PORT --processes N --process I
                      trains as process I of N, from 0, mostly one on each
                      machine; the address is that of process 0. All processes
                      get the same command but for I, and share the workdir
  --coordinator auto  the same on a cluster that JAX knows: a TPU pod, Slurm,
                      Kubernetes, Open MPI
  --heartbeat SECONDS silence after which a process counts as lost (100)
  --help KEY          shows one key in full

The keys and their defaults:
"""

import contextlib
import pathlib
import re

from vffjax import hosts
from vffjax.cli import flags, key_help, options, processes
from vffjax.runs.usual_folder import usual_folder


def run(arguments: list[str]) -> None:
    if (asked := _help_asked(arguments)) is not None:
        print(key_help.one_key(asked) if asked else (__doc__ or "").partition("\n\n")[2] + "\n" + key_help.every_key())
        return
    given, arguments = processes.split(arguments)
    config, name, workdir = flags.parse_train(arguments)
    folder = pathlib.Path(workdir) if workdir else usual_folder(config, name)
    if given is not None:
        hosts.join(given)  # before JAX looks for devices
    with hosts.together() if given else contextlib.nullcontext(), options.naming_files(folder):
        config = flags.ready(config)
        from vffjax.costs import fits
        from vffjax.runs import experiment
        from vffjax.weights import weights

        if not (folder / "config.json").exists():  # a run that continues has its weights already
            weights.check_start(config)
        fits.check_memory(config)
        summary = experiment.train(config, folder)
    if given is not None and not hosts.is_first():
        return
    shown = ", ".join(f"{e:.2f}" for e in summary["test_error_per_group"])
    print(f"test error {summary['test_error']:.2f} % (groups {shown}; voting {summary['voting']}), best epoch {summary['best_epoch']}")


def _help_asked(arguments: list[str]) -> str | None:
    """The key that help is asked for; empty: all of them; None: no help is asked for."""
    for i, argument in enumerate(arguments):
        flag, equals, key = argument.partition("=")
        if flag in ("-h", "--help"):
            word = key if equals else next(iter(arguments[i + 1 :]), "")
            return word if re.match(r"(--?config\.)?\w", word) else ""
    return None if arguments else ""
