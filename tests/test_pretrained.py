"""ResNets with PyTorch's weights compute what PyTorch computes, and go back to PyTorch: against transformers' and one written here."""

import argparse
import collections
import functools
import math
import os
import pickle
import random
import re
import sys
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from faults import mutations
from image_sets import fails as refused
from oracles import CONV, config_of, quick_jit
from runs import assert_same_bits, scratch
from vffjax.config import Config
from vffjax.errors import UserError
from vffjax.networks.resnet import stem_width
from vffjax.registry import NETWORKS
from vffjax.training.checks import make_config
from vffjax.training.plan import init_states, make_plan
from vffjax.weights import weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[bench]'")
from torch import nn  # noqa: E402

CLASSES = 7
# Sums over up to 4,608 inputs in another order, and 2x2 tiles, through up to 50 layers; relative to the largest entry of a map.
TOLERANCE = 1e-4


def conv_norm(inputs, outputs, side, stride):
    return nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False), nn.BatchNorm2d(outputs)


class Block(nn.Module):
    """torchvision's BasicBlock and Bottleneck."""

    def __init__(self, inputs, width, inner, stride, bottleneck):
        super().__init__()
        sizes = [(inner, 3, stride), (width, 3, 1)]
        if bottleneck:
            sizes = [(inner, 1, 1), (inner, 3, stride), (width, 1, 1)]
        before = inputs
        for i, (outputs, side, by) in enumerate(sizes, 1):
            conv, norm = conv_norm(before, outputs, side, by)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
            before = outputs
        self.steps = len(sizes)
        self.downsample = nn.Sequential(*conv_norm(inputs, width, 1, stride)) if stride > 1 or inputs != width else None

    def forward(self, x):
        out = x
        for i in range(1, self.steps + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = out.relu() if i < self.steps else out
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """torchvision's, by its names; `cifar`: with a 3x3 stem and no pooling."""

    def __init__(self, network, factor=1.0, stem="imagenet", classes=CLASSES):
        super().__init__()
        width = stem_width(Config(width_factor=factor))
        self.conv1, self.bn1 = conv_norm(3, width, *((7, 2) if stem == "imagenet" else (3, 1)))
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        stages = collections.defaultdict(list)
        for block in blocks_of(network, factor):
            stages[block.name.partition(".")[0]].append(Block(width, block.width, block.inner, block.stride, block.bottleneck))
            width = block.width
        for name, blocks in stages.items():
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(width, classes)

    def maps(self, x):
        """After each of the four stages."""
        found = [self.maxpool(self.bn1(self.conv1(x)).relu())]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            found.append(stage(found[-1]))
        return found[1:]

    def forward(self, x):
        return self.fc(self.maps(x)[-1].mean((2, 3)))


@functools.cache
def peer(network, factor=1.0, stem="imagenet"):
    """Random weights; no scale, bias or statistic of a normalisation at its initial value."""
    torch.manual_seed(0)
    model = ResNet(network, factor, stem)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def saved(model, path):
    """The model's weights in a file, PyTorch's or safetensors."""
    state = model.state_dict()
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.numpy.save({name: value.numpy() for name, value in state.items()}))
    else:
        torch.save(state, path)
    return path


@functools.cache
def plan_of(network, factor=1.0, stem="imagenet", classes=CLASSES, **changes):
    config = {"network": network, "width_factor": factor, "stem": stem, "head_grid": 1} | changes
    return make_plan(config_of(**config), 12, classes)


_SHAPES = {}


def shapes_of(plan):
    """Of the states; where heads see a grid, for images of 64x64."""
    key = repr(plan.config), plan.groups[-1].head.classes
    if key not in _SHAPES:
        _SHAPES[key] = jax.eval_shape(lambda: init_states(plan, (64, 64, 3)))
    return _SHAPES[key]


def start(path, plan):
    """States from a file, what it leaves out at zero; and the notes."""
    states, notes = weights.read_weights(path, plan, shapes_of(plan))
    return jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.zeros(a.shape, a.dtype), states), notes


def our_maps(plan, states, x, clean):
    """Every group's feature map of images in PyTorch's layout, in that layout; and the last head's class scores."""
    z, found = jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), []
    for group, state in zip(plan.groups, states, strict=True):
        z = quick_jit(lambda p, s, z, group=group: group.features(p, s, z, clean, False)[0])(state.params, state.batch_stats, z)
        found.append(np.asarray(z).transpose(0, 3, 1, 2))
    return found, np.asarray(plan.groups[-1].logits(states[-1].params, z))


def assert_near(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def images(side):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


RESNET = ("resnet18", "resnet34", "resnet50")


def blocks_of(network, factor):
    return NETWORKS.find(network).blocks(Config(width_factor=factor))


networks = pytest.mark.parametrize("network", RESNET)


@networks
@pytest.mark.parametrize("side", [64, 65])
def test_maps_of_every_stage_and_logits_are_pytorchs(network, side, tmp_path):
    # Odd sides tell how the edges are padded.
    model, x, plan = peer(network, 0.25), images(side), plan_of(network, 0.25)
    states, notes = start(saved(model, tmp_path / "w.safetensors"), plan)
    assert notes == []
    with torch.no_grad():
        expected, logits = model.maps(x), model(x)
    found, scores = our_maps(plan, states, x, clean=2)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)
    assert_near(scores, logits)


def hugging_name(name):
    """transformers' name of torchvision's tensor."""
    if name.startswith("fc."):
        return f"classifier.1.{name[3:]}"
    kinds = {"conv": "convolution", "bn": "normalization"}
    if not name.startswith("layer"):
        kind, rest = re.fullmatch(r"(conv|bn)1\.(\w+)", name).groups()
        return f"resnet.embedder.embedder.{kinds[kind]}.{rest}"
    stage, block, place, rest = re.fullmatch(r"layer(\d)\.(\d)\.(.+)\.(\w+)", name).groups()
    if place.startswith("downsample"):
        place = "shortcut." + ("convolution" if place.endswith("0") else "normalization")
    else:
        kind, i = re.fullmatch(r"(conv|bn)(\d)", place).groups()
        place = f"layer.{int(i) - 1}.{kinds[kind]}"
    return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.{place}.{rest}"


def hugging_peer(network, factor=1.0):
    """transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[parity]'")
    blocks = blocks_of(network, factor)
    config = transformers.ResNetConfig(
        embedding_size=stem_width(Config(width_factor=factor)),
        hidden_sizes=sorted({block.width for block in blocks}),
        depths=[sum(b.name.startswith(f"layer{stage}.") for b in blocks) for stage in (1, 2, 3, 4)],
        layer_type="bottleneck" if blocks[0].bottleneck else "basic",
        downsample_in_bottleneck=False,  # the 3x3 convolution has the stride
        num_labels=CLASSES,
    )
    model = transformers.ResNetForImageClassification(config)
    model.load_state_dict({hugging_name(name): value for name, value in peer(network, factor).state_dict().items()})
    return model.eval()


@pytest.mark.slow
@networks
def test_maps_and_logits_at_full_width_are_those_of_transformers(network, tmp_path):
    model, x, plan = hugging_peer(network), images(65), plan_of(network)
    states, _ = start(saved(peer(network), tmp_path / "w.pth"), plan)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
    found, scores = our_maps(plan, states, x, clean=2)
    for ours, theirs in zip(found, expected.hidden_states[1:], strict=True):
        assert_near(ours, theirs)
    assert_near(scores, expected.logits)


# ----------------------------------------------------------------------------------------------------------------------------------
# What is taken from a file, and what goes back

NARROW = 0.05  # of the width: 3, 6, 13 and 26 channels


def tensors_of(path):
    return safetensors.numpy.load_file(path)


def model_bits(model):
    return {name: value.numpy() for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


@networks
@pytest.mark.parametrize(("stem", "grouping"), [("imagenet", "width"), ("cifar", "block"), ("cifar", "layer"), ("imagenet", "all")])
def test_what_came_from_pytorch_goes_back_to_the_bit(network, stem, grouping, tmp_path):
    model, plan = peer(network, NARROW, stem), plan_of(network, NARROW, stem, grouping=grouping)
    states, notes = start(saved(model, tmp_path / "w.pth"), plan)
    assert notes == []
    notes = weights.write_weights(tmp_path / "back.safetensors", plan, states, {})
    assert [note.partition(" have no name")[0] for note in notes] == (
        ["the labelled copies' statistics"]
        if grouping == "all"
        else [f"the head(s) of the first {len(plan.groups) - 1} group(s) and the labelled copies' statistics"]
    )
    assert_same_bits(tensors_of(tmp_path / "back.safetensors"), dict(sorted(model_bits(model).items())))
    # And PyTorch takes it whole.
    other = ResNet(network, NARROW, stem)
    other.load_state_dict({name: torch.from_numpy(a) for name, a in tensors_of(tmp_path / "back.safetensors").items()}, strict=True)
    assert_same_bits(model_bits(other), model_bits(model))


def test_a_small_stem_and_anchored_statistics(tmp_path):
    model, x = peer("resnet18", NARROW, "cifar"), images(17)
    for norm in ("batch", "anchor"):
        plan = plan_of("resnet18", NARROW, "cifar", norm=norm)
        states, _ = start(saved(model, tmp_path / "w.safetensors"), plan)
        assert states[0].batch_stats["layers_0"]["bn1"]["mean"].shape[0] == (2 if norm == "batch" else 1)
        with torch.no_grad():
            assert_near(
                our_maps(plan, states, x, clean=1)[1], model(x)
            )  # a labelled copy as a clean image, until training moves them apart


def test_the_clean_streams_statistics_are_those_that_go(tmp_path):
    plan = plan_of("resnet18", NARROW)
    states, _ = start(saved(peer("resnet18", NARROW), tmp_path / "w.pth"), plan)
    moved = [state._replace(batch_stats=jax.tree.map(lambda a: a.at[1].add(1.0), state.batch_stats)) for state in states]
    for i, each in enumerate((states, moved)):
        weights.write_weights(tmp_path / f"{i}.safetensors", plan, tuple(each), {})
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_half_precision_is_converted_exactly(dtype, suffix, tmp_path):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in peer("resnet18", NARROW).state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors_torch = pytest.importorskip("safetensors.torch")
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path)
    plan = plan_of("resnet18", NARROW)
    weights.write_weights(tmp_path / "back.safetensors", plan, start(path, plan)[0], {})
    expected = {name: value.float().numpy() for name, value in sorted(state.items()) if value.is_floating_point()}
    assert_same_bits(tensors_of(tmp_path / "back.safetensors"), expected)


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1, "state": {}}},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "parameters": lambda state: {name: nn.Parameter(value, False) for name, value in state.items()},
}


def prefixed(*prefixes):
    return lambda state: {"".join(prefixes) + name: value for name, value in state.items()}


# What trainers save, and what PyTorch's wrappers put before each name, in any order.
WRAPPED |= {key: lambda state, key=key: {"epoch": 3, key: state, "loss": 0.5} for key in ("model_state_dict", "net")}
WRAPPED |= {
    "a reference script's": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, data="x"), "epoch": 3},
    "averaged": lambda state: prefixed("module.")(state) | {"n_averaged": torch.tensor(7)},
    "averaged, and compiled": lambda state: prefixed("_orig_mod.")(prefixed("module.")(state) | {"n_averaged": torch.tensor(7)}),
    "nested": lambda state: {"model": {"state_dict": prefixed("module.")(state), "step": 3}},
    "lightning": lambda state: {
        "epoch": 3,
        "global_step": 10**9,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.", "_orig_mod.")(state),
        "loops": {"fit_loop": {"state_dict": {}, "progress": [1, 2.5, None, True]}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.3), "kth": {"a.ckpt": torch.tensor(1)}}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(50)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1, "name": "x", "betas": (0.9, 0.99)},
    },
}
PREFIXED = [
    ("model.",),
    ("_orig_mod.",),
    ("net.",),
    ("module.", "_orig_mod."),
    ("_orig_mod.", "module."),
    ("model.", "module.", "_orig_mod."),
]
WRAPPED |= {"".join(prefixes): prefixed(*prefixes) for prefixes in PREFIXED}


@functools.cache
def plain_start():
    path = scratch() / "plain.pth"
    return start(saved(peer("resnet18", NARROW), path), plan_of("resnet18", NARROW))[0]


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_checkpoint_of_pytorch_is_taken_as_it_is_usually_saved(wrap, tmp_path):
    wrapped, plan = wrap(peer("resnet18", NARROW).state_dict()), plan_of("resnet18", NARROW)
    for name, options in {"w.pth": {}, "w.pth.tar": {"_use_new_zipfile_serialization": False}}.items():
        torch.save(wrapped, tmp_path / name, **options)
        assert_same_bits(start(tmp_path / name, plan)[0], plain_start())


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth.tar"])
def test_pytorchs_files_have_many_names(suffix, tmp_path):
    path = saved(peer("resnet18", NARROW), tmp_path / f"w{suffix}")
    assert_same_bits(start(path, plan_of("resnet18", NARROW))[0], plain_start())
    assert make_config({"init_from": str(path), "network": "resnet18"}).init_from == str(path)


@pytest.mark.parametrize("prefixes", [("module.",), *PREFIXED], ids="".join)
def test_safetensors_are_unwrapped_as_pytorchs_files_are(prefixes, tmp_path):
    tensors = {name: value.numpy() for name, value in prefixed(*prefixes)(peer("resnet18", NARROW).state_dict()).items()}
    (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save(tensors))
    assert_same_bits(start(tmp_path / "w.safetensors", plan_of("resnet18", NARROW))[0], plain_start())


def test_a_prefix_that_not_all_names_share_stays(narrow_plan, tmp_path):
    state = peer("resnet18", NARROW).state_dict()
    tensors = {f"model.{name}": value.numpy() for name, value in state.items()} | {"metric.count": np.zeros(1, np.float32)}
    (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save(tensors))
    refused(lambda: start(tmp_path / "w.safetensors", narrow_plan), "not weights of a ResNet", "metric.count")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_transformers_names_are_torchvisions(suffix, prefix, tmp_path):
    state = {prefix + hugging_name(name): value for name, value in peer("resnet18", NARROW).state_dict().items()}
    if suffix == ".bin":
        torch.save(state, tmp_path / "w.bin")
    else:
        (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save({name: value.numpy() for name, value in state.items()}))
    states, notes = start(tmp_path / f"w{suffix}", plan_of("resnet18", NARROW))
    assert notes == []
    assert_same_bits(states, plain_start())


def test_transformers_model_without_a_classifier_is_taken_and_a_tensor_that_is_there_twice_is_not(narrow_plan, tmp_path):
    state = {hugging_name(name): value.numpy() for name, value in peer("resnet18", NARROW).state_dict().items()}
    base = {name.removeprefix("resnet."): value for name, value in state.items() if not name.startswith("classifier")}
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save(base))
    assert start(path, narrow_plan)[1] == ["fc is not there; heads start anew"]
    path.write_bytes(safetensors.numpy.save(state | {"conv1.weight": state["resnet.embedder.embedder.convolution.weight"]}))
    refused(lambda: start(path, narrow_plan), f"{path}: two tensors for conv1.weight")


@networks
def test_a_file_that_transformers_has_saved_computes_what_it_computes(network, tmp_path):
    model, x, plan = hugging_peer(network, 0.25), images(64), plan_of(network, 0.25)
    model.save_pretrained(tmp_path)  # model.safetensors, as on the Hub
    states, notes = start(tmp_path / "model.safetensors", plan)
    assert notes == []
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
    found, scores = our_maps(plan, states, x, clean=2)
    for ours, theirs in zip(found, expected.hidden_states[1:], strict=True):
        assert_near(ours, theirs)
    assert_near(scores, expected.logits)


@pytest.mark.parametrize(
    ("changes", "classes", "says"),
    [
        ({}, 10, "fc is left out: 7 classes, not 10; heads start anew"),
        (
            {"head_grid": 2},
            CLASSES,
            "fc is left out: the last head has 104 inputs, not the 26 of a mean over all positions (config.head_grid=1)",
        ),
    ],
)
def test_a_classifier_that_does_not_fit_is_left_out_and_said(changes, classes, says, tmp_path):
    path = saved(peer("resnet18", NARROW), tmp_path / "w.safetensors")
    plan = plan_of("resnet18", NARROW, classes=classes, **changes)
    states, notes = start(path, plan)
    assert len(notes) == 1
    assert notes[0].startswith(says)
    assert not np.any(states[-1].params["head"]["kernel"])
    back = weights.write_weights(tmp_path / "back.safetensors", plan, states, {})
    assert any(note.startswith("fc is left out") for note in back) == ("head_grid" in changes)
    missing = ResNet("resnet18", NARROW).load_state_dict(
        {name: torch.from_numpy(a) for name, a in tensors_of(tmp_path / "back.safetensors").items() if not name.startswith("fc")},
        strict=False,
    )
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []


def test_a_file_without_a_classifier_is_taken(tmp_path):
    state = {name: value for name, value in peer("resnet18", NARROW).state_dict().items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    assert start(tmp_path / "w.pth", plan_of("resnet18", NARROW))[1] == ["fc is not there; heads start anew"]


# ----------------------------------------------------------------------------------------------------------------------------------
# What is refused of PyTorch's files; test_weights.py has what is refused of any


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def deflated(state, path):
    """The same in an archive that is compressed: a kilobyte may hold a gigabyte."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def changed(**changes):
    return lambda state, path: torch.save(state | changes, path)


def another(make):
    return lambda state, path: torch.save(make(state), path)


class Reduced:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def script(_, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that it is deprecated
        torch.jit.save(torch.jit.script(nn.ReLU()), path)


def content(*parts):
    return lambda _, path: path.write_bytes(b"".join(parts))


def arrays(_, path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def keras(_, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"x")


REFUSED = {
    "code": (changed(x=Evil()), ["not tensors alone: it asks for __builtin__.print"]),
    "memory by a number": (changed(x=Reduced(bytearray, (2**40,))), ["it asks for __builtin__.bytearray"]),
    "a tensor by a number": (changed(x=Reduced(torch.FloatTensor, (2**40,))), ["it asks for torch.FloatTensor"]),
    "a storage by a number": (changed(x=Reduced(torch.UntypedStorage, (2**40,))), ["it asks for torch.storage.UntypedStorage"]),
    "a model": (
        another(lambda _: nn.Linear(2, 2)),
        ["a whole pickled module, not its state dict: it asks for torch.nn.modules.linear.Linear"],
    ),
    "a model in a checkpoint": (another(lambda _: {"model": nn.Linear(2, 2)}), ["a whole pickled module", "modules.linear.Linear"]),
    "a program": (script, ["a TorchScript archive, which holds a program"]),
    "an optimizer": (
        another(lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.9).state_dict()),
        ["the state of an optimizer"],
    ),
    "a checkpoint without weights": (
        another(lambda _: {"epoch": 3, "optimizer_states": []}),
        ["a checkpoint without a state dict under state_dict, ", "its keys are epoch, optimizer_states"],
    ),
    "a list": (another(lambda state: list(state.values())), ["a list, which is no state dict"]),
    "a number among them": (changed(x=3), ["x is no plain tensor with a name (int)"]),
    "a sparse tensor": (changed(x=torch.eye(3).to_sparse()), ["it asks for torch._utils._rebuild_sparse_tensor"]),
    "bytes, which a chain of codecs could make grow": (changed(x=b"raw"), ["it asks for _codecs.encode"]),
    "a tensor without content": (changed(x=torch.empty(3, device="meta")), ["it asks for torch._utils._rebuild_meta_tensor"]),
    "a number for a name": (another(lambda state: {3: torch.ones(2)}), ["3 is no plain tensor with a name"]),
    "a compressed archive": (deflated, ["compressed"]),
    "no archive": (lambda _, path: path.write_bytes(b"PK\x03\x04" + bytes(100)), ["BadZipFile"]),
    "text": (lambda _, path: path.write_text("weights"), ["of an unknown kind, not a file of torch.save"]),
    "nothing": (lambda _, path: path.touch(), ["of an unknown kind, not a file of torch.save"]),
    "NumPy's": (arrays, ["NumPy arrays (.npz), not a file of torch.save"]),
    "Keras's": (keras, ["a Keras model, not a file of torch.save"]),
    "Keras's older": (content(b"\x89HDF\r\n\x1a\n", bytes(100)), ["HDF5, such as a Keras model"]),
    "ONNX": (content(b"\x08\x07\x12\x07pytorch\x1a\x052.1.0"), ["such as an ONNX model"]),
    "a pickle": (content(pickle.dumps({"a": 1}, 4)), ["a Python pickle, not a file of torch.save"]),
    "a tar archive": (content(bytes(257), b"ustar", bytes(250)), ["a tar archive"]),
    "a web page": (content(b"\n<!DOCTYPE html><html>"), ["a web page, perhaps of a download that failed"]),
    "a pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid"), ["a pointer of Git LFS"]),
    "safetensors": (content((2).to_bytes(8, "little"), b"{}"), ["safetensors, not a file of torch.save"]),
    "nothing of any network": (another(lambda _: {}), ["not weights of a ResNet", "none at all"]),
    "a tensor of 4 TB that takes 4 bytes": (
        changed(**{"bn1.bias": torch.zeros(1).expand(2**40)}),
        ["bn1.bias is F32[1099511627776], not [3] of F32"],
    ),
    "double precision": (changed(**{"bn1.bias": torch.zeros(3, dtype=torch.float64)}), ["bn1.bias is F64[3], not [3] of F32, F16, BF16"]),
    "NaN": (changed(**{"bn1.bias": torch.full((3,), math.nan)}), ["bn1.bias holds infinity, NaN"]),
}


@pytest.fixture(scope="module")
def narrow_plan():
    return plan_of("resnet18", NARROW)


@pytest.mark.parametrize(("save", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_of_more_or_less_than_tensors_is_refused_by_name(save, parts, narrow_plan, tmp_path, capsys):
    path = tmp_path / "w.pth"
    save(dict(peer("resnet18", NARROW).state_dict()), path)
    refused(lambda: start(path, narrow_plan), f"{path}: ", "; ", *parts)
    assert capsys.readouterr().out == ""  # what Evil would print


def test_an_archive_that_claims_more_than_it_holds_is_refused(narrow_plan, tmp_path):
    path = tmp_path / "w.pth"
    saved(peer("resnet18", NARROW), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    count = peer("resnet18", NARROW).conv1.weight.numel()  # 441, as a pickled number
    (name,) = (name for name in parts if name.endswith("/data.pkl"))
    assert parts[name].count(b"M" + count.to_bytes(2, "little")) >= 1
    parts[name] = parts[name].replace(b"M" + count.to_bytes(2, "little"), b"M" + (count + 9000).to_bytes(2, "little"))
    with zipfile.ZipFile(path, "w") as archive:  # whose checksums are right
        for name, content in parts.items():
            archive.writestr(name, content)
    message = refused(lambda: start(path, narrow_plan), f"{path}: ", "not tensors alone, or damaged")
    assert "record size" in message or "other sizes" in message  # PyTorch's words, or ours


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


LEGACY_COUNT = b"K\x03Nt"  # of 3 entries; then no view, and the tuple


def stating(replacement):
    """A file of the format before PyTorch 1.6 with another statement of its storages of three entries."""

    def save(state, path):
        legacy(state, path)
        assert path.read_bytes().count(LEGACY_COUNT) > 3
        path.write_bytes(path.read_bytes().replace(LEGACY_COUNT, replacement))

    return save


LEGACY_REFUSED = {
    "8 GB": (stating(b"J\xff\xff\xff\x7fNt"), ["tensors of ", ", where the file holds "]),
    "many entries by a long number": (stating(b"\x8a\x06\0\0\0\0\0\x10Nt"), ["tensors of ", ", where the file holds "]),
    "fewer than none": (stating(b"J\xff\xff\xff\xffNt"), ["a storage that is not stated as torch.save does"]),
    "two numbers": (stating(b"J\xff\xff\xff\x7fK\x03t"), ["a storage that is not stated as torch.save does"]),
    "one that hides another": (stating(b"J\xff\xff\xff\x7fNK\x030t"), ["a storage that is not stated as torch.save does"]),
    "no number": (stating(b"NNt"), ["a storage that is not stated as torch.save does"]),
    "code": (lambda state, path: legacy(state | {"x": Evil()}, path), ["not tensors alone: it asks for __builtin__.print"]),
    "memory by a number": (lambda state, path: legacy(state | {"x": Reduced(bytearray, (2**40,))}, path), ["__builtin__.bytearray"]),
    "a model": (lambda _, path: legacy(nn.Linear(2, 2), path), ["a whole pickled module", "linear.Linear"]),
}


@pytest.mark.parametrize(("save", "parts"), LEGACY_REFUSED.values(), ids=LEGACY_REFUSED.keys())
def test_an_older_file_that_claims_more_than_it_holds_never_reaches_pytorch(save, parts, narrow_plan, tmp_path, monkeypatch, capsys):
    path = tmp_path / "w.pth"
    save(dict(peer("resnet18", NARROW).state_dict()), path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    refused(lambda: start(path, narrow_plan), f"{path}: ", "; ", *parts)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cut", [1, 100, 3_000, -50, -1])
def test_an_older_file_that_is_cut_off_is_refused(cut, narrow_plan, tmp_path):
    path = tmp_path / "w.pth"
    legacy(peer("resnet18", NARROW).state_dict(), path)
    path.write_bytes(path.read_bytes()[:cut])
    refused(lambda: start(path, narrow_plan), f"{path}: ", "; ")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "older"])
def test_damaged_files_of_pytorch_are_read_or_refused_on_one_line(options, narrow_plan, tmp_path):
    path, outcomes = tmp_path / "w.pth", collections.Counter()
    torch.save({"epoch": 3, "state_dict": peer("resnet18", NARROW).state_dict()}, path, **options)
    sound = path.read_bytes()
    for number in range(120):
        path.write_bytes(mutations.mutated(random.Random(f"{number}"), "pth", [sound]))
        try:
            weights.read_weights(path, narrow_plan, shapes_of(narrow_plan))
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 3, outcomes


def test_a_low_rank_adapter_and_a_file_of_pytorch_by_another_name_are_refused(narrow_plan, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save({"base_model.model.layer1.0.conv1.lora_A.weight": np.zeros((2, 3), np.float32)}))
    refused(lambda: start(path, narrow_plan), f"{path}: a LoRA adapter")
    part = saved(peer("resnet18", NARROW), tmp_path / "model-00001-of-00002.safetensors")
    refused(lambda: start(part, narrow_plan), f"{part}: one of several files")
    torch.save({}, path)
    refused(lambda: start(path, narrow_plan), f"{path}: not safetensors, but a zip archive, such as PyTorch's")


def test_a_file_far_larger_than_the_network_is_not_read(narrow_plan, tmp_path):
    path = saved(peer("resnet18", NARROW), tmp_path / "w.pth")
    os.truncate(path, 2**30)  # a file with a hole
    refused(lambda: start(path, narrow_plan), f"{path}: 1073741824 bytes, where this network and any classifier take less than")


def test_without_pytorch_or_with_an_unsafe_one_its_files_are_refused(narrow_plan, tmp_path, monkeypatch):
    path = saved(peer("resnet18", NARROW), tmp_path / "w.pth")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.1+cpu")
        refused(lambda: start(path, narrow_plan), f"{path}: PyTorch 2.5.1+cpu could run code in it; pip install -U torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(lambda: start(path, narrow_plan), f"{path}: only PyTorch can read it; pip install torch, or convert it to safetensors")


def test_pytorchs_files_are_for_resnets(tmp_path):
    path = saved(peer("resnet18", NARROW), tmp_path / "w.pth")
    plan = make_plan(config_of(**CONV), 12, 3)
    refused(lambda: start(path, plan), f"{path}: PyTorch's files are read for resnet18, resnet34, resnet50; give a .safetensors file")
