"""VGG and ResNet: the published shapes and counts, residual blocks against NumPy float64, where they are cut, resizing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import config_of, variables_of
from vffjax.networks.groups import HEAD_INPUTS, _output_and_kernels, fitting_grid, init_variables, layer_sizes
from vffjax.networks.layers import EPSILON, resized
from vffjax.networks.resnet import ResidualBlock, Stem
from vffjax.proofs import locality
from vffjax.registry import NETWORKS
from vffjax.training.plan import groups_of

RESNET, VGG = ("resnet18", "resnet34", "resnet50"), ("vgg8b", "vgg11b")
PUBLISHED = (*VGG, *RESNET)
CLEAN = 3
# torchvision's ResNets without their classifier: 11,689,512, 21,797,672 and 25,557,032 less 1,000 classes.
OF_TORCHVISION = {"resnet18": 11_689_512 - 513_000, "resnet34": 21_797_672 - 513_000, "resnet50": 25_557_032 - 2_049_000}


def of(network, shape=(32, 32, 3), classes=10, **changes):
    """The groups of a network, and the abstract (parameters, statistics) of each."""
    groups = groups_of(config_of(network=network, **changes), classes)
    return groups, jax.eval_shape(lambda: init_variables(groups, jax.random.key(0), shape))


def entries(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def without_head(params):
    return {name: tree for name, tree in params.items() if name != "head"}


@pytest.mark.parametrize("grouping", ["width", "all"])
@pytest.mark.parametrize("network", oracles.slow_but(RESNET, "resnet18"))
def test_a_resnet_has_as_many_parameters_as_torchvisions(network, grouping):
    _, variables = of(network, stem="imagenet", grouping=grouping, image_size=64)
    assert sum(entries(without_head(params)) for params, _ in variables) == OF_TORCHVISION[network]


def test_vgg_has_the_published_kernels():
    """Of 32x32 images four poolings leave 2x2 positions to the dense layer."""
    shapes = {network: [x.shape for p, _ in of(network)[1] for x in jax.tree.leaves(without_head(p)) if x.ndim > 1] for network in VGG}
    assert [s[2:] for s in shapes["vgg8b"][:-1]] == [(3, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512)]
    assert shapes["vgg8b"][-1] == (2 * 2 * 512, 1024)
    wide = [128, 128, 128, 256, 256, 512, 512, 512, 512]
    assert [s[2:] for s in shapes["vgg11b"][:-1]] == list(zip([3, *wide[:-1]], wide, strict=True))
    assert shapes["vgg11b"][-1] == (2 * 2 * 512, 1024)


SIZED = [(n, "cifar") for n in PUBLISHED] + [(n, "imagenet") for n in RESNET]


@pytest.mark.parametrize(
    ("network", "stem"), oracles.slow_but(SIZED, ("resnet18", "cifar"), ("resnet18", "imagenet"), ("vgg8b", "cifar"), several=True)
)
def test_sizes_on_paper_are_those_of_the_network(network, stem):
    """Kernels layer by layer, and that no feature map which a layer gives is larger than was said. Narrow, and of odd sides."""
    config = config_of(network=network, stem=stem, width_factor=0.1)
    shape = (36, 37, 3)
    groups = groups_of(config, 10)
    sizes, x = layer_sizes(groups, shape), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    layers = [layer for group in groups for layer in group.module.layers]
    assert len(sizes) == len(layers)
    for layer, size in zip(layers, sizes, strict=True):
        variables = jax.eval_shape(lambda x, layer=layer: layer.init(jax.random.key(0), x, 1, False), x)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1) == size.kernels
        x = jax.eval_shape(lambda v, x, layer=layer: layer.apply(v, x, 1, False), variables, x)
        assert x.size <= size.map
        assert x.shape[-1] == layer.width == size.width


def test_the_map_of_a_stem_is_that_in_front_of_its_pooling():
    sizes = layer_sizes(groups_of(config_of(network="resnet18", stem="imagenet", width_factor=0.125), 10), (64, 64, 3))
    assert sizes[0] == (7 * 7 * 3 * 8, 32 * 32 * 8, 8)
    assert sizes[0].multiplications == 7 * 7 * 3 * 8 * 32 * 32


def test_the_map_in_front_of_a_pooling_is_whole_where_the_window_does_not_divide_it():
    sizes = layer_sizes(groups_of(config_of(network="conv", widths=(4, 6), pools=(4, 1)), 10), (7, 7, 3))
    assert [size.map for size in sizes] == [7 * 7 * 4, 1 * 1 * 6]


def test_layers_that_are_alike_are_sized_once(monkeypatch):
    """The second of 30 layers is like the 28 behind it; the first has fewer input channels, and each tracing takes milliseconds."""
    layer_sizes.cache_clear()
    _output_and_kernels.cache_clear()
    traced, eval_shape = [], jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda *args: traced.append(args) or eval_shape(*args))
    config = config_of(network="conv", widths=(7,) * 30, pools=(1,) * 30)
    assert len(layer_sizes(groups_of(config, 10), (5, 9, 3))) == 30
    assert len(traced) == 2


CUT = [
    ("resnet18", "width", [3, 2, 2, 2]),  # the stem with the first group
    ("resnet34", "width", [4, 4, 6, 3]),
    ("resnet50", "width", [4, 4, 6, 3]),  # though the stem is 64 wide and its group 256
    ("resnet18", "block", [2] + [1] * 7),
    ("resnet50", "block", [2] + [1] * 15),
    ("resnet18", "layer", [1] * 9),
    ("resnet50", "layer", [1] * 17),
    ("resnet34", "all", [17]),
    ("vgg8b", "width", [1, 2, 3, 1]),
    ("vgg8b", "block", [2, 2, 1, 1, 1]),  # each ends with a pooling; the dense layer is the last
    ("vgg11b", "width", [3, 2, 4, 1]),
    ("vgg11b", "block", [4, 2, 2, 1, 1]),
    ("vgg11b", "layer", [1] * 10),
]


@pytest.mark.parametrize(
    ("network", "grouping", "expected"), oracles.slow_but(CUT, *(case for case in CUT if case[0] in ("resnet18", "vgg8b")), several=True)
)
def test_groups_are_cut_by_width_by_block_and_by_layer(network, grouping, expected):
    groups, _ = of(network, grouping=grouping)
    assert [len(group.module.layers) for group in groups] == expected
    assert sum((group.module.layers for group in groups), ()) == NETWORKS.find(network).layers(config_of(network=network), "batch")


@pytest.mark.parametrize(("width", "grid"), [(1, 64), (64, 8), (65, 4), (256, 4), (512, 2), (1024, 2), (2048, 1), (65_536, 1)])
def test_heads_scale_with_the_group(width, grid):
    assert fitting_grid(width) == grid
    assert grid * grid * width <= max(HEAD_INPUTS, width)


@pytest.mark.slow
def test_a_heads_grid_is_by_width_if_the_configuration_leaves_it():
    assert [group.head.grid for group in of("resnet50", head_grid=0)[0]] == [4, 2, 2, 1]
    assert [group.head.grid for group in of("resnet50", head_grid=3)[0]] == [3] * 4
    variables = of("resnet18", head_grid=0)[1]
    assert [p["head"]["kernel"].shape for p, _ in variables] == [(4096, 10), (2048, 10), (4096, 10), (2048, 10)]


# By width: test_locality.py certifies their configurations.
CERTIFIED = [(network, grouping) for network in ("vgg8b", "resnet18") for grouping in ("block", "layer")]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "grouping"), CERTIFIED)
def test_no_gradient_crosses_in_any_grouping(network, grouping):
    """By the traced program, narrow; `benchmarks/networks.py` does it for every network as published."""
    found = locality.certify(config_of(network=network, grouping=grouping, width_factor=0.02, dataset="cifar10"), numeric=False)
    assert (found["local"], found["violations"]) == (True, [])
    assert len(found["groups"]) > 3


@pytest.mark.slow
def test_back_propagation_through_a_resnet_is_found():
    found = locality.certify(
        config_of(network="resnet18", grouping="all", rule="head", width_factor=0.02, dataset="cifar10"), numeric=False
    )
    assert not found["local"]
    assert "back-propagation" in found["verdict"]


# ----------------------------------------------------------------------------------------------------------------------------------
# Values


def normalised(x, params, stats, train):
    """Each stream by its own statistics: of the batch in training, else the running ones."""
    out = []
    for i, part in enumerate((x[:CLEAN], x[CLEAN:])):
        mean, var = (part.mean((0, 1, 2)), part.var((0, 1, 2))) if train else (stats["mean"][i], stats["var"][i])
        out.append((part - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"])
    return np.concatenate(out)


def residual(x, params, stats, stride, bottleneck, train):
    """The block's definition in He et al. (2016), figure 5; in a bottleneck the 3x3 convolution has the stride."""
    strides = [1, stride, 1] if bottleneck else [stride, 1]
    out = x
    for i, s in enumerate(strides, 1):
        out = normalised(oracles.conv(out, params[f"conv{i}"]["kernel"], s), params[f"bn{i}"], stats[f"bn{i}"], train)
        out = out if i == len(strides) else np.maximum(out, 0)
    if "downsample_0" in params:
        x = normalised(oracles.conv(x, params["downsample_0"]["kernel"], stride), params["downsample_1"], stats["downsample_1"], train)
    return np.maximum(out + x, 0)


COMMON = {"norm": "batch", "dtype": jnp.float32, "frozen": False}
BLOCKS = {
    "as it is": ResidualBlock(4, inner=4, stride=1, bottleneck=False, **COMMON),
    "wider": ResidualBlock(6, inner=6, stride=1, bottleneck=False, **COMMON),
    "stride": ResidualBlock(4, inner=4, stride=2, bottleneck=False, **COMMON),
    "bottleneck": ResidualBlock(4, inner=2, stride=1, bottleneck=True, **COMMON),
    "bottleneck, stride": ResidualBlock(8, inner=3, stride=2, bottleneck=True, **COMMON),
}


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", oracles.slow_but(BLOCKS, "stride"))
@pytest.mark.parametrize("side", oracles.slow_but([5, 6], 5))
def test_a_residual_block_is_what_the_paper_says(name, train, side):
    block, x = BLOCKS[name], np.random.default_rng(0).normal(size=(5, side, side, 4))
    variables = variables_of(block, x)
    out, _ = block.apply(variables, jnp.asarray(x, jnp.float32), CLEAN, train, mutable=["batch_stats"])
    params, stats = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables[kind]) for kind in ("params", "batch_stats"))
    expected = residual(x, params, stats, block.stride, block.bottleneck, train)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    assert ("downsample_0" in params) == (name not in ("as it is", "bottleneck"))


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_a_stem_is_convolution_normalisation_and_pooling(kind):
    stem, x = Stem(4, kind=kind, **COMMON), np.random.default_rng(0).normal(size=(5, 9, 9, 3))
    variables = variables_of(stem, x)
    out = np.asarray(stem.apply(variables, jnp.asarray(x, jnp.float32), CLEAN, False))
    params, stats = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables[kind]) for kind in ("params", "batch_stats"))
    kernel = params["conv1"]["kernel"]
    assert kernel.shape[:2] == ((7, 7) if kind == "imagenet" else (3, 3))
    expected = np.maximum(normalised(oracles.conv(x, kernel, 2 if kind == "imagenet" else 1), params["bn1"], stats["bn1"], False), 0)
    if kind == "imagenet":
        padded = np.pad(expected, ((0, 0), (1, 1), (1, 1), (0, 0)))  # of what is not negative, zeros are no maximum
        expected = np.stack([np.stack([padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in (0, 2, 4)], 1) for i in (0, 2, 4)], 1)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


def test_blocks_have_torchvisions_names():
    def blocks(network, factor=1.0):
        return NETWORKS.find(network).blocks(config_of(network=network, width_factor=factor))

    assert [block.name for block in blocks("resnet18")] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [(b.width, b.inner, b.stride) for b in blocks("resnet50", 0.5)][:4] == [(128, 32, 1)] * 3 + [(256, 64, 2)]


# ----------------------------------------------------------------------------------------------------------------------------------
# Resizing


def bilinear(image, side):
    """Of one map, by the definition: pixel centres at halves, edges held."""
    h, w, _ = image.shape
    out = np.zeros((side, side, image.shape[2]))
    for i, j in np.ndindex(side, side):
        y, z = (i + 0.5) * h / side - 0.5, (j + 0.5) * w / side - 0.5
        for dy, dz in np.ndindex(2, 2):
            row, column = int(np.floor(y)) + dy, int(np.floor(z)) + dz
            weight = (1 - abs(y - row)) * (1 - abs(z - column))
            out[i, j] += weight * image[min(max(row, 0), h - 1), min(max(column, 0), w - 1)]
    return out


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (9, 9)])
def test_images_grow_bilinearly(shape):
    images = np.random.default_rng(0).normal(size=(2, *shape, 3))
    out = resized(jnp.asarray(images, jnp.float32), 9)
    np.testing.assert_allclose(out, [bilinear(image, 9) for image in images], rtol=1e-4, atol=1e-5)


def test_without_a_size_images_stay_as_they_are():
    x = jnp.ones((2, 4, 5, 3))
    assert resized(x, 0) is x
    assert resized(x, 5).shape == (2, 5, 5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["conv4", "vgg8b", "resnet18"])
def test_a_network_sees_its_images_resized(network):
    """The first group of images at twice the size is that of images given at twice the size; label noise is resized with its image."""
    changes = {"network": network, "width_factor": 0.05} if network != "conv4" else {"network": network, "widths": (4, 4, 6, 6)}
    shape = (16, 16, 3)
    small, large = (groups_of(config_of(**changes, image_size=side), 3)[0] for side in (32, 0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, *shape)), jnp.float32)
    params, stats = small.init(jax.random.key(0), x)
    out = [group.features(params, stats, rows, CLEAN, False)[0] for group, rows in ((small, x), (large, resized(x, 32)))]
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5, atol=1e-6)
    assert out[0].shape[1] == functools.reduce(lambda side, layer: side // getattr(layer, "pool", 1), small.module.layers, 32)
