"""Image sets of tensorflow-datasets made up offline, and what the tests of the data share. Nothing here is a test."""

import contextlib
import io
import tarfile

import numpy as np
import pytest

from vffjax.config import Config
from vffjax.data import load as data
from vffjax.errors import UserError

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_NAMES = tuple(f"class{k}" for k in range(10))
PER_BATCH, BATCHES = 7, [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


def as_set(split):
    """The labelled images as a multiset, whatever their order."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True))


def fails(call, *parts):
    """`call` must raise a UserError on one line with all `parts` in it; returns the message."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def tar_gz(files):
    """A cifar archive with the given files, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def put_manual(patch, kind, data_dir, archives):
    """Puts archives {url: bytes} where TFDS takes them instead of a download, and makes their checksums the expected ones."""
    from tensorflow_datasets.core.download import checksums

    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    for url, content in archives.items():
        path = manual / url.rsplit("/", 1)[1]
        path.write_bytes(content)
        patch.setitem(kind.url_infos, url, checksums.compute_url_info(path))


@contextlib.contextmanager
def fake_cifar(data_dir):
    """Makes `prepare("cifar10", data_dir)` work offline; gives the true {"train" and "test": Split}."""
    from tensorflow_datasets.image_classification import cifar

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(len(BATCHES) * PER_BATCH) % 10).astype(np.int32)
    images = rng.integers(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
    planes = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)]
    files = {name: b"".join(planes[k * PER_BATCH : (k + 1) * PER_BATCH]) for k, name in enumerate(BATCHES)}
    files["batches.meta.txt"] = "\n".join(CIFAR_NAMES).encode()
    train = 5 * PER_BATCH
    with pytest.MonkeyPatch.context() as patch:
        put_manual(patch, cifar.Cifar10, data_dir, {CIFAR_URL: tar_gz(files)})
        yield {"train": data.Split(images[:train], labels[:train]), "test": data.Split(images[train:], labels[train:])}


def load(data_dir, **keys):
    return data.load(Config(dataset="cifar10", data_dir=str(data_dir), **keys))
