"""The trained ensemble as one file that runs without this package: StableHLO by `jax.export`, for CPU, CUDA and TPU.

JAX and flatbuffers run it; JAX uses flatbuffers to read the file and does not install it.

Byte images [b, h, w, c] of the data's own size go in, for any b; log-probabilities come out. Weights and pixel statistics are constants
in it, and nothing that trains. Beside FILE.stablehlo lies FILE.json, which says what the file is, its digest, and how to call it.

By JAX's promise (`SEE`) a file runs on a jaxlib that was built up to 6 months after the one that wrote it, or up to 3 weeks before: to
keep a run for longer, keep its weights. And a file is a program: JAX runs any of its own custom calls that it names. Load no stranger's.
"""

import contextlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vffjax.errors import UserError
from vffjax.files import read_json, replace_file, sha256, write_json
from vffjax.networks.groups import GroupState
from vffjax.rules.streams import Task
from vffjax.training.augment import normalised
from vffjax.training.plan import Plan
from vffjax.training.trainer import clean_log_p

FORMAT = "vffjax ensemble 1"
PLATFORMS = ("cpu", "cuda", "tpu")
SEE = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
# What a flatbuffer holds at the most, less what is not weights.
_MAX_BYTES = 2**31 - 2**24


def make_ensemble(
    plan: Plan, task: Task, states: tuple[GroupState, ...], voting: tuple[int, ...], trained: int
) -> Callable[[UInt8[Array, "batch h w c"]], dict[str, Float[Array, "*axes"]]]:
    """Log-probabilities of images by the `trained` first groups' heads, `groups`, and by those that vote, `ensemble`. No label goes in."""

    def ensemble(images: Array) -> dict[str, Array]:
        log_p = clean_log_p(plan, task, states, normalised(task, images), trained)
        # The mean is that of inference.ensemble, which need not be normalised to be compared.
        votes = jnp.stack([log_p[group] for group in voting])
        return {"ensemble": jax.nn.log_softmax(votes.mean(axis=0)), "groups": log_p}

    return ensemble


def export_ensemble(function: Callable[..., Any], image_shape: tuple[int, int, int]) -> jax.export.Exported:
    """`function` of any number of byte images, lowered for all `PLATFORMS`. Equal programs give equal bytes, in any folder and process."""
    (batch,) = jax.export.symbolic_shape("b")
    with _without_locations():
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8))


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Lowers without Python's file names and lines: they tell of this machine, and of what was traced here before."""
    settings = {"jax_include_full_tracebacks_in_locations": True, "jax_traceback_in_locations_limit": 0}
    before = {key: getattr(jax.config, key) for key in settings}
    try:
        for key, value in settings.items():
            jax.config.update(key, value)
        yield
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """Where the description of an artefact lies."""
    return path.with_suffix(".json")


def check_place(path: pathlib.Path) -> None:
    """Raises `UserError` if no artefact can be written, or if its description would replace another file, such as a run's config.json."""
    beside = sidecar(path)
    # Not exists(), which is false of a link to nothing.
    if (beside.exists() or beside.is_symlink()) and not _described(beside):
        raise UserError(f"--out={path}: {beside} beside it is not of an export and would be replaced; give another .stablehlo file")
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format=stablehlo: JAX writes it by flatbuffers, which is not installed; pip install flatbuffers")


def _described(path: pathlib.Path) -> bool:
    try:
        return read_json(path)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def write_artefact(path: pathlib.Path | str, plan: Plan, states: tuple[GroupState, ...], task: Task, run: dict[str, Any]) -> dict[str, Any]:
    """Writes the ensemble of a run, as `workdir.load_run` gives it, and its description; returns the description.

    Each file is replaced in one step, the description last: until then its `sha256` is not that of the file. Raises `UserError`, `OSError`.
    """
    path, trained = pathlib.Path(path), run["trained_groups"]
    check_place(path)
    size = sum(leaf.nbytes for state in states[:trained] for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    if size > _MAX_BYTES:
        raise UserError(f"--format=stablehlo: {size / 1e9:.1f} GB of weights, and a file holds 2; use --format=safetensors")
    # The voting groups were chosen for the configured inference; a sweep's choice says nothing of the heads.
    voting = tuple(run["voting"]) if plan.config.inference == "heads" else tuple(range(trained))
    exported = export_ensemble(make_ensemble(plan, task, states, voting, trained), tuple(run["image_shape"]))
    content = bytes(exported.serialize(vjp_order=0))
    replace_file(path, content)
    described = {
        "format": FORMAT,
        "file": path.name,
        "sha256": sha256(content),
        "epoch": run["epoch"],
        "class_names": run["class_names"],
        "image_shape": list(run["image_shape"]),
        "image_dtype": "uint8",
        "groups": [group.name for group in plan.groups[:trained]],
        "voting": list(voting),
        "platforms": list(exported.platforms),
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "calling_convention_version": exported.calling_convention_version,
        "needs": "pip install jax flatbuffers",
        "call": _call(path.name, run["image_shape"], len(run["class_names"])),
        "compatibility": f"runs on a jaxlib built up to 6 months after the one named here, or up to 3 weeks before: {SEE}",
        "trust": "a program: load none from strangers, and compare its sha256",
    }
    write_json(sidecar(path), described)
    return described


def _call(name: str, image_shape: tuple[int, int, int], classes: int) -> list[str]:
    """Three lines of Python that classify `images`."""
    shape = ", ".join(map(str, image_shape))
    return [
        "import pathlib, jax.export",
        f"classify = jax.export.deserialize(bytearray(pathlib.Path({name!r}).read_bytes())).call",
        f'log_p = classify(images)["ensemble"]  # uint8 [b, {shape}] -> float32 [b, {classes}]; "groups": [groups, b, {classes}]',
    ]
