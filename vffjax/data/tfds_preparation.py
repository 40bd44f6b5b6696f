"""Downloads and prepares sets of tensorflow-datasets (TFDS); MNIST, Fashion-MNIST and CIFAR without TensorFlow."""

import contextlib
import importlib.util
import io
import os
import pathlib
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from vffjax.data.tfds_files import dataset, find, imported, not_installed, one_line, quiet
from vffjax.errors import SafeStream, UserError, bad_key

REACH_SECONDS = 3.0  # how long a server may take to answer before it counts as unreachable


def prepare(name: str, root: pathlib.Path) -> pathlib.Path:
    """Downloads a set and writes it below `root` as array_record files. A set that is prepared already is left as it is.

    Archives in ROOT/downloads/manual are used instead of a download.

    Returns:
        The folder of the prepared set.

    Raises:
        UserError: the set could not be prepared. Nothing is left behind. If there is no network, this takes at most `REACH_SECONDS`.
    """
    folder = find(name, root)
    if folder:
        return folder
    tfds = imported(name)
    fix = f'run "vffjax prepare {dataset(name)}" on a machine with network, or set config.data_dir or TFDS_DATA_DIR to a prepared folder'
    inside = [root / name, *([root / name.partition("/")[0]] if "/" in name else [])]  # a name may have a configuration: NAME/CONFIG
    missing = [p for p in (*inside, root, *root.parents) if not os.path.exists(p)]  # innermost first
    manual = root / "downloads" / "manual"
    try:
        with quiet():
            import array_record.python.array_record_module  # noqa: F401  # if it is missing, say so before the download

            builder = tfds.builder(name, data_dir=root, file_format="array_record")
        files = builder.url_infos or {}
        if not (files and all(info.filename and (manual / info.filename).is_file() for info in files.values())):
            problem = _unreachable(next(iter(files), "https://storage.googleapis.com"))
            if problem:
                raise bad_key("dataset", dataset(name), f"not prepared in {root} and the download failed ({problem})", fix)
        root.mkdir(parents=True, exist_ok=True)
        # A download folder of our own can be removed without harm to another process that prepares another set.
        downloads_at = tempfile.TemporaryDirectory(prefix=f".{name.replace('/', '-')}-", dir=root)
        # TFDS may print to a terminal, where its progress bars are wanted. Elsewhere its output is dropped, so that a failure is one line.
        shown: Any = SafeStream(sys.stderr) if SafeStream(sys.stderr).isatty() else io.StringIO()
        with downloads_at as downloads, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), _without_tensorflow():
            builder.download_and_prepare(download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=manual))
    except UserError:
        raise
    except ImportError as error:
        raise not_installed(name, error) from None
    except Exception as error:  # requests, TFDS and the file system raise many types of errors
        folder = find(name, root)
        if folder:  # another process was faster
            return folder
        raise bad_key("dataset", dataset(name), f"not prepared in {root} and preparing it failed ({one_line(error)})", fix) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()  # removes only empty folders, which a failure leaves
    folder = find(name, root)
    if folder is None:
        raise bad_key("dataset", dataset(name), f"it was prepared, but {root / name} holds no prepared version", fix)
    return folder


def _unreachable(url: str) -> str:
    """Says why `url` cannot be reached; an empty string if it can.

    TFDS itself would try ten times with growing pauses. The request runs in a thread that is abandoned after `REACH_SECONDS`, because
    the look-up of a host's address may hang for longer than any timeout of requests.
    """
    import requests

    outcome = [f"no answer from {url.split('/')[2]} within {REACH_SECONDS:g} s"]

    def attempt() -> None:
        try:
            with requests.get(url, stream=True, timeout=REACH_SECONDS) as response:
                outcome.append("" if response.ok else f"{url} answers {response.status_code}")
        except requests.Timeout:
            pass
        except (OSError, ValueError) as error:  # the errors of requests are OSErrors
            cause = getattr(error.args[0], "reason", error) if error.args else error
            outcome.append(f"{url.split('/')[2]}: {one_line(cause)}")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return outcome[-1]


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Replaces the parts of TensorFlow that TFDS uses to prepare these sets, if it is not installed: PNG encoding and plain files."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from PIL import Image
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import cifar, mnist

    def encode(encoder: Any, pixels: np.ndarray) -> bytes:
        if encoder.encoding_format != "png" or pixels.dtype != np.uint8:
            raise ValueError(f"only uint8 PNG can be written without TensorFlow, not {pixels.dtype} {encoder.encoding_format}")
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        return buffer.getvalue()

    files = types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open))
    stand_in = types.SimpleNamespace(io=files, compat=types.SimpleNamespace(as_text=str))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(image_feature._ImageEncoder, "_encode_image", encode))
        for module in (cifar, mnist, extractor):
            stack.enter_context(mock.patch.object(module, "tf", stand_in))
        yield
