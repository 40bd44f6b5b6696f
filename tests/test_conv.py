"""The convolution: value and gradients against NumPy loops, and that its gradient stays fast in a loop on CPU."""

import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import oracles
from command_lines import in_a_process
from vffjax.costs import targets
from vffjax.ops import conv as conv_module
from vffjax.ops.conv import _plain, conv

CANONICAL = "dim_labels=b01f_01io->b01f"
full_optimisation = pytest.mark.full_optimisation
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the program for CPU")


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(x, kernel, g, f=conv):
    return jax.vjp(f, x, kernel)[1](g)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        pytest.param(5, 4096, id="one product"),
        pytest.param(5, 30, id="ragged"),
        pytest.param(4, 30, id="whole"),
        pytest.param(5, 1, id="by image"),
        pytest.param(5, 30, id="ragged, as a run compiles", marks=full_optimisation),
    ],
)
def test_value_and_gradients_equal_the_definition(batch, rows, size, monkeypatch):
    """Images of 5 x 3 positions, so that 30 rows are two images."""
    monkeypatch.setattr(conv_module, "_ROWS_PER_PRODUCT", rows)
    x, kernel, g = random(0, batch, 5, 3, 2), random(1, size, size, 2, 3), random(2, batch, 5, 3, 3)
    dx, dkernel = jax.jit(lambda *args: gradients(*args))(x, kernel, g)  # a new function, or jit remembers other `rows`
    expected_dx, expected_dkernel = oracles.conv_gradients(x, kernel, g)
    np.testing.assert_allclose(jax.jit(conv)(x, kernel), oracles.conv(x, kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernel, expected_dkernel, rtol=1e-4, atol=1e-5)


IMAGES = [(5, 3), (8, 6), (7, 4)]
STRIDED = [(size, stride) for size in (1, 3, 7) for stride in (1, 2)] + [(3, 3), (3, 4)]
OPTIMISED = [pytest.param(size, 2, id=f"{size}-2, as a run compiles", marks=full_optimisation) for size in (1, 3)]


def strided(stride):
    """A new function, or jit remembers other steps."""
    return functools.partial(conv, stride=stride)


@functools.cache
def case(size, stride, h, w):
    """Images, kernel, gradient of the output, and what is expected of them."""
    x, kernel = random(0, 5, h, w, 2), random(1, size, size, 2, 3)
    value = oracles.conv(x, kernel, stride)
    g = random(2, *value.shape)
    return x, kernel, g, (value, *oracles.conv_gradients(x, kernel, g, stride))


def value_and_gradients(x, kernel, g, f):
    value, backward = jax.vjp(f, x, kernel)
    return value, *backward(g)


def assert_equals_the_definition(size, stride, h, w):
    x, kernel, g, expected = case(size, stride, h, w)
    found = jax.jit(functools.partial(value_and_gradients, f=strided(stride)))(x, kernel, g)
    for part, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("h", "w"), IMAGES)
@pytest.mark.parametrize(("size", "stride"), STRIDED + OPTIMISED)
def test_a_stride_equals_the_definition(size, stride, h, w):
    assert_equals_the_definition(size, stride, h, w)


@pytest.mark.parametrize("images", [2, 0], ids=["ragged", "by image"])
@pytest.mark.parametrize("size", [3, 7])
def test_a_stride_over_several_products_equals_the_definition(size, images, monkeypatch):
    h2, w2 = case(size, 2, 7, 4)[2].shape[1:3]
    monkeypatch.setattr(conv_module, "_ELEMENTS_PER_PRODUCT", images * h2 * w2 * size * size * 2)
    assert_equals_the_definition(size, 2, 7, 4)


@pytest.mark.parametrize(("h", "w"), IMAGES)
@pytest.mark.parametrize(("size", "stride"), STRIDED)
def test_the_definition_is_pytorch_s(size, stride, h, w):
    torch = pytest.importorskip("torch")
    x, kernel, g, expected = case(size, stride, h, w)
    # In float64, because PyTorch's float32 gradient of a 1x1 kernel with a stride and fewer than eight input channels is wrong at times, on
    # processors without AVX-512: https://github.com/uxlfoundation/oneDNN/issues/6035.
    images, weight = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, kernel))
    out = torch.nn.functional.conv2d(images.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), stride=stride, padding=size // 2)
    out = out.permute(0, 2, 3, 1)
    out.backward(torch.tensor(g, dtype=torch.float64))
    for part, whole in zip((out.detach(), images.grad, weight.grad), expected, strict=True):
        np.testing.assert_allclose(part.numpy(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_bf16_with_a_stride_is_rounded_once(size, monkeypatch):
    """To 8 bits, half a unit of which is 2 ** -8; sums over steps of single images are float32."""
    monkeypatch.setattr(conv_module, "_ELEMENTS_PER_PRODUCT", 1)
    x, kernel, g = (jnp.asarray(a, jnp.bfloat16) for a in (random(0, 9, 5, 4, 4), random(1, size, size, 4, 5), random(2, 9, 3, 2, 5)))
    found = jax.jit(functools.partial(value_and_gradients, f=strided(2)))(x, kernel, g)
    arrays = [np.asarray(a, np.float64) for a in (x, kernel, g)]
    for part, whole in zip(found, (oracles.conv(*arrays[:2], 2), *oracles.conv_gradients(*arrays, 2)), strict=True):
        assert part.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(part, np.float64), whole, rtol=1.001 * 2**-8, atol=1e-4)


@pytest.mark.parametrize(("size", "stride", "channels"), [(3, 1, 16), (3, 1, 3), (1, 1, 16), (1, 2, 16), (3, 2, 16), (7, 2, 3)])
def test_an_exported_program_takes_any_batch_size(size, stride, channels):
    (n,) = export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 8, 6, channels), (size, size, channels, 16))]
    program = export.export(jax.jit(functools.partial(conv, stride=stride)), platforms=("cpu", "cuda", "tpu"))(*shapes)
    program = export.deserialize(program.serialize())
    for batch in (1, 3):
        x, kernel = random(0, batch, 8, 6, channels), random(1, size, size, channels, 16)
        np.testing.assert_allclose(program.call(x, kernel), oracles.conv(x, kernel, stride), rtol=1e-4, atol=1e-4)


def test_a_kernel_larger_than_the_image():
    x, kernel, g = random(0, 3, 2, 2, 2), random(1, 5, 5, 2, 3), random(2, 3, 2, 2, 3)
    for found, expected in zip(jax.jit(gradients)(x, kernel, g), oracles.conv_gradients(x, kernel, g), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bf16_gradients_are_rounded_once(monkeypatch):
    """To 8 bits, half a unit of which is 2 ** -8; sums over the products of single images are float32."""
    monkeypatch.setattr(conv_module, "_ROWS_PER_PRODUCT", 1)
    arrays = random(0, 9, 4, 4, 4), random(1, 3, 3, 4, 5), random(2, 9, 4, 4, 5)
    x, kernel, g = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    found = jax.jit(lambda *args: gradients(*args))(x, kernel, g)
    for part, expected in zip(found, oracles.conv_gradients(*(np.asarray(a, np.float64) for a in (x, kernel, g))), strict=True):
        assert part.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(part, np.float64), expected, rtol=1.001 * 2**-8, atol=1e-4)


def scan_of_gradients(f, xs, kernel):
    """A toy training loop: both gradients of `f` at every step."""

    def step(kernel, x):
        dx, dkernel = jax.grad(lambda x, k: jnp.sum(f(x, k) ** 2), (0, 1))(x, kernel)
        return kernel - 1e-6 * dkernel, dx.sum()

    return jax.lax.scan(step, kernel, xs)


def noncanonical(text):
    convolutions = [line for line in text.splitlines() if " convolution(" in line]
    return len(convolutions), [line for line in convolutions if CANONICAL not in line or "hs_dilate" in line]


@on_cpu
@pytest.mark.parametrize(("size", "stride", "convolutions"), [(3, 1, 2), (3, 2, 5), (7, 2, 5), (1, 1, 0), (1, 2, 0)])
def test_a_loop_on_cpu_holds_canonical_convolutions_only(size, stride, convolutions):
    """One for the value, one for the input gradient at each offset within the stride; a kernel of one position is a product."""
    args = random(0, 3, 5, 6, 6, 4), random(1, size, size, 4, 5)
    ours, xla = (
        noncanonical(jax.jit(functools.partial(scan_of_gradients, functools.partial(f, stride=stride))).lower(*args).as_text("hlo"))
        for f in (conv, _plain)
    )
    assert ours == (convolutions, [])
    assert xla[1]  # so XLA's own gradient would be found


@full_optimisation
@on_cpu
def test_the_choice_of_platform_leaves_no_branch_in_the_program():
    args = random(0, 3, 5, 6, 6, 4), random(1, 3, 3, 4, 5)
    compiled = jax.jit(functools.partial(scan_of_gradients, conv)).lower(*args).compile().as_text()
    assert "while" in compiled
    assert not re.search(r"\bconditional\(", compiled)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_cpu_gets_the_matrix_products(platform, products, stride):
    arrays = random(0, 5, 6, 6, 4), random(1, 3, 3, 4, 5), random(2, 5, 6 // stride, 6 // stride, 5)
    text = jax.jit(functools.partial(gradients, f=strided(stride))).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == products
    assert "convolution" in text


@full_optimisation
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_an_input_gradient_that_nobody_asks_for_is_not_computed(size, stride):
    x, kernel = map(jnp.asarray, (random(0, 5, 6, 6, 4), random(1, size, size, 4, 5)))
    f = jax.jit(jax.grad(lambda k: jnp.sum(conv(x, k, stride) ** 2)))
    g = jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k, stride) ** 2), (0, 1)))
    flops = [program.compile().cost_analysis()["flops"] for program in (f.lower(kernel), g.lower(x, kernel))]
    assert flops[0] < 0.75 * flops[1]


@full_optimisation
@on_cpu
def test_the_gradient_is_as_fast_in_a_scan_as_outside():
    """XLA's own is about a hundred times slower there; 3 leaves room for a busy machine."""
    steps, xs, kernel = 4, random(0, 4, 32, 16, 16, 16), random(1, 3, 3, 16, 16)
    inside = jax.jit(functools.partial(scan_of_gradients, conv)).lower(xs, kernel).compile()
    single = jax.jit(jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1))).lower(xs[0], kernel).compile()
    times = {"inside": [], "outside": []}
    for repetition in range(6):
        start = time.perf_counter()
        jax.block_until_ready(inside(xs, kernel))
        middle = time.perf_counter()
        for x in xs:
            jax.block_until_ready(single(x, kernel))
        if repetition:
            times["inside"].append((middle - start) / steps)
            times["outside"].append((time.perf_counter() - middle) / steps)
    assert statistics.median(times["inside"]) < 3 * statistics.median(times["outside"]), times


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 5])
def test_the_tpu_s_kernel_gradient_equals_the_definition(size, stride):
    h, w = 8, 5
    x, g = random(0, 4, h, w, 2).astype(np.float64), random(1, 4, -(-h // stride), -(-w // stride), 3).astype(np.float64)
    p = size // 2
    padded, expected = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0))), np.zeros((size, size, 2, 3))
    for i, j, a, b in np.ndindex(size, size, *g.shape[1:3]):
        expected[i, j] += padded[:, stride * a + i, stride * b + j].T @ g[:, a, b]
    found = conv_module._kernel_gradient_by_one_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32), size, stride)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_a_float32_kernel_gets_the_gradient_of_a_bf16_kernel_in_its_own_dtype(size):
    x, g = (jnp.asarray(random(i, 3, 4, 4, 2), jnp.bfloat16) for i in (0, 1))
    kernel = jnp.asarray(random(2, size, size, 2, 2), jnp.bfloat16)
    in_f32, in_bf16 = (gradients(x, k, g) for k in (kernel.astype(jnp.float32), kernel))
    assert in_f32[1].dtype == jnp.float32
    for found, expected in zip(in_f32, in_bf16, strict=True):  # on CPU the bits are the same
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.slow
def test_kernel_gradients_of_several_gpus_are_added_in_float32():
    # The form for GPUs: as it computes on fake devices of a CPU, and as it is lowered for CUDA. The gradient of each device is a bfloat16:
    # 256, 1, 1 and 1. Their sum is none.
    script = """
import jax, jax.numpy as jnp, numpy as np
from vffjax.ops import conv
from vffjax.training.mesh import mesh_of, within
x, g = np.zeros((2, 4, 4, 4, 1), np.float32)
x[:, 1, 2, 0], g[:, 1, 2, 0] = [256, 1, 1, 1], 1
_, of_kernel = conv._gradients(3, 1, np.dtype(np.float32))
arrays = [jnp.asarray(a, jnp.bfloat16) for a in (x, np.ones((3, 3, 1, 1)), g)]
with within(mesh_of(4)):
    print(jax.jit(of_kernel["default"])(*arrays)[1, 1, 0, 0])
    gradient = jax.jit(lambda x, kernel, g: jax.vjp(conv.conv, x, kernel)[1](g)[1])
    traced = gradient.trace(arrays[0], jnp.ones((3, 3, 1, 1)), arrays[2])
    print(traced.lower(lowering_platforms=("cuda",)).as_text())
"""
    done = in_a_process("-c", script, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.returncode == 0 and done.stdout.startswith("259.0\n"), done.stderr[-2000:]
    assert re.findall(r"all_reduce.*?-> tensor<(\w+)>", done.stdout, re.DOTALL) == ["3x3x1x1xf32"]


@full_optimisation
@pytest.mark.skipif(not targets.has_tpu_compiler(), reason="libtpu is not installed; pip install -e .[tpu-compiler]")
def test_kernel_gradients_of_several_tpus_are_added_in_float32():
    # In a process of its own: libtpu reads its environment once, and must not meet the backend of the other tests.
    script = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vffjax.costs import targets
from vffjax.ops.conv import conv
targets.find("tpu")  # tells libtpu that no TPU is there
mesh = Mesh(np.array(topologies.get_topology_desc("v5e:2x2", "tpu").devices), ("data",))
everywhere, divided = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
rows = jax.ShapeDtypeStruct((8, 8, 8, 16), jnp.bfloat16, sharding=divided)
kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32, sharding=everywhere)
gradient = jax.jit(lambda x, kernel, g: jax.vjp(conv, x, kernel)[1](g)[1], out_shardings=everywhere)
print(gradient.lower(rows, kernel, rows).compile().as_text())
"""
    done = in_a_process("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"= (\w+)\[[\d,]*\]\S* all-reduce(?:-start)?\(", done.stdout) == ["f32"]
