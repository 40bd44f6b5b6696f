"""Image files in, ranked classes out."""

import io
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vffjax.errors import UserError
from vffjax.inference import ensemble, make_scores
from vffjax.workdir import load_run

# A file that claims more pixels than this is refused before it is decoded: 64 Mi pixels take 530 MB to decode and convert.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """One PNG or JPEG, in grey or colour as the network wants it, resized to (h, w). Raises `UserError` naming the file."""
    h, w, c = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit warns; ours refuses
            if os.path.exists(path) and not os.path.isfile(path):  # to read a pipe would wait for ever
                raise UserError(f"{path}: not a file; give a PNG or JPEG image")
            if os.path.getsize(path) > MAX_BYTES:
                raise UserError(f"{path}: {os.path.getsize(path)} bytes; give an image of at most {MAX_BYTES} bytes")
            # From memory, because a file sets aside as many bytes as a chunk claims to have, up to 4 GB.
            with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width}x{image.height} pixels; give an image of at most {MAX_PIXELS} pixels")
                # Pillow would clip 16-bit grey at 255.
                eight_bit = Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I") else image
                ready = eight_bit.convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BILINEAR)
    except UserError:
        raise
    except Image.DecompressionBombError:  # beyond Pillow's own limit
        raise UserError(f"{path}: far too many pixels; give an image of at most {MAX_PIXELS} pixels") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a PNG or JPEG image") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: not a readable PNG or JPEG image ({type(error).__name__}); convert or replace it") from None
    return np.asarray(ready, np.uint8).reshape(h, w, c)


def rank(log_p: Float[np.ndarray, " classes"], class_names: list[str], top: int) -> list[dict[str, Any]]:
    """The likeliest classes with their probabilities; `log_p` need not be normalised."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    return [{"class": class_names[i], "probability": float(p[i])} for i in np.argsort(-p, kind="stable")[:top]]


def predict(workdir: pathlib.Path | str, paths: Sequence[pathlib.Path | str], epoch: str = "best", top: int = 3) -> list[dict[str, Any]]:
    """For each file the top classes of every group's head, and of the ensemble of the groups that vote."""
    plan, states, task, run = load_run(workdir, epoch)
    images = np.stack([read_image(pathlib.Path(path), tuple(run["image_shape"])) for path in paths])
    scores = np.asarray(make_scores(plan, "heads")(task, states, jnp.asarray(images)))
    names = run["class_names"]
    found = []
    trained = range(run["trained_groups"])
    # The voting groups were chosen for the configured inference; a sweep's choice says nothing of the heads.
    voting = tuple(run["voting"]) if plan.config.inference == "heads" else tuple(trained)
    for i, path in enumerate(paths):
        by = {plan.groups[g].name: rank(scores[g, i], names, top) for g in trained}
        by["ensemble"] = rank(ensemble(scores[:, i : i + 1], voting)[0], names, top)
        found.append({"image": str(path), "by": by})
    return found
