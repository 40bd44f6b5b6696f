"""Export of the trained ensemble as one file that runs without this package: StableHLO, written by `jax.export`, for CPU, CUDA and TPU.

The program takes byte images [b, h, w, c] of the data set's own size, for any b, and returns log-probabilities. Weights and pixel
statistics are constants in it; nothing in it is for training. Beside FILE.stablehlo lies FILE.json, which says what the file is, gives its
digest, and shows how to call it. To run it takes JAX and flatbuffers, which JAX needs to read the file but does not install.

JAX promises (`SEE`) that a file runs on any jaxlib that was built up to 6 months after the one that wrote it, or up to 3 weeks before.
To keep a run for longer, keep its weights. The file is a program, and may name any of JAX's own custom calls: load none from strangers.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vffjax.errors import UserError, notice
from vffjax.files import holds, replace_file, sha256, write_json
from vffjax.runs.trained import Trained
from vffjax.training import scores

FORMAT = "vffjax ensemble 1"
PLATFORMS = ("cpu", "cuda", "tpu")
SEE = "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
# A flatbuffer holds less than 2 GiB; some of it is left for what is not weights.
_MAX_BYTES = 2**31 - 2**24


def make_ensemble(trained: Trained) -> Callable[[UInt8[Array, "batch h w c"]], dict[str, Float[Array, "*axes"]]]:
    """The function that is exported: from byte images to log-probabilities, by what the run scores by (`Trained.scored_by`).

    Returns:
        A function of images [batch, h, w, c], which returns `groups` [groups, batch, classes], for all groups that have trained, and
        `ensemble` [batch, classes], the normalised mean over the groups that vote, or their weighted sum.
    """
    plan = dataclasses.replace(trained.plan, groups=trained.plan.groups[: trained.groups])
    states, task = trained.states[: trained.groups], trained.task

    def ensemble(images: Array) -> dict[str, Array]:
        log_p = scores.of_views(plan, trained.scored_by, task, states, images)
        # Evaluation takes the same mean (`scores.ensemble`), without the normalisation, which changes no comparison.
        votes = jnp.stack([log_p[group] for group in trained.voting])
        weights = jnp.array(trained.vote_weights, votes.dtype).reshape(-1, 1, 1)
        mean = jnp.sum(weights * votes, axis=0) if trained.vote_weights else votes.mean(axis=0)
        return {"ensemble": jax.nn.log_softmax(mean), "groups": log_p}

    return ensemble


def export_ensemble(function: Callable[..., Any], image_shape: tuple[int, int, int]) -> jax.export.Exported:
    """`function`, lowered for any number of byte images of this shape (h, w, c) and for all `PLATFORMS`.

    Equal programs give equal bytes, in whatever folder and process.
    """
    (batch,) = jax.export.symbolic_shape("b")
    with _without_locations():
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8))


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves Python's file names and line numbers out of what is lowered: they depend on this machine and on what was traced before."""
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
    """The path of an artefact's description."""
    return path.with_suffix(".json")


def check_place(path: pathlib.Path) -> None:
    """Raises `UserError` if no artefact can be written to `path`: its description would replace another file, such as a run's config.json,
    or flatbuffers is not installed."""
    beside = sidecar(path)
    # exists() alone is false for a broken link.
    if (beside.exists() or beside.is_symlink()) and not holds(beside, "format", FORMAT):
        problem = f"{beside} beside it was not written by an export and would be replaced"
        raise UserError(f"--out={path}: {problem}; give another .stablehlo file")
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format=stablehlo: JAX needs flatbuffers to write it, which is not installed; pip install flatbuffers")


def write_artefact(path: pathlib.Path | str, trained: Trained) -> dict[str, Any]:
    """Writes the ensemble of a trained run, and its description.

    Each file is replaced in one step, the description last. Until then the digest in an old description does not fit the new file.

    Returns:
        The description: what FILE.json holds.

    Raises:
        UserError: the files cannot be written there (see `check_place`), or the weights do not fit into one file.
        OSError: the disk refuses.
    """
    path, run = pathlib.Path(path), trained.run
    check_place(path)
    if trained.caution:
        notice(trained.caution)
    size = sum(leaf.nbytes for state in trained.states[: trained.groups] for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    if size > _MAX_BYTES:
        raise UserError(f"--format=stablehlo: {size / 1e9:.1f} GB of weights, and a file holds 2; use --format=safetensors")
    exported = export_ensemble(make_ensemble(trained), tuple(run["image_shape"]))
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
        "groups": [group.name for group in trained.plan.groups[: trained.groups]],
        "voting": list(trained.voting),
        **({"vote_weights": list(trained.vote_weights)} if trained.vote_weights else {}),
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
    """Three lines of Python that load the file `name` and classify `images` by it."""
    shape = ", ".join(map(str, image_shape))
    return [
        "import pathlib, jax.export",
        f"classify = jax.export.deserialize(bytearray(pathlib.Path({name!r}).read_bytes())).call",
        f'log_p = classify(images)["ensemble"]  # uint8 [b, {shape}] -> float32 [b, {classes}]; "groups": [groups, b, {classes}]',
    ]
