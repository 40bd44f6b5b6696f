"""Preparing an image set: offline from archives, and without a network, promptly, with the way out, and without a trace."""

import gzip
import socket
import threading
import time

import numpy as np
import pytest

from image_sets import BATCHES, CIFAR_NAMES, CIFAR_URL, as_set, fails, load, put_manual, tar_gz, tree
from oracles import slow_but
from vffjax.config import Config
from vffjax.data import load as data
from vffjax.data import tfds_preparation


def test_mnist_prepared_offline_and_tensorflow_put_back(tmp_path, monkeypatch):
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import mnist

    rng, before = np.random.default_rng(0), (mnist.tf, image_feature._ImageEncoder._encode_image)
    truth, archives = {}, {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 20)):
        monkeypatch.setattr(mnist, f"_{split.upper()}_EXAMPLES", count)
        truth[split] = data.Split(rng.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8), np.arange(count, dtype=np.int32) % 10)
        archives[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + truth[split].images.tobytes())
        archives[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + truth[split].labels.astype(np.uint8).tobytes())
    put_manual(monkeypatch, mnist.MNIST, tmp_path, {mnist._MNIST_URL + name: content for name, content in archives.items()})
    made = data.load(Config(dataset="mnist", data_dir=str(tmp_path), val_fraction=0.0))  # prepares, then reads
    assert made.image_shape == (28, 28, 1) and made.class_names == tuple("0123456789")
    assert as_set(made.train) == as_set(truth["train"]) and as_set(made.test) == as_set(truth["test"])
    assert (mnist.tf, image_feature._ImageEncoder._encode_image) == before


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_prepare_only_what_needs_it(name, tmp_path):
    fails(lambda: data.prepare(name, str(tmp_path)), f"config.dataset={name!r}", "prepare one of cifar10, cifar100, fashion_mnist, mnist")


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import cifar

    archive = tar_gz({"batches.meta.txt": "\n".join(CIFAR_NAMES).encode(), BATCHES[0]: b"\x01" * 3072})  # a byte short
    put_manual(monkeypatch, cifar.Cifar10, tmp_path, {CIFAR_URL: archive})
    before = tree(tmp_path)
    fails(lambda: data.prepare("cifar10", str(tmp_path)), f"not prepared in {tmp_path} and preparing it failed (")
    assert tree(tmp_path) == before


def test_archive_with_a_wrong_checksum_is_refused(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(tar_gz({}))
    before = tree(tmp_path)
    fails(lambda: data.prepare("cifar10", str(tmp_path)), "preparing it failed", "wrong checksum")
    assert tree(tmp_path) == before


# No network


def use_proxy(monkeypatch, port):
    """Every download goes to this port of this machine, so that a real network changes nothing."""
    for key in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("answer", slow_but(["refused", "silent"], "refused"))
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_no_network(name, answer, tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answer == "silent":
            server.listen(8)  # connects, and never says a word
        use_proxy(monkeypatch, server.getsockname()[1])
        monkeypatch.setattr(tfds_preparation, "REACH_SECONDS", 0.5)
        start = time.monotonic()
        message = fails(lambda: data.load(Config(dataset=name, data_dir=str(tmp_path))), f'run "vffjax prepare {name}"', "TFDS_DATA_DIR")
        assert time.monotonic() - start < 5
    assert message.startswith(f"config.dataset='{name}': not prepared in {tmp_path} and the download failed (")
    assert ("no answer from" in message) == (answer == "silent")
    assert tree(tmp_path) == []


def test_a_resolver_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    import requests

    released = threading.Event()

    def hang(*args, **kwargs):
        released.wait(20)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "get", hang)
    monkeypatch.setattr(tfds_preparation, "REACH_SECONDS", 0.2)
    start = time.monotonic()
    try:
        fails(lambda: load(tmp_path), "the download failed (no answer from www.cs.toronto.edu within 0.2 s)")
        assert time.monotonic() - start < 5
    finally:
        released.set()


def test_prepare_without_network_leaves_no_new_folder(tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        use_proxy(monkeypatch, server.getsockname()[1])
        fails(lambda: data.prepare("mnist", str(tmp_path / "new" / "folder")), "config.dataset='mnist'", "the download failed")
    assert tree(tmp_path) == []
