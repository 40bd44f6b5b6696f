"""One run from its configuration to its summary: data, training, checkpoints, record. It writes to its workdir and nowhere else."""

import contextlib
import copy
import functools
import hashlib
import pathlib
import secrets
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vffjax import files, hosts, paths
from vffjax.config import FIELDS, Config
from vffjax.costs.fits import about_precision
from vffjax.data import load as data_module
from vffjax.data.sets import Dataset, Split
from vffjax.errors import UserError, bad_key, notice, phase
from vffjax.keys import default_of
from vffjax.networks.groups import States
from vffjax.rules.streams import Task
from vffjax.runs import checkpoint, logbook, loop, termination
from vffjax.runs import state as run_state
from vffjax.runs.origin import check_code, code_of, origin
from vffjax.runs.saved_epoch import SavedEpoch
from vffjax.runs.summary import conclude
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import LOCK, check_best, claim_workdir, locked, sound_epochs, write_config
from vffjax.training import checks, feature_cache, mesh, scores, stages
from vffjax.training.compiled import keep_compiled_programs
from vffjax.training.epochs import segment_length
from vffjax.training.plan import Plan, init_states, make_task, whitened, with_new_optimizers
from vffjax.weights.description import other_classes
from vffjax.weights.tensor_files import said_of
from vffjax.weights.weights import local_file, read_weights


def plan_for(config: Config, dataset: Dataset) -> Plan:
    """The plan of a run on these data. Raises `UserError` if the configuration does not fit them; nothing is compiled."""
    return checks.plan_of(config, len(dataset.train), dataset.image_shape, dataset.num_classes)


def describe(plan: Plan) -> str:
    """The groups in words, and a note if they are not what the rule's name promises."""
    shown = " | ".join(" ".join(str(layer.width or "whitening") for layer in group.module.layers) for group in plan.groups)
    alone = len(plan.groups) == 1 and len(plan.groups[0].module.layers) > 1
    note = " (one group: gradients cross all layers, back-propagation)" if alone else ""
    frozen = plan.config.frozen_groups
    note = f" (the first {frozen} frozen, their heads learn)" if frozen else note
    return f"{len(plan.groups)} group(s) of widths {shown}{note}"


def train(
    config: Config,
    workdir: pathlib.Path | str,
    data_sha256: str = "",
    progress: TextIO | None = None,
    after_epoch: loop.AfterEpoch = loop.goes_on,
) -> dict[str, Any]:
    """Trains a run to its end, from its start or from the newest sound checkpoint in its workdir.

    Args:
        config: the run's configuration.
        workdir: the run's folder, which is created if there is none.
        data_sha256: if it is given, the digest that the data set must have.
        progress: the stream on which the run says what it is and how far it has come; default: standard error.
        after_epoch: is called with the record of each epoch, as it stands in metrics.jsonl. If it returns true, the run is saved and left.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the input is bad; or, as `loop.Diverged`, the run has diverged.
        Terminated: SIGTERM came, or `after_epoch` asked for it, and the run has been saved.
        KeyboardInterrupt: Ctrl-C was pressed. It is raised at once; the training ends in the background, after its current segment.
    """
    work = functools.partial(_train, config, paths.local(workdir, "--workdir"), data_sha256, progress, after_epoch)
    return termination.interruptible(work)


@hosts.together()
def _train(
    config: Config, workdir: pathlib.Path, data_sha256: str, progress: TextIO | None, after_epoch: loop.AfterEpoch
) -> dict[str, Any]:
    if hosts.count() > 1:
        # Each has its own data folder. All else must be the same, or the processes would wait for each other at different places.
        keys = {f"config.{key}": value for key, value in config.to_dict().items() if key != "data_dir"}
        about = {"versions of packages": origin(config)["versions"], "code from outside": code_of(config)}
        hosts.check_same(keys | about, "give all processes the same command, configuration and packages")
    claim_workdir(workdir, config)
    stages.count(config)  # a number that cannot be is refused before the data are read
    keep_compiled_programs()
    with contextlib.ExitStack() as held:
        request = held.enter_context(termination.deferred())
        request.alone = hosts.count() == 1
        if (there := checkpoint.Checkpoints(workdir)).epochs() or there.inside.epochs():
            request.saved = termination.KEPT
        with hosts.first_only() as first:  # process 0 holds the lock for all
            used = first and (workdir / LOCK).exists()
            if used:
                held.enter_context(locked(workdir))  # before the data are read: if another run writes here, that takes no time to say
        with phase("reading data", progress):
            dataset = data_module.load(config)
        if data_sha256:
            check_same_data(config, dataset, data_sha256)
        if hosts.count() > 1:
            hosts.check_same({"SHA-256 of the data": dataset.sha256()}, "give all processes the same data set")
        plan = plan_for(config, dataset)
        with hosts.first_only() as first:
            if first:
                workdir.mkdir(parents=True, exist_ok=True)  # not earlier: after bad input there should be no new folder
                if not used:
                    held.enter_context(locked(workdir))
        if hosts.count() > 1:
            _check_shared(workdir)
        claim_workdir(workdir, config)  # again: until the lock was held, another run may have written here
        return _train_in(config, workdir, dataset, plan, request, progress, after_epoch)


def _check_shared(workdir: pathlib.Path) -> None:
    """Raises `UserError` on every process unless all see in the workdir what process 0 writes there now."""
    # The name is new, so that neither an earlier run in a folder of their own nor a cache of the file system can answer for it.
    seen_by_all = workdir / hosts.of_first(f".seen-{secrets.token_hex(8)}")
    with hosts.first_only() as first:
        if first:
            seen_by_all.touch()
    missing = hosts.any_of(not seen_by_all.exists())
    if hosts.is_first():
        seen_by_all.unlink(missing_ok=True)
    if missing:
        fix = "give all processes the same folder on a file system that they share"
        raise UserError(f"--workdir={workdir}: not all processes see there what process 0 has written; {fix}")


def check_same_data(config: Config, dataset: Dataset, sha256: str) -> None:
    """Raises `UserError` unless a data set has this digest."""
    if dataset.sha256() != sha256:
        key = "data_dir" if config.data_dir else "dataset"
        raise bad_key(key, getattr(config, key), "other images or labels than the run began with", "restore them, or start anew")


def _train_in(
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    plan: Plan,
    request: termination.Request,
    progress: TextIO | None,
    after_epoch: loop.AfterEpoch,
) -> dict[str, Any]:
    checkpoints = checkpoint.Checkpoints(workdir)
    sound, begun = _agreed_epochs(checkpoints, config)
    if begun:
        run = copy.deepcopy(begun.run) | {"config": config.to_dict()}
        request.saved = loop.what_is_saved(plan, run["epoch"], run.get("inside", {}).get("step", 0))
        check_same_data(config, dataset, run["data_sha256"])
        check_code(run, config)
    else:
        file = local_file(config) if config.init_from else ""
        about = {"data_sha256": dataset.sha256(), "train_size": len(dataset.train.labels), "image_shape": list(dataset.image_shape)}
        about |= {"class_names": list(dataset.class_names), "code_sha256": code_of(config)}
        run = run_state.new_state(config, about, files.sha256_of(file) if file else None)
    length = segment_length(plan, dataset.image_shape, feature_cache.bytes_of_an_image(plan, dataset.image_shape))
    run["segment_steps"] = hosts.of_first(length)  # which depends on the machine, and has no influence on the result
    before = run.get("devices", 1) if begun else 0
    schedule_before = begun.run["config"]["schedule"] if begun else ""
    processes_before = run["origins"][-1].get("processes", 1) if begun else 0
    trains = run["epoch"] < plan.total_epochs
    run["devices"] = stages.count(config, before, schedule_before) if trains else before
    here = origin(config) | {"devices": run["devices"], "processes": hosts.count()}
    _note_origin(run, here, trains, {"devices": before, "processes": processes_before})
    with hosts.first_only() as first:
        if first:
            told = (plan, dataset.image_shape, run["devices"], before, schedule_before, processes_before)
            words = stages.told(*told) if trains else ""
            notice(f"workdir {workdir}; {describe(plan)}; {jax.devices()[0].device_kind}{words and ', '}{words}", progress)
            if words := about_precision(config, jax.devices()[0]):
                notice(words, progress)
            _begin_records(config, workdir, checkpoints, run, trains)
    with contextlib.closing(checkpoints.writer(sound)) as writer:
        if trains:
            states, task = begun.restore(plan) if begun else start(plan, dataset)
            if hosts.count() > 1:
                # They come from the seed, or from a file on each host, and must not differ between the devices of the mesh.
                fix = "give all processes the same weights to start from, and machines of one kind"
                hosts.check_same({"SHA-256 of the first states": _digest((states, task))}, fix)
            hosts.barrier()  # before process 0 deletes what another one still reads
            run = loop.Loop(plan, dataset, task, run, checkpoints, writer, request, after_epoch).train(states, workdir, progress)
    request.saved, request.idle = loop.what_is_saved(plan, plan.total_epochs, 0), True
    summary: Any = None
    with hosts.first_only() as first:
        if first:
            with phase("measuring the test error, drawing", progress):
                summary = _conclude(config, workdir, dataset, plan, check_best(checkpoints, run, sound), run)
    found: dict[str, Any] = hosts.of_first(summary)
    return found


def _conclude(
    config: Config, workdir: pathlib.Path, dataset: Dataset, plan: Plan, best: SavedEpoch | None, run: dict[str, Any]
) -> dict[str, Any]:
    assert best is not None  # the last epoch is always saved
    trained = Trained(plan, *best.restore(plan), best.run)
    # Of several processes this one measures alone, on its first device.
    found = scores_on(stages.judges(config, best.run), trained, config.inference, dataset.test)
    measured = scores.measure(found, dataset.test.labels, best.run, "test")
    return conclude(trained, dataset, measured, run, workdir)


def _agreed_epochs(checkpoints: checkpoint.Checkpoints, config: Config) -> tuple[dict[int, SavedEpoch], SavedEpoch | None]:
    """What `sound_epochs` returns. Process 0 finds it, since faulty epochs are set aside, and the others read the same."""
    if hosts.count() == 1:
        return sound_epochs(checkpoints, config)
    sound, begun = dict[int, SavedEpoch](), None
    with hosts.first_only() as first:
        if first:
            sound, begun = sound_epochs(checkpoints, config)
    epochs, number, whole = hosts.of_first((list(sound), begun.epoch if begun else 0, begun in sound.values()))
    if not hosts.is_first():
        sound = {epoch: checkpoints.opened(epoch) for epoch in epochs}
        begun = (sound[number] if whole else checkpoints.inside.opened(number)) if number else None
    return sound, begun


def _begin_records(config: Config, workdir: pathlib.Path, checkpoints: checkpoint.Checkpoints, run: dict[str, Any], trains: bool) -> None:
    """Makes the records in the workdir those of a run that begins or goes on from this state."""
    # Saves inside of an epoch from which the run does not go on would be in the way of the next such save.
    checkpoints.inside.clear(keep=run_state.number(run) if "inside" in run else 0)
    for line in write_config(workdir, config, trains):
        notice(line)
    logbook.restore_metrics(workdir, run["history"])


def scores_on(devices: Mesh | None, trained: Trained, inference: str, split: Split) -> Float[np.ndarray, "groups n classes"]:
    """The scores of a split's images by all groups. The work is divided over the devices of a mesh; None: one device does it."""
    with mesh.within(devices):
        images = loop.placed(split, trained.plan.config.data_on, devices).images
        task, states = mesh.everywhere(devices, (trained.task, trained.states))
        return np.asarray(scores.make_scores(trained.plan, inference)(task, states, images))


def _digest(tree: Any) -> str:
    """The SHA-256 of the arrays of a tree."""
    leaves = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def _note_origin(run: dict[str, Any], here: dict[str, Any], trains: bool, before: dict[str, int]) -> None:
    """Adds `here` to a run's origins if the run trains here and `here` differs from the last origin, or if its settings have changed.

    A finished run that is only evaluated again keeps the origin that trained it. An origin without settings, as older versions wrote it,
    counts as one with the same; one without `devices` and `processes` had those of `before`.
    """
    # Older versions lack the settings that came later, which have their defaults.
    usual = {key: default_of(FIELDS[key]) for key in here["settings"]}
    last = [before | origin | {"settings": usual | origin.get("settings", here["settings"])} for origin in run["origins"][-1:]]
    other_settings = any(origin["settings"] != here["settings"] for origin in last)
    if other_settings or (trains and last != [here]):
        run["origins"].append(here)


def heads_of_others(states: States, config: Config, dataset: Dataset) -> str:
    """What is wrong, in words, if heads have come from config.init_from that were trained for other classes than those of the data."""
    all_new = all(state.has_new_head for state in states)
    return "" if all_new else other_classes(said_of(local_file(config)), dataset.class_names)


def start(plan: Plan, dataset: Dataset) -> tuple[States, Task]:
    """What a run begins with: groups from its seed or from config.init_from, and its task. What a weight file lacks is told on stderr."""
    config = plan.config
    task = make_task(config, dataset.num_classes, dataset.image_shape, dataset.mean, dataset.std, dataset.train.images)
    states = whitened(plan, init_states(plan, dataset.image_shape), dataset.train.images, task)
    if config.init_from:
        states, notes = read_weights(local_file(config), plan, states)
        notes += [other] if (other := heads_of_others(states, config, dataset)) else []
        for note in notes if hosts.is_first() else ():
            notice(f"{config.init_from}: {note}")
        states = with_new_optimizers(plan, states)
    return states, task
