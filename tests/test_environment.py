"""What the environment tells JAX: where it cannot be, one line; where it is merely unusual, the same work."""

import dataclasses
import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from command_lines import TINY_FLAGS, in_a_process
from oracles import config_of
from vffjax import backend
from vffjax.config import Config
from vffjax.costs import fits, memory, targets
from vffjax.costs.memory import least_bytes
from vffjax.data import sizes_of
from vffjax.errors import UserError
from vffjax.training import scores as inference
from vffjax.training import trainer
from vffjax.training.batch import abstract_batch
from vffjax.training.checks import plan_before_data
from vffjax.training.plan import abstract_start, make_plan
from vffjax.uses.early_exit import make_early_exit, votes_of

REFUSED = {
    "JAX_PLATFORMS=cuda": ["JAX_PLATFORMS=cuda: JAX cannot use this platform here", "set JAX_PLATFORMS=cpu, or unset it"],
    "JAX_ENABLE_X64=perhaps": ["JAX_ENABLE_X64=perhaps: JAX cannot use this value", "correct it, or unset it"],
    "XLA_FLAGS=--xla_no_such_flag=1": ["XLA_FLAGS=--xla_no_such_flag=1: Unknown flag", "remove the flag, or correct it"],
}


@pytest.mark.parametrize("given", REFUSED)
def test_an_environment_that_jax_refuses_is_one_line(given, tmp_path):
    name, _, value = given.partition("=")
    code = f"import os, sys; os.environ[{name!r}] = {value!r}; from vffjax.cli.main import main; main(sys.argv[1:])"
    done = in_a_process("-c", code, "train", *TINY_FLAGS, f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert all(part in done.stderr for part in REFUSED[given]), done.stderr
    assert not (tmp_path / "run").exists()


MESSAGES = {
    "a word for a number": (
        {"JAX_NUM_CPU_DEVICES": "x"},
        'Invalid value "x" for JAX flag jax_num_cpu_devices',
        False,
        "JAX_NUM_CPU_DEVICES=x: ",
    ),
    "a word for a choice": ({"JAX_DEFAULT_DEVICE": "foo"}, "jax.default_device must be passed a Device", False, "JAX_DEFAULT_DEVICE=foo: "),
    "no processor": ({"JAX_NUM_CPU_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, "Unable to initialize 'cpu'", True, "JAX_NUM_CPU_DEVICES=0: "),
    "the older variable": ({"JAX_PLATFORM_NAME": "gpu", "JAX_PLATFORMS": "cpu"}, "Unknown backend: 'gpu'", True, "JAX_PLATFORM_NAME=gpu: "),
    "upper case": ({"JAX_PLATFORMS": "CPU"}, "Backend 'CPU' is not known", True, "JAX_PLATFORMS=CPU: "),
    "no words at all": ({"JAX_PLATFORMS": "cuda"}, "", True, "JAX_PLATFORMS=cuda: "),
    "nothing set": ({}, "jaxlib is too old", False, "JAX_PLATFORMS=: JAX cannot start (ValueError: jaxlib is too old); "),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_variable_at_fault_is_named(case, monkeypatch):
    given, text, imported, begins = MESSAGES[case]
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert str(backend._explained(ValueError(text), imported)).startswith(begins)


def test_flags_that_xla_knows_are_left_to_it():
    backend._check_xla_flags("--xla_force_host_platform_device_count=2")
    with pytest.raises(UserError, match="Couldn't interpret value maybe"):
        backend._check_xla_flags("--xla_gpu_deterministic_ops=maybe")


def test_without_jit_there_is_nothing_to_run(fails, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    with jax.disable_jit():
        fails("train", *TINY_FLAGS, parts=["JAX_DISABLE_JIT=1", "unset it"])


@pytest.mark.parametrize("name", ["JAX_TRANSFER_GUARD", "JAX_TRANSFER_GUARD_HOST_TO_DEVICE"])
def test_a_guard_against_transfers_is_one_line(name, fails, monkeypatch):
    monkeypatch.setenv(name, "disallow")
    before = getattr(jax.config, name.lower())
    jax.config.update(name.lower(), "disallow")
    try:
        fails("train", *TINY_FLAGS, parts=[f"{name}=disallow", "unset it"])
    finally:
        jax.config.update(name.lower(), before or "allow")


def test_weights_to_start_from_are_not_looked_at_before_jax_was(fails, monkeypatch, tmp_path):
    def refuse():
        raise UserError("JAX_ENABLE_X64=perhaps: no")

    safetensors.numpy.save_file({"group0": np.zeros(1, np.float32)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(backend, "start", refuse)
    fails("train", *TINY_FLAGS, f"--config.init_from={tmp_path / 'w.safetensors'}", parts=["JAX_ENABLE_X64=perhaps: no"])


def test_jax_that_stops_at_nan_is_one_line(fails, monkeypatch, tmp_path):
    def stop(*_):
        raise FloatingPointError("invalid value (nan) encountered in mul")

    monkeypatch.setattr("vffjax.runs.experiment.train", stop)
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path}", parts=["(nan) encountered in mul", "unset JAX_DEBUG_NANS", "config.learning_rate"])


# --- strict promotion of types, 64 bits


VARIANTS = [
    {},
    {"labelling": "triplet", "negatives": "hard", "optimizer": "sgd", "clip_norm": 1.0},
    {"rule": "ff", "peer_normalisation": 0.1, "cutout": 3, "flip": True, "crop_padding": 1},
    {"precision": "bf16", "norm": "anchor", "similarity": "position", "rematerialise": True},
    {"schedule": "sequential", "on_nonfinite": "skip", "label_smoothing": 0.1},
    {"rule": "head", "grouping": "all", "precision": "bf16", "norm": "layer"},
    {"random_erasing": 0.5, "trivial_augment": True, "mixup": 0.8, "random_resized_crop": 0.5, "color_jitter": 0.3},
]


def trace(changes):
    """Traces the epoch, both kinds of inference and the early exit; types of the new states."""
    config = config_of(dataset="synthetic", network="conv", widths=(4, 6), pools=(2, 1), batch_size=8, epochs=2, **changes)
    plan = make_plan(config, 80, 10)
    task, states, batch = memory.step_arguments(plan, targets.find("cpu"))
    shape = sizes_of(Config(dataset="synthetic")).image_shape
    images = jax.ShapeDtypeStruct((80, *shape), jnp.uint8)
    batches = abstract_batch(8, shape, len(plan.groups), None, (3,))
    active = plan.active(plan.total_epochs - 1)
    step = functools.partial(trainer.train_step, plan.program, active)
    segment = functools.partial(trainer.run_segment, plan.program, active)
    new, found = jax.eval_shape(step, task, states, batch), jax.eval_shape(segment, task, states, batches)
    types = lambda tree: jax.tree.map(lambda a: a.dtype, tree)  # noqa: E731
    assert types(new) == types(found)
    assert types(new[0]) == types(states)
    assert {batch.dtype for batch in (batch.images, batch.labels, batch.ids)} == {np.dtype(np.uint8), np.dtype(np.int32)}
    for name in ["heads"] + ["sweep"] * (config.rule != "head"):
        jax.eval_shape(inference.make_scores(plan, name), task, states, images)
    votes = votes_of(tuple(range(len(plan.groups))))
    jax.eval_shape(make_early_exit(plan, votes), task, states, images, jax.ShapeDtypeStruct((), jnp.float32))
    return {leaf.dtype for leaf in jax.tree.leaves(new[0])}


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_whole_program_is_traced_under_strict_promotion_and_in_64_bits(changes):
    # That every type is said is a property of the traced program; nothing is compiled.
    wanted = {np.dtype(np.float32)} | ({np.dtype(np.int32)} if changes.get("optimizer") != "sgd" else set())  # AdamW counts its steps
    with jax.numpy_dtype_promotion("strict"):
        assert trace(changes) == wanted
    with jax.enable_x64(True):
        assert trace(changes) == wanted
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert trace(changes) == wanted


# --- memory of the machine


class Device:
    device_kind = "chip"

    def __init__(self, platform, stats):
        self.platform, self._stats = platform, stats

    def memory_stats(self):
        if isinstance(self._stats, Exception):
            raise self._stats
        return self._stats


def test_the_memory_of_one_device_is_what_counts():
    assert fits.bytes_of(Device("gpu", {"bytes_limit": 5})) == 5
    for stats in (None, {}, NotImplementedError("no")):
        assert fits.bytes_of(Device("gpu", stats)) is None
        assert fits.bytes_of(Device("cpu", stats)) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_where_nobody_says_how_much_memory_there_is_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(fits, "os", types.SimpleNamespace())  # as on Windows, which has no sysconf
    assert fits.bytes_of(Device("cpu", None)) is None
    fits.check_memory(config_of(widths=(2**15, 2**15), batch_size=1000))


def eight_devices(monkeypatch, limit):
    devices = [Device("gpu", {"bytes_limit": limit})] * 8
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def test_several_devices_make_none_larger_than_it_is(monkeypatch):
    config = config_of(widths=(64, 64), devices=1)
    eight_devices(monkeypatch, least_bytes(config) // 2)
    with pytest.raises(UserError, match=r"needs 0\.0 GB at the least, and chip has"):
        fits.check_memory(config)


def test_each_of_several_devices_has_all_parameters_and_its_part_of_the_rows(monkeypatch):
    config = config_of(dataset="synthetic", network="conv", widths=(64, 64), pools=(1, 1), batch_size=256, devices=8)
    alone, each = least_bytes(config), least_bytes(config, 8)
    states = (8 * each - alone) / 7
    assert 0 < states < each < alone / 4
    eight_devices(monkeypatch, each)
    fits.check_memory(config)
    with pytest.raises(UserError, match=r"needs 0\.0 GB at the least, and chip has"):
        fits.check_memory(dataclasses.replace(config, devices=1))
    eight_devices(monkeypatch, each - 1)
    with pytest.raises(UserError, match=r"needs 0\.0 GB at the least on each of 8 devices, and chip has"):
        fits.check_memory(config)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd"}, {"optimizer": "muon"}, {"frozen_groups": 2}, {"overrides": {"group1": {"optimizer": "sgd"}}}],
    ids=str,
)
def test_the_least_memory_is_no_more_than_that_of_the_states(changes):
    config = config_of(widths=(300, 300), grouping="layer", batch_size=1, **changes)
    plan, sizes = plan_before_data(config)
    states = [(state.params, state.opt_state) for state in abstract_start(plan, sizes.image_shape)[1]]
    kernels = sum(4 * leaf.size for leaf in jax.tree.leaves(states) if leaf.ndim > 1)
    assert 0.9 * kernels < least_bytes(config) <= kernels  # heads are not counted


def test_a_stage_of_a_pipeline_has_its_part_of_the_parameters_or_the_largest_map(monkeypatch):
    config = config_of(dataset="synthetic", network="conv", widths=(64, 64), pools=(1, 1), grouping="layer", schedule="pipeline", devices=2)
    joint = least_bytes(dataclasses.replace(config, schedule="joint"))
    assert joint / 2 <= least_bytes(config, 2) < joint
    wide = dataclasses.replace(config, widths=(512, 512), batch_size=1)
    assert least_bytes(wide, 2) < 0.6 * least_bytes(dataclasses.replace(wide, schedule="joint"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_long_values_that_differ_are_told_in_a_few_lines_on_ci_too(wrapped, request, monkeypatch):
    """pytest's own account of two pictures on CI takes 15 minutes, in which nothing says which test it is."""
    monkeypatch.setenv("CI", "true")
    left, right = (np.random.default_rng(seed).bytes(4000) for seed in (0, 1))
    values = ({"picture": left}, {"picture": right}) if wrapped else (left, left[:1000] + right[1000:])
    found = request.config.hook.pytest_assertrepr_compare(config=request.config, op="==", left=values[0], right=values[1])
    assert len(found[0]) < 10
    assert wrapped or "byte 1000" in found[0][1]
