"""A trained run as programs and notebooks use it."""

import contextlib
import functools
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from vffjax import paths
from vffjax.config import Config
from vffjax.data import in_memory, pictures
from vffjax.data import load as data_module
from vffjax.data.sets import Dataset
from vffjax.errors import UserError
from vffjax.files import read_json
from vffjax.runs import plots
from vffjax.runs.logbook import read_metrics
from vffjax.runs.trained import Trained
from vffjax.runs.workdir import load_run, read_config
from vffjax.training import feature_cache, scores
from vffjax.uses import evaluation


@contextlib.contextmanager
def arguments() -> Iterator[None]:
    """Lets the messages within speak of arguments, where those of the command line speak of flags: `workdir=...`, not `--workdir=...`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?<![^\s(\"'=])--(?=[a-z])", "", str(error))  # not within a path, which may hold two dashes
        if text == str(error):
            raise
        raise UserError(text) from error.__cause__
    except OSError as error:  # such as a folder that may not be read
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; check the path and its permissions") from error


class Prediction(NamedTuple):
    """What a run says of images."""

    classes: Shaped[np.ndarray, " n"]  # the name of the likeliest class of each image
    probabilities: Float[np.ndarray, "n classes"]  # by the voting ensemble, in the order of `Run.class_names`


class Run:
    """A trained run in its folder. `train` and `load` return one.

    Attributes:
        workdir: the run's folder.
        epoch: which saved epoch it is: best, latest, or a number.
    """

    def __init__(self, workdir: pathlib.Path, epoch: str = "best"):
        self.workdir, self.epoch = workdir, epoch

    def __repr__(self) -> str:
        return f"vffjax.load({str(self.workdir)!r})" if self.epoch == "best" else f"vffjax.load({str(self.workdir)!r}, {self.epoch!r})"

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return read_config(self.workdir)

    @functools.cached_property
    def trained(self) -> Trained:
        """Groups, states and task, as `vffjax.runs.trained` describes them."""
        with arguments():
            return load_run(self.workdir, self.epoch)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(self.trained.run["class_names"])

    @functools.cached_property
    def data(self) -> Dataset:
        """The images that the run was trained on, with their validation and test images."""
        with arguments():
            found = data_module.load(self.config)
            evaluation.check_data(found, self.trained.run, "", other_data=None)
            return found

    @property
    def metrics(self) -> Any:
        """The record of every epoch: a pandas.DataFrame if pandas is installed, else a list of dictionaries."""
        records = read_metrics(self.workdir)
        with contextlib.suppress(ImportError):
            import pandas

            return pandas.DataFrame(records)
        return records

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds: errors in percent, times, versions. Raises `UserError` if the run has not finished."""
        try:
            return read_json(self.workdir / "summary.json")
        except FileNotFoundError:
            done, total = len(read_metrics(self.workdir)), self.config.epochs
            each = " for each group" if self.config.schedule == "sequential" else ""
            problem = f"the run has not finished ({done} epochs are trained, and config.epochs={total}{each})"
            raise UserError(f"{self.workdir}: {problem}; train it to its end, or use vffjax.evaluate(run)") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.workdir / 'summary.json'}: cannot be read ({error}); train again with the same arguments") from None

    def predict(self, images: Any) -> Prediction:
        """Classifies images by the groups that vote, or by the heads of all trained groups if the run is configured for `inference=sweep`.

        Args:
            images: an array `[n, h, w]` or `[n, h, w, c]` of the run's image shape, as bytes, numbers from 0 to 255, or floats from 0 to 1.
                Or a picture (a path, or an image of Pillow) or a list of them, which are brought to that shape as by `vffjax predict`.

        Raises:
            UserError: the images do not fit, or a picture cannot be read.
        """
        given, trained = self.as_images(images), self.trained
        found = scores.make_scores(trained.plan, trained.scored_by)(trained.task, trained.states, given)
        log_p = scores.ensemble(np.asarray(found), trained.voting, trained.vote_weights).astype(np.float64)
        p = np.exp(log_p - log_p.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return Prediction(np.array(self.class_names)[p.argmax(axis=-1)], p.astype(np.float32))

    def features(self, images: Any, group: int = -1) -> Float[np.ndarray, "n *feature"]:
        """The feature maps of images behind a group, which classification sees.

        Args:
            images: as for `predict`.
            group: its number from 0; a negative one counts from the last.

        Raises:
            UserError: as `predict`; also if there is no such group.
        """
        trained, groups = self.trained, len(self.trained.plan.groups)
        if not -groups <= group < groups:
            raise UserError(f"group={group}: the network has {groups} groups; give one from 0 to {groups - 1}")
        given, active = self.as_images(images), group % groups + 1
        size = feature_cache.BATCHES_PER_FETCH * trained.plan.config.eval_batch_size
        parts = [given[start : start + size] for start in range(0, len(given), size)]
        program = functools.partial(feature_cache.clean_features, trained.plan.program, active, trained.task, trained.states)
        return np.concatenate([np.asarray(program(part), np.float32) for part in parts])

    def plot(self) -> Image.Image:
        """The curves of loss and error over the epochs so far, as a picture that a notebook shows. They are drawn into curves.png."""
        title = ""
        with contextlib.suppress(UserError):  # of a run that has not finished
            title = plots.title_of(self.workdir, self.config.rule, self.summary["test_error"])
        path = plots.plot_curves(self.workdir, title)
        if path is None:
            raise UserError(f"{self.workdir / 'curves.png'}: cannot be drawn; the line above says why")
        with Image.open(path) as image:
            return image.copy()

    def as_images(self, images: Any) -> UInt8[np.ndarray, "n h w c"]:
        """Images as bytes of the run's shape; `predict` says what is taken, and what is raised."""
        h, w, c = shape = tuple(self.trained.run["image_shape"])
        if isinstance(images, (str, pathlib.Path, Image.Image)):
            images = [images]
        elif isinstance(images, Iterator):  # such as the paths that a glob finds
            images = list(images)
        if isinstance(images, (list, tuple)) and images and all(isinstance(one, (str, pathlib.Path, Image.Image)) for one in images):
            return np.stack([_picture(one, (h, w, c)) for one in images])
        if getattr(images, "shape", None) == shape:
            raise UserError("images: is one image; give an array of images, here image[None]")
        found = in_memory.as_bytes(images, "images")
        if found.shape[1:] != shape:
            here, there = ("x".join(map(str, s)) for s in (found.shape[1:], shape))
            raise UserError(f"images: are {here}, and those of the run are {there}; resize them, or give pictures as files")
        if not len(found):
            raise UserError("images: there is none; give at least one")
        return found


# Modes of Pillow's images that its PNG files can hold, and what others become without loss.
_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")
_OF_PNG = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}


def _picture(given: str | pathlib.Path | Image.Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    if not isinstance(given, Image.Image):
        return pictures.read_image(paths.local(given, "images"), shape)
    if given.mode in ("I", "F"):
        raise UserError(f"images: a picture of mode {given.mode} does not say which number is white; give an array of bytes")
    buffer, mode = io.BytesIO(), _OF_PNG.get(given.mode, given.mode)
    try:
        with pictures.without_warnings():
            given.convert(mode if mode in _PNG else "RGB").save(buffer, "PNG", exif=given.getexif())  # which says how it is turned
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise UserError(f"images: not a readable picture ({type(error).__name__}: {error})") from None
    return pictures.decoded(buffer.getvalue(), shape[:2], "L" if shape[2] == 1 else "RGB", "images")[0]
