"""Weight files: what is written is read to the bit, a run starts from it, and every unfit file is refused by name."""

import json
import math
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from command_lines import CONFIG, TINY_FLAGS
from image_sets import fails as refused
from oracles import CONV, config_of, slow_but, small_run
from runs import TINY, assert_same_bits, contents, copy_of, finished, tiny, train
from vffjax.errors import UserError
from vffjax.runs import experiment
from vffjax.runs.workdir import load_run
from vffjax.training.checks import make_config
from vffjax.training.plan import init_states
from vffjax.uses import evaluation
from vffjax.weights import weights

SHAPE = (8, 8, 2)
ABOUT = {"class_names": ["a", "b", "c"], "image_shape": list(SHAPE)}
KERNEL, BIAS = "group0.params.layers_0.kernel", "group1.params.head.bias"
MEAN, VARIANCE = (f"group0.batch_stats.layers_0.norm.{kind}" for kind in ("mean", "var"))


@pytest.fixture(scope="module")
def run():
    return small_run(config_of(**CONV), shape=SHAPE)


@pytest.fixture
def file(run, tmp_path):
    weights.write_weights(tmp_path / "w.safetensors", run.plan, run.states, ABOUT)
    return tmp_path / "w.safetensors"


def zeros(run):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), run.states)


def test_written_and_read_back_to_the_bit(run, file):
    # The values that floats can hide: the least number, the largest, and a zero with a sign.
    odd = np.array([[1e-45, -0.0, 3.4e38]], np.float32)
    states = list(run.states)
    kernel = np.array(states[1].params["head"]["kernel"])
    kernel[0] = odd
    states[1] = states[1]._replace(params=states[1].params | {"head": states[1].params["head"] | {"kernel": kernel}})
    weights.write_weights(file, run.plan, tuple(states), ABOUT)
    read, notes = weights.read_weights(file, run.plan, zeros(run))
    assert notes == []
    for got, given, fresh in zip(read, states, zeros(run), strict=True):
        assert_same_bits((got.params, got.batch_stats), (given.params, given.batch_stats))
        assert_same_bits(got.opt_state, fresh.opt_state)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((got.params, got.batch_stats)))


def test_kernels_as_float16_take_half_the_bytes_and_are_read_back_rounded(run, file, tmp_path):
    weights.write_weights(tmp_path / "half.safetensors", run.plan, run.states, ABOUT, half=True)
    full, half = (len(parts_of(path)[1]) for path in (file, tmp_path / "half.safetensors"))
    assert half < 0.75 * full  # small tensors stay
    read, notes = weights.read_weights(tmp_path / "half.safetensors", run.plan, zeros(run))
    assert notes == []
    rounded = [(jax.tree.map(lambda a: np.float32(np.float16(a)) if a.ndim > 1 else a, s.params), s.batch_stats) for s in run.states]
    assert_same_bits([(state.params, state.batch_stats) for state in read], rounded)
    kernel = np.array(run.states[0].params["layers_0"]["kernel"])
    kernel[0, 0, 0, 0] = 7e4
    layer = run.states[0].params["layers_0"] | {"kernel": kernel}
    large = (run.states[0]._replace(params=run.states[0].params | {"layers_0": layer}), *run.states[1:])
    with pytest.raises(UserError, match=f"--half: tensor {KERNEL} has numbers that float16 cannot hold; leave it out"):
        weights.write_weights(tmp_path / "large.safetensors", run.plan, large, ABOUT, half=True)
    assert not (tmp_path / "large.safetensors").exists()


def test_a_group_without_statistics_is_read_back(tmp_path):
    run = small_run(config_of(network="mlp", widths=(4, 3), norm="none"))
    weights.write_weights(tmp_path / "w.safetensors", run.plan, run.states, {})
    assert_same_bits(weights.read_weights(tmp_path / "w.safetensors", run.plan, run.states)[0], run.states)


def test_the_file_says_what_it_is_to_any_reader(run, file):
    with safetensors.safe_open(file, framework="np") as opened:
        names, about = set(opened.keys()), json.loads(opened.metadata()["vffjax"])
    assert {KERNEL, BIAS, MEAN, VARIANCE} <= names
    assert len(names) == len(jax.tree.leaves([state[:2] for state in run.states]))
    assert (about["format"], about["names"]) == ("vffjax weights 1", "vffjax")
    assert about["network"] == {
        "network": "conv4",
        "widths": [4, 4, 6, 6],
        "pools": [1, 2, 1, 2],
        "image_size": 0,
        "activation": "relu",
        "norm_scale": True,
        "initialisation": "he",
        "whitening": 0,
        "auxiliary": [],
        "norm": "batch",
        "grouping": "width",
    }
    assert (about["class_names"], about["image_shape"]) == (["a", "b", "c"], list(SHAPE))
    assert safetensors.numpy.load_file(file)[KERNEL].dtype == np.float32
    assert about["layout"] == {"images": "NHWC", "convolution": "HWIO", "dense": "IO", "flattened": "HWC"}
    assert (about["epsilon"], about["batch_statistics"]) == (1e-5, {"rows": ["clean images", "labelled copies"], "clean_row": 0})
    second = about["groups"][0]["layers"][1]
    assert second == {
        **{"layer": "ConvLayer", "width": 4, "norm": "batch", "sets": 1, "activation": "relu", "scaled": True},
        **{"pool": 2, "resize": 0, "pools_first": False},
    }
    assert [group["head"] for group in about["groups"]] == [{"grid": 4, "normalises": False, "auxiliary": []}] * 2


def saying(path, **values):
    """Changes what the file says of the network."""
    header, data = parts_of(path)
    about = json.loads(header["__metadata__"]["vffjax"])
    about["network"] |= values
    path.write_bytes(with_header(header | {"__metadata__": {"vffjax": json.dumps(about)}}, data))


NORMS = [
    ("class", {"norm": "none"}, "none"),
    ("none", {"norm": "input"}, "input"),
    ("class", {"rule": "ff"}, "input, which norm=auto means under rule ff"),
]


@pytest.mark.parametrize(("there", "keys", "here"), NORMS)
def test_weights_of_another_normalisation_are_refused_where_the_tensors_cannot_tell(there, keys, here, tmp_path):
    trained, started = (small_run(config_of(**CONV, **own), shape=SHAPE) for own in ({"norm": there}, keys))
    path = tmp_path / "w.safetensors"
    weights.write_weights(path, trained.plan, trained.states, {})
    says = f"{path}: was trained with norm={there}, and this run has norm={here}; set config.norm={there}, or give other weights"
    refused(lambda: weights.read_weights(path, started.plan, started.states), says)
    assert weights.read_weights(path, trained.plan, trained.states)[1] == []
    saying(path, norm="auto")  # as version 0.2.0 wrote it
    assert weights.read_weights(path, started.plan, started.states)[1] == []


def test_a_difference_that_changes_what_weights_mean_is_said(run, file):
    """That of the initialisation changes nothing."""
    other = small_run(config_of(**{**CONV, "pools": (1, 1, 2, 2)}, activation="gelu", initialisation="identity"), shape=SHAPE)
    assert weights.read_weights(file, other.plan, other.states)[1] == [
        "was trained with pools=[1, 2, 1, 2], and this run has [1, 1, 2, 2]",
        "was trained with activation=relu, and this run has gelu",
    ]


@pytest.mark.slow
def test_heads_for_the_same_number_of_other_classes_are_told_and_not_evaluated(tmp_path, capsys):
    states = load_run(finished()).states
    for names, sound in (([str(digit) for digit in range(10)], True), ([str(digit) for digit in reversed(range(10))], False)):
        path = tmp_path / f"{sound}.safetensors"
        weights.write_weights(path, load_run(finished()).plan, states, {"class_names": names})
        config = tiny(init_from=str(path), epochs=1)
        if sound:
            assert evaluation.evaluate_start(config)["test_error"] == evaluation.evaluate(finished())["test_error"]
        else:
            refused(
                lambda config=config: evaluation.evaluate_start(config),
                "config.init_from=",
                "the classes 9, 8, 7, 6, 5, ..., in this order",
            )
        capsys.readouterr()
        train(config, tmp_path / f"run {sound}")
        assert ("in this order" in capsys.readouterr().err) != sound


@pytest.mark.parametrize("said", [None, 3, "no JSON", "[]", '{"network": 3}', '{"network": {"norm": [1]}, "names": "vffjax"}', "[" * 10**5])
def test_a_file_that_says_nothing_sensible_of_itself_is_read_by_its_tensors(said, run, file):
    header, data = parts_of(file)
    header["__metadata__"] = {} if said is None else {"vffjax": said}
    file.write_bytes(with_header(header, data))
    read, notes = weights.read_weights(file, run.plan, zeros(run))
    assert notes == []
    assert_same_bits([state[:2] for state in read], [state[:2] for state in run.states])


def test_equal_weights_give_equal_bytes_and_an_old_file_is_replaced_whole(run, file, monkeypatch):
    before = file.read_bytes()
    for _ in range(5):
        weights.write_weights(file, run.plan, run.states, ABOUT)
        assert file.read_bytes() == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        weights.write_weights(file, run.plan, zeros(run), ABOUT)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# ----------------------------------------------------------------------------------------------------------------------------------
# What is refused


def with_header(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def parts_of(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edited(**changes):
    """The file with tensors changed: an array instead, None for none."""

    def edit(file):
        tensors = safetensors.numpy.load_file(file)
        for name, change in changes.items():
            name = {"kernel": KERNEL, "bias": BIAS, "mean": MEAN, "variance": VARIANCE}.get(name, name)
            if change is None:
                del tensors[name]
            else:
                tensors[name] = np.ascontiguousarray(change(tensors.get(name)))
        file.write_bytes(safetensors.numpy.save(tensors))

    return edit


def one(value):
    def change(array):
        array = array.copy()
        array.flat[array.size // 2] = value
        return array

    return change


def claiming(change):
    """The header of the file changed, its bytes not."""

    def edit(file):
        header, data = parts_of(file)
        file.write_bytes(with_header(change(header) or header, data))

    return edit


def content(replacement):
    return lambda file: file.write_bytes(replacement if isinstance(replacement, bytes) else replacement(file.read_bytes()))


HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
UNFIT = {
    "empty": (content(b""), ["not safetensors, or truncated (0 bytes"]),
    "short": (content(b"abc"), ["not safetensors"]),
    "text": (content(b"these are no weights at all"), ["not safetensors"]),
    "a pickle": (content(b"\x80\x04\x95\x10\0\0\0\0\0\0\0}."), ["not safetensors, but a Python pickle"]),
    "a web page": (content(b"<!DOCTYPE html><html></html>"), ["not safetensors, but a web page"]),
    "a header as long as the file": (content(lambda b: len(b).to_bytes(8, "little") + b[8:]), ["not safetensors"]),
    "a header of 2**63 bytes": (content(lambda b: (2**63).to_bytes(8, "little") + b[8:]), ["a header of 9223372036854775808"]),
    "truncated": (content(lambda b: b[:-1]), ["truncated or damaged", "bytes of tensors, not"]),
    "truncated in the header": (content(lambda b: b[:100]), ["truncated (100 bytes"]),
    "longer": (content(lambda b: b + b"\0"), ["truncated or damaged"]),
    "a header that is no JSON": (content(with_header(b"{")), ["a damaged header (JSONDecodeError"]),
    "a header that is a list": (content(with_header([1])), ["a damaged header"]),
    "a header that is not text": (content(with_header(b'{"\xff": 1}')), ["a damaged header (UnicodeDecodeError"]),
    "a header of brackets": (content(with_header(b"[" * 100_000)), ["a damaged header (RecursionError"]),
    "a tensor that is a number": (claiming(lambda h: h | {KERNEL: 3}), ["a damaged header"]),
    "a name twice": (content(with_header(b'{"a":{},"a":{}}')), ["a name stands twice"]),
    "sizes beyond the file": (claiming(lambda h: h | {KERNEL: HUGE}), ["truncated or damaged", "bytes of tensors"]),
    "more bytes than the file": (
        claiming(lambda h: h | {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        ["truncated or damaged", "bytes of tensors"],
    ),
    "negative sizes": (claiming(lambda h: h | {KERNEL: h[KERNEL] | {"shape": [-3, -3, 2, 4]}}), [KERNEL, "do not agree"]),
    "a fraction for a size": (claiming(lambda h: h | {KERNEL: h[KERNEL] | {"shape": [3, 3, 2, 4.0]}}), [KERNEL, "do not agree"]),
    "a size of a thousand digits": (content(with_header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}")), ["a damaged header"]),
    "bytes shared by two tensors": (
        claiming(lambda h: h | {"group0.params.layers_1.kernel": h["group0.params.layers_1.kernel"] | {"data_offsets": [0, 576]}}),
        ["w.safetensors: damaged: bytes 0 to 32 belong to no tensor or to two"],
    ),
    "metadata that is a number": (claiming(lambda h: h | {"__metadata__": 3}), ["w.safetensors: a damaged header ("]),
    "a missing tensor": (edited(bias=None), [f"tensor {BIAS} is missing, not F32[3]"]),
    "missing statistics": (edited(mean=None), [f"tensor {MEAN} is missing, not F32[2, 4]"]),
    "one tensor more": (edited(extra=lambda _: np.zeros(2, np.float32)), ["tensor extra is F32[2], not of this conv4 network"]),
    "a wrong shape": (edited(bias=lambda a: a[:2]), [f"tensor {BIAS} is F32[2], not F32[3]"]),
    "a transposed kernel": (edited(kernel=lambda a: a.transpose(0, 1, 3, 2)), [f"tensor {KERNEL} is F32[3, 3, 4, 2], not F32[3, 3, 2, 4]"]),
    "float64": (edited(kernel=lambda a: a.astype(np.float64)), [f"tensor {KERNEL} is F64[3, 3, 2, 4], not F32"]),
    "float16": (edited(mean=lambda a: a.astype(np.float16)), [f"tensor {MEAN} is F16[2, 4], not F32"]),
    "whole numbers": (edited(bias=lambda a: a.astype(np.int32)), [f"tensor {BIAS} is I32[3]"]),
    "NaN": (edited(kernel=one(np.nan)), [f"tensor {KERNEL} holds infinity, NaN"]),
    "infinity": (edited(bias=one(-np.inf)), [f"tensor {BIAS} holds infinity, NaN"]),
    "a negative variance": (edited(variance=one(-1e-3)), [f"tensor {VARIANCE} holds", "a negative variance"]),
}


@pytest.mark.parametrize(("hurt", "parts"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_file_is_refused_by_name(hurt, parts, run, file):
    weights.read_weights(file, run.plan, run.states)  # sound before
    hurt(file)
    refused(lambda: weights.read_weights(file, run.plan, run.states), f"{file}: ", *parts, "; ", "init_from=''")


def test_what_is_no_file_is_refused_at_once(run, tmp_path):
    def read(path, *parts):
        refused(lambda: weights.read_weights(path, run.plan, run.states), str(path), "vffjax export", *parts)

    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")  # to open it would wait for ever
    (tmp_path / "w.npz").touch()
    read(tmp_path / "none.safetensors", "No such file")
    read(tmp_path / "folder.safetensors", "not a file")
    read(tmp_path / "pipe.safetensors", "not a file")
    read(tmp_path / "w.npz", "NumPy arrays, not a .safetensors file, nor PyTorch's")
    read(tmp_path / "w.weights", "w.weights: not a .safetensors file, nor PyTorch's")
    read(f"{tmp_path}/{'x' * 300}.safetensors", "too long")


KINDS = {
    "model.safetensors.index.json": "the index of weights that lie in several files",
    "w.onnx": "an ONNX model",
    "w.h5": "a Keras model",
    "model.ckpt.data-00000-of-00001": "a part of a TensorFlow checkpoint",
    "w.msgpack": "Flax's own serialization",
    "W.NPZ": "NumPy arrays",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_file_that_cannot_be_weights_is_called_what_it_is(name, kind):
    refused(lambda: make_config({"init_from": name}), f"config.init_from={name!r}: {kind}, not a .safetensors file; give one")


def test_a_sparse_file_is_not_read_into_memory(run, file):
    # 8 GB on paper; the header is sound and says so.
    header, data = parts_of(file)
    size = 2**33
    file.write_bytes(
        with_header(header | {"zz": {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}}, data)
    )
    os.truncate(file, file.stat().st_size + size)
    refused(lambda: weights.read_weights(file, run.plan, run.states), "tensor zz is F32[2147483648], not of this conv4 network")


# ----------------------------------------------------------------------------------------------------------------------------------
# ResNets by torchvision's names; test_pretrained.py compares them with PyTorch


def resnet(network="resnet18", classes=3, shape=(16, 16, 3), **changes):
    """A narrow run; of 3 to 26 channels."""
    config = {"network": network, "width_factor": 0.05, "stem": "cifar", "head_grid": 1, "grouping": "all"} | changes
    return small_run(config_of(**config), classes=classes, shape=shape)


@pytest.fixture(scope="module")
def narrow():
    return resnet()


@pytest.fixture
def theirs(narrow, tmp_path):
    weights.write_weights(tmp_path / "w.safetensors", narrow.plan, narrow.states, ABOUT)
    return tmp_path / "w.safetensors"


def described(path):
    with safetensors.safe_open(path, framework="np") as opened:
        return set(opened.keys()), json.loads(opened.metadata()["vffjax"])


def test_a_resnet_is_written_by_torchvisions_names_unless_asked_otherwise(narrow, theirs, tmp_path):
    names, about = described(theirs)
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.0.weight", "layer4.1.bn2.bias", "fc.weight"} <= names
    assert len(names) == 20 * 5 + 2
    assert (about["format"], about["names"], about["class_names"]) == ("vffjax weights 1", "torchvision", ABOUT["class_names"])
    assert about["network"] == {
        "network": "resnet18",
        "width_factor": 0.05,
        "stem": "cifar",
        "image_size": 0,
        "norm": "batch",
        "grouping": "all",
    }
    own = tmp_path / "own.safetensors"
    assert weights.write_weights(own, narrow.plan, narrow.states, {}, names="vffjax") == []
    assert "group0.params.layers_0.conv1.kernel" in described(own)[0]
    read, notes = weights.read_weights(own, narrow.plan, zeros(narrow))
    assert notes == []
    assert_same_bits([state[:2] for state in read], [state[:2] for state in narrow.states])


def test_torchvisions_names_are_for_what_torchvision_has(run, tmp_path):
    def write(run):
        return weights.write_weights(tmp_path / "w.safetensors", run.plan, run.states, {}, names="torchvision")

    refused(lambda: write(run), "--names=torchvision: there is no conv4 in torchvision; use --names=vffjax")
    layer = resnet(norm="layer")
    refused(lambda: write(layer), "--names=torchvision: no norm=layer in torchvision; use --names=vffjax")
    assert not (tmp_path / "w.safetensors").exists()
    weights.write_weights(tmp_path / "w.safetensors", layer.plan, layer.states, {})
    assert_same_bits(weights.read_weights(tmp_path / "w.safetensors", layer.plan, layer.states)[0], layer.states)


def test_torchvisions_statistics_have_no_place_without_batch_normalisation(theirs):
    layer = resnet(norm="layer")
    refused(lambda: weights.read_weights(theirs, layer.plan, layer.states), "config.norm='layer'", str(theirs), "use norm=batch")


FIRST, STATISTIC = "conv1.weight", "layer1.0.bn1.running_var"
OTHER_NETWORKS = {
    "another stem": ({"stem": "imagenet"}, {}, ["conv1.weight is F32[3, 3, 3, 3], not [3, 3, 7, 7] of F32", "; set config.stem=cifar, or"]),
    "another width": ({"width_factor": 0.1}, {}, ["is F32[3, 3, 3, 3], not [6, 3, 3, 3]", " more; set config.width_factor=0.05, or"]),
    "another depth": ({"network": "resnet34"}, {}, ["layer1.2.bn1.bias is missing, not [3]", "; set config.network=resnet18, or"]),
    "bottlenecks": ({"network": "resnet50"}, {}, [" and ", " more; set config.network=resnet18, or"]),
    "grey images": (
        {},
        {"shape": (16, 16, 1)},
        ["is F32[3, 3, 3, 3], not [3, 1, 3, 3]", "; they are for images of 3 channels, and these have 1; give weights"],
    ),
    "several at once": ({"network": "resnet50", "stem": "imagenet"}, {}, ["set config.network=resnet18 and config.stem=cifar, or"]),
}


@pytest.mark.parametrize(
    ("changes", "data", "parts"),
    slow_but(OTHER_NETWORKS.values(), *(OTHER_NETWORKS[name] for name in ("another stem", "another width")), several=True),
    ids=OTHER_NETWORKS.keys(),
)
def test_weights_of_another_resnet_are_refused_with_the_keys_that_they_need(changes, data, parts, theirs):
    other = resnet(**changes, **data)
    message = refused(lambda: weights.read_weights(theirs, other.plan, other.states), f"{theirs}: ", *parts, "config.init_from=''")
    assert len(message) < 1_000


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.3, 0.07])
def test_with_the_width_that_the_message_names_the_weights_are_read(factor, tmp_path):
    written = resnet(width_factor=factor)
    weights.write_weights(tmp_path / "w.safetensors", written.plan, written.states, ABOUT)
    other = resnet(width_factor=0.1)
    message = refused(lambda: weights.read_weights(tmp_path / "w.safetensors", other.plan, other.states), "set config.width_factor=")
    named = float(message.partition("set config.width_factor=")[2].partition(",")[0])
    right = resnet(width_factor=named)
    assert weights.read_weights(tmp_path / "w.safetensors", right.plan, right.states)[0] is not None


def renamed(rename):
    def edit(file):
        tensors = {rename(name): array for name, array in safetensors.numpy.load_file(file).items()}
        file.write_bytes(safetensors.numpy.save(tensors))

    return edit


THEIR_UNFIT = {
    "a missing tensor": (edited(**{STATISTIC: None}), [f"w.safetensors: {STATISTIC} is missing, not [3]; give weights of this network"]),
    "a missing bias of fc": (edited(**{"fc.bias": None}), ["fc.bias is missing, not [3]"]),
    "a missing kernel of fc": (edited(**{"fc.weight": None}), ["fc.weight is missing, not [3, 26]"]),
    "one tensor more": (edited(extra=lambda _: np.zeros(2, np.float32)), ["extra is F32[2], not of this resnet18"]),
    "many more": (
        edited(**{f"extra{i}": lambda _: np.zeros(2, np.float32) for i in range(9)}),
        ["extra0 is", "extra4 is", " and 4 more; "],
    ),
    "a kernel as we have it": (
        edited(**{"layer2.0.conv1.weight": lambda a: a.transpose(2, 3, 1, 0)}),
        ["layer2.0.conv1.weight is F32[3, 3, 3, 6], not [6, 3, 3, 3] of F32"],
    ),
    "float64": (edited(**{FIRST: lambda a: a.astype(np.float64)}), ["conv1.weight is F64[3, 3, 3, 3], not [3, 3, 3, 3] of F32, F16, BF16"]),
    "whole numbers": (edited(**{FIRST: lambda a: a.astype(np.int32)}), ["conv1.weight is I32[3, 3, 3, 3]"]),
    "NaN": (edited(**{FIRST: one(np.nan)}), ["tensor conv1.weight holds infinity, NaN"]),
    "a negative variance": (edited(**{STATISTIC: one(-1e-6)}), [f"tensor {STATISTIC} holds", "a negative variance"]),
    "transformers' names": (
        renamed(lambda name: f"resnet.encoder.{name}"),
        ["not weights of a ResNet", "its tensors are resnet.encoder.bn1", "97 more"],
    ),
    "a name of control characters": (edited(**{"\x1b[2J\n": lambda _: np.zeros(2, np.float32)}), ["\\x1b[2J is F32[2], not of this"]),
    "truncated": (content(lambda b: b[:-1]), ["truncated or damaged", "bytes of tensors, not"]),
    "nothing": (content(with_header({})), ["not weights of a ResNet", "its tensors are none at all"]),
}


@pytest.mark.parametrize(("hurt", "parts"), THEIR_UNFIT.values(), ids=THEIR_UNFIT.keys())
def test_an_unfit_file_by_torchvisions_names_is_refused_by_name(hurt, parts, narrow, theirs):
    assert weights.read_weights(theirs, narrow.plan, narrow.states)[1] == []  # sound before
    hurt(theirs)
    message = refused(lambda: weights.read_weights(theirs, narrow.plan, narrow.states), f"{theirs}: ", *parts, "; ")
    assert len(message) < 1_000


def test_counts_of_batches_and_a_large_classifier_are_passed_by(narrow, theirs):
    edited(
        **{"bn1.num_batches_tracked": lambda _: np.array(3), "fc.weight": lambda _: np.zeros((1000, 26), np.float32)},
        **{"fc.bias": lambda _: np.zeros(1000, np.float32)},
    )(theirs)
    read, notes = weights.read_weights(theirs, narrow.plan, narrow.states)
    assert notes == ["fc is left out: 1000 classes, not 3; heads start anew"]
    assert_same_bits([state.params for state in read], [state.params for state in narrow.states])


def test_a_sparse_classifier_is_not_read_into_memory(narrow, theirs):
    # 8 GB on paper; it is left out.
    header, data = parts_of(theirs)
    moved, size = 0, 2**33
    kept = {name: entry for name, entry in header.items() if name != "fc.weight"}
    body = b""
    for name, entry in sorted(kept.items()):
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            kept[name] = entry | {"data_offsets": [moved, moved + end - start]}
            body, moved = body + data[start:end], moved + end - start
    kept["fc.weight"] = {"dtype": "F32", "shape": [size // 104, 26], "data_offsets": [moved, moved + size // 104 * 104]}
    theirs.write_bytes(with_header(kept, body))
    os.truncate(theirs, theirs.stat().st_size + size // 104 * 104)
    assert weights.read_weights(theirs, narrow.plan, narrow.states)[1] == ["fc is left out: 82595524 classes, not 3; heads start anew"]


# ----------------------------------------------------------------------------------------------------------------------------------
# Parameters that a rule owns in a group


def with_rule(states, *groups, seed=5):
    """The states, with parameters of a rule planted in these groups: a tree of dictionaries and a tuple."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    own = {i: {"projection": {"kernel": array(6, 5), "bias": array(5)}, "scales": (array(2), array(3))} for i in groups}
    return tuple(state._replace(params=state.params | ({"rule": own[i]} if i in own else {})) for i, state in enumerate(states))


def test_a_rules_parameters_are_written_and_read_back_to_the_bit(run, tmp_path):
    states, file = with_rule(run.states, 0, 1), tmp_path / "w.safetensors"
    assert weights.write_weights(file, run.plan, states, ABOUT) == []
    names = described(file)[0]
    assert {"group0.params.rule.projection.kernel", "group1.params.rule.scales.1"} <= names
    assert len(names) == len(jax.tree.leaves([state[:2] for state in states]))
    read, notes = weights.read_weights(file, run.plan, with_rule(run.states, 0, 1, seed=6))
    assert notes == []
    assert_same_bits([state[:2] for state in read], [state[:2] for state in states])


def test_one_group_is_written_with_its_rules_parameters(run, tmp_path):
    states, fresh, file = with_rule(run.states, 0, 1), with_rule(run.states, 0, 1, seed=6), tmp_path / "g.safetensors"
    weights.write_group(file, run.plan, 1, states[1], ABOUT)
    read, notes = weights.read_weights(file, run.plan, fresh)
    assert notes == ["holds group1 only; the other groups (group0) start from the seed"]
    assert_same_bits([state.params for state in read], [fresh[0].params, states[1].params])


def test_a_rules_parameters_that_a_file_lacks_start_anew(run, file):
    fresh = with_rule(run.states, 0, 1)
    read, notes = weights.read_weights(file, run.plan, fresh)
    assert notes == ["holds no parameters of the rule for group0, group1, which start from the seed"]
    assert_same_bits(read, fresh)
    # Where the file holds those of one group, they are taken.
    weights.write_weights(file, run.plan, with_rule(run.states, 1, seed=6), ABOUT)
    read, notes = weights.read_weights(file, run.plan, fresh)
    assert notes == ["holds no parameters of the rule for group0, which start from the seed"]
    assert_same_bits([read[0].params, read[1].params], [fresh[0].params, with_rule(run.states, 1, seed=6)[1].params])


def test_parameters_of_a_rule_that_has_none_here_are_left_out(run, file):
    weights.write_weights(file, run.plan, with_rule(run.states, 0), ABOUT)
    read, notes = weights.read_weights(file, run.plan, run.states)
    assert notes == ["parameters of another rule (group0) are left out"]
    assert_same_bits(read, run.states)


def test_a_rules_parameters_that_do_not_fit_are_refused(run, file):
    states = with_rule(run.states, 0)
    weights.write_weights(file, run.plan, states, ABOUT)
    name = "group0.params.rule.projection.bias"
    edited(**{name: lambda a: a[:2]})(file)
    refused(lambda: weights.read_weights(file, run.plan, states), f"tensor {name} is F32[2], not F32[5]")
    edited(**{name: None})(file)
    refused(lambda: weights.read_weights(file, run.plan, states), f"tensor {name} is missing")
    edited(**{"group7.params.rule.bias": lambda _: np.zeros(3, np.float32)})(file)
    refused(lambda: weights.read_weights(file, run.plan, run.states), "tensor group7.params.rule.bias is F32[3], not of this conv4")


def test_torchvisions_names_have_no_place_for_a_rules_parameters(narrow, theirs):
    states, before = with_rule(narrow.states, 0), theirs.read_bytes()
    notes = weights.write_weights(theirs, narrow.plan, states, ABOUT)
    assert notes[-1] == "the rule's own parameters have no name there; --names=vffjax keeps them"
    assert theirs.read_bytes() == before
    fresh = with_rule(narrow.states, 0, seed=6)
    read, notes = weights.read_weights(theirs, narrow.plan, fresh)
    assert notes == ["holds no parameters of the rule for group0, which start from the seed"]
    assert_same_bits([state.params for state in read], [state.params for state in fresh])


# ----------------------------------------------------------------------------------------------------------------------------------
# From and to a run


def export(call, path, *flags):
    return call("export", f"--workdir={finished()}", f"--out={path}", *flags)


@pytest.mark.slow
def test_one_group_is_exported_though_another_is_damaged(call, fails, tmp_path):
    run = copy_of(finished(), tmp_path)
    plan, states, _, about = load_run(run)
    for path in (run / "checkpoints" / str(about["epoch"]) / "group0").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    fails("export", f"--workdir={run}", parts=["group0", "damaged checkpoint"])
    status, out, err = call("export", f"--workdir={run}", "--group=1")
    assert (status, err, out) == (0, "", f"{run}/group1.safetensors: group1 of epoch {about['epoch']}\n")
    names, described_as = described(run / "group1.safetensors")
    assert {name.partition(".")[0] for name in names} == {"group1"}
    assert (described_as["group"], described_as["epoch"], described_as["class_names"]) == (1, about["epoch"], about["class_names"])
    # A run takes that group from it, and the other from its seed.
    fresh = init_states(plan, tuple(about["image_shape"]))
    read, notes = weights.read_weights(run / "group1.safetensors", plan, fresh)
    assert notes == ["holds group1 only; the other groups (group0) start from the seed"]
    assert_same_bits(read[0], fresh[0])
    assert_same_bits((read[1].params, read[1].batch_stats), (states[1].params, states[1].batch_stats))
    # And the damaged group itself is never written.
    fails("export", f"--workdir={run}", "--group=0", parts=["group0", "damaged checkpoint"])
    assert not (run / "group0.safetensors").exists()


@pytest.mark.slow
def test_a_run_starts_from_a_file_of_one_group_and_says_so(tmp_path, capsys):
    plan, states, _, about = load_run(finished())
    path = tmp_path / "g.safetensors"
    weights.write_group(path, plan, 0, states[0], {})
    weights.check_start(tiny(init_from=str(path)))
    train(tiny(init_from=str(path), epochs=1, learning_rate=0.0), tmp_path / "run")
    assert f"{path}: holds group0 only; the other groups (group1) start from the seed\n" in capsys.readouterr().err
    kept = load_run(tmp_path / "run")[1]
    assert_same_bits(kept[0].params, states[0].params)
    assert_same_bits(kept[1].params, init_states(plan, tuple(about["image_shape"]))[1].params)


def test_a_group_that_is_there_in_part_is_refused(run, file, tmp_path):
    kept = {name: array for name, array in safetensors.numpy.load_file(file).items() if name.startswith("group1.")}
    path = tmp_path / "g.safetensors"
    path.write_bytes(safetensors.numpy.save(kept))
    assert weights.read_weights(path, run.plan, run.states)[1] == ["holds group1 only; the other groups (group0) start from the seed"]
    path.write_bytes(safetensors.numpy.save({name: array for name, array in kept.items() if name != BIAS}))
    refused(lambda: weights.read_weights(path, run.plan, run.states), f"tensor {BIAS} is missing")
    path.write_bytes(safetensors.numpy.save(kept | {"group7.params.head.bias": np.zeros(3, np.float32)}))
    refused(lambda: weights.read_weights(path, run.plan, run.states), "tensor group7.params.head.bias is F32[3], not of this conv4")


def test_statistics_that_are_to_stay_must_be_there(run, file, tmp_path):
    kept = {name: array for name, array in safetensors.numpy.load_file(file).items() if name.startswith("group1.")}
    path = tmp_path / "g.safetensors"
    path.write_bytes(safetensors.numpy.save(kept))
    frozen = small_run(config_of(**CONV, norm_statistics="frozen", init_from=str(path)), shape=SHAPE)
    assert weights.read_weights(file, frozen.plan, frozen.states)[1] == []
    refused(
        lambda: weights.read_weights(path, frozen.plan, frozen.states),
        "config.norm_statistics='frozen': ",
        f"{path} holds no statistics of group0; use batch, or give weights of every group",
    )


@pytest.mark.parametrize("other", ["--group=0", "--format=stablehlo"])
def test_half_is_for_files_of_all_groups(other, fails):
    fails("export", f"--workdir={finished()}", "--half", other, parts=["--half: only a safetensors file of all groups", "leave it out"])


def test_a_group_that_is_not_there_is_refused(fails, tmp_path):
    where = f"--workdir={finished()}"
    out = f"--out={tmp_path}/w.safetensors"
    fails("export", where, out, "--group=2", parts=["--group=2: the network has 2 groups; give one from 0 to 1"])
    fails("export", where, out, "--group=-1", parts=["--group", "'-1'", "give at least 0"])
    fails("export", where, out, "--group=first", parts=["--group", "'first'", "give at least 0"])
    fails("export", where, out, "--group=1", "--names=torchvision", parts=["--group=1: torchvision knows no groups"])
    fails("export", where, "--group=1", "--format=stablehlo", parts=["--group=1: a .stablehlo file holds the ensemble"])
    assert list(tmp_path.iterdir()) == []


def test_a_group_of_a_foreign_run_is_refused(fails, tmp_path):
    run = copy_of(finished(), tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"learning_rate": 0.5}))
    fails("export", f"--workdir={run}", "--group=1", parts=[str(run), "foreign checkpoint, saved by another run (config.learning_rate"])


def test_a_run_is_exported_and_another_starts_from_it(call, tmp_path):
    before = contents(finished())
    path = tmp_path / "w.safetensors"
    assert export(call, path)[0] == 0
    plan, states, task, run = load_run(finished())
    fresh = init_states(plan, tuple(run["image_shape"]))
    read, _ = weights.read_weights(path, plan, fresh)
    assert_same_bits([s[:2] for s in read], [s[:2] for s in states])
    with safetensors.safe_open(path, framework="np") as opened:
        about = json.loads(opened.metadata()["vffjax"])
    assert (about["epoch"], about["class_names"]) == (run["epoch"], run["class_names"])
    np.testing.assert_allclose(about["pixel_mean"], task.mean)
    assert (about["voting"], about["scored_by"], about["views"]) == (run["voting"], "heads", "one")
    assert about["vote_weights"] == [1 / len(run["voting"])] * len(run["voting"])
    status, out, _ = export(call, tmp_path / "last.safetensors", "--epoch=latest")
    assert (status, out) == (0, f"{tmp_path}/last.safetensors: 2 groups of epoch 3\n")
    assert export(call, tmp_path / "half.safetensors", "--half")[0] == 0
    assert (tmp_path / "half.safetensors").stat().st_size < path.stat().st_size
    assert contents(finished()) == before
    # As they are, without a run, they are worth what they are worth there.
    given = [f"--config.{key}={value}" for key, value in (TINY | {"init_from": path}).items()]
    status, out, err = call("evaluate", CONFIG, *given, "--json")
    assert status == 0, err
    there = json.loads(call("evaluate", f"--workdir={finished()}", "--json")[1])
    here = json.loads(out)
    assert here.pop("init_from") == str(path)
    assert {key: here[key] for key in there.keys() & here.keys() - {"epoch"}} == {
        key: value for key, value in there.items() if key not in ("epoch", "workdir", "own_data")
    }
    # A rate of 0 leaves the parameters as they came.
    still = tiny(init_from=str(path), epochs=1, learning_rate=0.0)
    train(still, tmp_path / "run")
    kept = load_run(tmp_path / "run")[1]
    assert_same_bits([s.params for s in kept], [s.params for s in states])
    # A run that goes on needs its start no more.
    path.unlink()
    changes = {"epochs": 1, "learning_rate": 0.0, "checkpoint_every": 1, "init_from": path}
    given = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    status, out, err = call("train", CONFIG, *given, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    assert out.startswith("test error")


@pytest.mark.slow
def test_an_unfit_start_is_refused_before_there_is_a_workdir(call, fails, tmp_path, monkeypatch):
    path, workdir = tmp_path / "w.safetensors", tmp_path / "run"
    assert export(call, path)[0] == 0
    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("began"))
    flags = [*TINY_FLAGS, f"--workdir={workdir}"]
    others = [flag for flag in flags if "widths" not in flag]
    fails("train", *others, f"--config.init_from={path}", "--config.widths=(16,11)", parts=[str(path), "group1.", "not F32[2, 11]"])
    edited(**{"group1.params.head.bias": one(math.nan)})(path)
    fails("train", *flags, f"--config.init_from={path}", parts=[str(path), BIAS, "NaN"])
    fails("train", *flags, f"--config.init_from={tmp_path}/no.safetensors", parts=["no.safetensors", "No such file"])
    fails("train", *flags, "--config.init_from=w.npz", parts=["config.init_from='w.npz'", "not a .safetensors file"])
    fails("train", *flags, "--config.init_from=w.pt", parts=["w.pt: PyTorch's files are read for resnet18", "by vffjax export"])
    assert not workdir.exists()
