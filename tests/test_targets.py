"""Devices that are not here: their names, what their absence says, and cards without bfloat16."""

import json
import re
import types

import jax
import pytest

from command_lines import CONFIG, in_a_process
from oracles import config_of
from vffjax.costs import fits, targets
from vffjax.errors import UserError

for_gpus = pytest.mark.skipif(not targets.has_gpu_compiler(), reason="no compiler for GPUs; pip install -e .[cuda-compiler]")


@pytest.mark.parametrize("card", targets.GPUS)
def test_the_figures_of_a_card_name_their_source_and_reach_the_compiler_without_it(card):
    folder = targets.importlib.resources.files("vffjax.costs") / "gpu_targets"
    text = (folder / f"{card}.txtpb").read_text()
    assert text.startswith("# NVIDIA") and "Figures:" in text
    given = targets.gpu_figures(card)
    assert "#" not in given and given.count("{") == given.count("}")
    numbers = dict(re.findall(r"(\w+): ([\d.]+)", given))
    # The compiler asks for these; a card that lacks one would be compiled for as if it had none of it.
    for key in ("core_count", "fpus_per_core", "clock_rate_ghz", "memory_bandwidth", "device_memory_size", "l2_cache_size", "major"):
        assert float(numbers[key]) > 0, key


def test_every_card_has_a_file_and_every_file_is_a_card():
    folder = targets.importlib.resources.files("vffjax.costs") / "gpu_targets"
    assert sorted(file.name for file in folder.iterdir()) == [f"{card}.txtpb" for card in sorted(targets.GPUS)]


def test_without_its_compiler_a_gpu_is_refused_with_the_fix(fails, monkeypatch):
    monkeypatch.setattr(targets, "has_gpu_compiler", lambda: False)
    fails("memory", CONFIG, "--target=h100", parts=["--target=h100", "cuda-compiler", "Python >= 3.12", "jax >= 0.11", jax.__version__])


@pytest.mark.parametrize(
    ("version", "plugin", "able"), [("0.10.2", True, False), ("0.11.0", True, True), ("1.0", True, True), ("0.12.1", False, False)]
)
def test_gpus_need_a_new_jax_and_a_plugin(version, plugin, able, monkeypatch):
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: types.SimpleNamespace() if plugin else None)
    assert targets.has_gpu_compiler() is able


@pytest.mark.parametrize("name", ["h100:", "h100:x", "v5e:2x", "v5e:0x2", "v5e:2x2x2x2"])
def test_what_is_no_arrangement_is_refused(name):
    with pytest.raises(UserError, match=rf"--target={name}: .*no arrangement of devices; give for example v5e:2x2"):
        targets.find(name)


def card(capability, kind="Tesla T4"):
    return types.SimpleNamespace(device_kind=kind, compute_capability=capability, platform="gpu")


def test_a_card_without_bfloat16_is_said_once_for_bf16_and_never_for_f32():
    words = fits.about_precision(config_of(precision="bf16"), card("7.5"))
    for part in ("config.precision=bf16", "Tesla T4", "7.5", "float32", "use precision=f32"):
        assert part in words
    assert fits.about_precision(config_of(precision="f32"), card("7.5")) == ""
    for other in (card("8.0"), card("9.0a"), card("12.0"), card(None), jax.devices("cpu")[0]):
        assert fits.about_precision(config_of(precision="bf16"), other) == ""


def test_a_run_in_bf16_on_such_a_card_says_so(monkeypatch, call, tmp_path):
    device = jax.devices()[0]
    told = []
    monkeypatch.setattr("vffjax.runs.experiment.about_precision", lambda config, found: told.append((config.precision, found)) or "said")
    flags = ["--config.network=mlp", "--config.widths=(4,)", "--config.epochs=1", "--config.train_examples=64", "--config.batch_size=16"]
    status, _, err = call("train", CONFIG, *flags, "--config.precision=bf16", f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    assert told == [("bf16", device)]
    assert err.splitlines().count("said") == 1


# One process compiles for each card, because a plugin must not meet the backend of the other tests.
CONVOLUTION = """
import json, sys
import jax, jax.numpy as jnp
from vffjax.costs import targets
from vffjax.costs.program_text import Program
def convolve(x, k):
    return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
found = {}
for name in sys.argv[1:]:
    target = targets.find(name)
    given = target.array(16, 8, 8, 64, dtype=jnp.bfloat16), target.array(3, 3, 64, 64, dtype=jnp.bfloat16)
    program = Program(jax.jit(convolve).lower(*given).compile().as_text())
    found[name] = [target.device.device_kind, list(program.convolutions()), targets.lacks_bfloat16(target.device), target.number]
print(json.dumps(found))
"""


@pytest.mark.slow
@for_gpus
def test_a_convolution_compiles_for_each_card_and_only_the_t4_computes_it_in_float32():
    done = in_a_process("-c", CONVOLUTION, *targets.GPUS, "h100:2x4")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found[name][3] for name in found] == [1] * len(targets.GPUS) + [8]
    for name, (kind, convolutions, lacks, _) in found.items():
        assert name[:2].upper() in kind
        assert lacks == (name == "t4")
        (convolution,) = convolutions
        assert convolution.startswith("f32 bf01" if name == "t4" else "bf16 b01f"), convolution
