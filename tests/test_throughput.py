"""The benchmark against PyTorch: its arithmetic, its order of measuring, its table, and what it says to bad input."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import contenders
import keys
import rates
import throughput
from command_lines import ROOT
from oracles import CONV, MLP, config_of
from vffjax.config import FIELDS
from vffjax.errors import UserError
from vffjax.training.checks import make_config

DIGITS = ["--config", str(ROOT / "configs/digits.py"), "--config.batch_size=16"]
TINY = [*DIGITS, "--config.network=mlp", "--config.widths=(4,4)", "--config.grouping=layer"]
TRIPLET = {"rule": "vff", "labelling": "triplet"}

# A ResNet-18 of 1, 2, 4 and 8 channels on maps of 64, 16, 4 and 1 positions, in four groups by width. Each stage has four convolutions of
# 3x3. From the second stage on, the first of them reads fewer channels, and there is a shortcut of 1x1. Both read the input of their group.
RESNET = {"network": "resnet18", "width_factor": 1 / 64, "batch_size": 12, "head_grid": 8}
RESNET_STAGES = [(64, 1, 1), (16, 1, 2), (4, 2, 4), (1, 4, 8)]  # positions, channels that are read, channels
RESNET_LAYERS = 64 * 9 * 2 + 64 * 9 * 4 + sum(n * (9 * c * d + 3 * 9 * d * d + c * d) for n, c, d in RESNET_STAGES[1:])
RESNET_ENTRIES = 64 * 9 * 2 + sum(n * (9 * c * d + c * d) for n, c, d in RESNET_STAGES[1:])

# Multiplications of a row: layers 9*2*4*64, 9*4*4*64, 9*4*6*16, 9*6*6*16; heads of the groups 4*4*4*3 and 2*2*6*3, by layer also
# 4*4*4*3 and 4*4*6*3. Twelve clean rows.
CONV_LAYERS = (4608, 9216, 3456, 5184)
BY_WIDTH = 3 * sum(CONV_LAYERS) - 4608 - 3456  # the first layer of each group has no input gradient


@pytest.mark.parametrize(
    ("changes", "multiplications"),
    [
        (CONV | {"rule": "head", "grouping": "all"}, 12 * (3 * 22464 - 4608) + 12 * 3 * 72),
        (CONV | {"rule": "head"}, 12 * BY_WIDTH + 12 * 3 * (192 + 72)),
        (CONV, (12 + 6) * BY_WIDTH + 12 * 2 * (192 + 72)),  # two copies of three classes; the head only reads
        (CONV | {"head_weight": 0.5}, (12 + 6) * BY_WIDTH + 12 * 3 * (192 + 72)),
        (CONV | TRIPLET, 36 * BY_WIDTH + 12 * 2 * (192 + 72)),
        (CONV | TRIPLET | {"negatives": "hard"}, 36 * BY_WIDTH + 12 * 2 * (192 + 72) + 12 * (22464 + 192 + 72)),
        (CONV | {"rule": "ff", "grouping": "layer"}, 36 * 2 * 22464 + 12 * 2 * (192 + 192 + 288 + 72)),
        # The first group frozen: its layers only go forward, and its head only reads.
        (CONV | {"head_weight": 0.5, "frozen_groups": 1}, 18 * (4608 + 9216 + 3 * 8640 - 3456) + 12 * (2 * 192 + 3 * 72)),
        # A convolution before the first head: its kernel gradient, and the input gradient of the linear map behind it.
        (CONV | {"auxiliary": (5,)}, (12 + 6) * BY_WIDTH + 12 * (2 * 9 * 16 * 4 * 5 + 3 * 16 * 5 * 3 + 2 * 72)),
        # The head of one group trains its layers, and that of the other only reads.
        (CONV | {"overrides": {"group0": {"head_weight": 0.5}}}, 18 * BY_WIDTH + 12 * (3 * 192 + 2 * 72)),
        (CONV | {"head_weight": 0.5, "overrides": {"group0": {"head_weight": 0.0}}}, 18 * BY_WIDTH + 12 * (2 * 192 + 3 * 72)),
        # Kernels that the rule owns: of supcon 2*2 cells, 4 and 6 channels, 128 dimensions; of predsim 3x3 on maps of 4x4 and 2x2.
        (CONV | {"rule": "supcon"}, 12 * BY_WIDTH + 12 * 2 * (192 + 72) + 12 * 3 * 128 * (16 + 24)),
        (CONV | {"rule": "vff_supcon"}, 18 * BY_WIDTH + 12 * 2 * (192 + 72) + 12 * 3 * 128 * (16 + 24)),
        (CONV | {"rule": "vff_projected"}, 18 * BY_WIDTH + 12 * 2 * (192 + 72) + 18 * 3 * 128 * (16 + 24)),
        (CONV | {"rule": "predsim"}, 12 * BY_WIDTH + 12 * 3 * (192 + 72) + 12 * 3 * (9 * 4 * 4 * 16 + 9 * 6 * 6 * 4)),
        (CONV | {"rule": "supcon", "frozen_groups": 1}, 12 * (13824 + 3 * 8640 - 3456) + 12 * 2 * (192 + 72) + 12 * 3 * 128 * 24),
        (MLP | {"rule": "head"}, 12 * 2 * (128 * 12 + 120 + 120) + 12 * 3 * (36 + 30 + 36)),
        (RESNET | {"rule": "head"}, 12 * (3 * RESNET_LAYERS - RESNET_ENTRIES) + 12 * 3 * 3 * (64 * 1 + 16 * 2 + 4 * 4 + 8)),
        (RESNET | {"rule": "head", "grouping": "all"}, 12 * (3 * RESNET_LAYERS - 64 * 9 * 2) + 12 * 3 * 3 * 8),
    ],
)
def test_flops_of_a_step_are_those_counted_by_hand(changes, multiplications):
    assert rates.training_flops(config_of(**changes), (8, 8, 2), 3) == 2 * multiplications


@pytest.mark.parametrize(("network", "billions"), [("resnet18", 1.814), ("resnet34", 3.664), ("resnet50", 4.089)])
def test_multiplications_of_a_resnet_are_those_that_torchvision_states(network, billions):
    """torchvision 0.20 gives them for images of 224x224 and 1,000 classes (`_ops` of its weights)."""
    config = make_config(
        {"dataset": "synthetic", "network": network, "stem": "imagenet", "image_size": 224, "grouping": "all", "head_grid": 1}
    )
    (work,) = rates.forward_work(config, (32, 32, 3), 1000)
    assert work.layers + sum(work.head) == pytest.approx(billions * 1e9, abs=5e5)


def test_the_rate_of_matrix_products_is_that_of_the_median_run(monkeypatch):
    ran = []
    clock = iter([0.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0, 12.1, 13.0, 13.5])  # 9 s, 0.1 s and three times 0.5 s
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    assert rates.product_rate(lambda: ran.append(1), 10) == rates.PRODUCTS * 2 * 1000 / 0.5
    assert len(ran) == 1 + rates.TRIALS  # one to warm up


def test_matrix_products_run_in_both_precisions():
    for precision in ("f32", "bf16"):
        assert rates.product_rate(rates.jax_products(32, precision), 32) > 0


def test_contenders_take_turns_and_none_always_follows_the_same(monkeypatch):
    ran = []
    fakes = {name: type("Fake", (), {"epoch": lambda self, name=name: ran.append(name)})() for name in ("a", "b", "c")}
    clock = iter(range(100))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput.time, "sleep", lambda seconds: ran.append("pause"))
    rounds = throughput.measure(fakes, 3, images=40)
    assert "".join(name if name != "pause" else "-" for name in ran) == "-a-b-c-b-c-a-c-a-b"
    assert rounds == [{"a": 40.0, "b": 40.0, "c": 40.0}] * 3


def test_ratios_are_to_the_best_peer_of_the_same_round():
    contender = type("Fake", (), {"library": "jax", "facts": {"compile_seconds": 1.0}})()
    rounds = [
        {"bp": 10.0, "torch-bp": 5.0, "torch-bp-compiled": 4.0, "torch-vff": 99.0},
        {"bp": 30.0, "torch-bp": 10.0, "torch-bp-compiled": 20.0, "torch-vff": 99.0},
        {"bp": 90.0, "torch-bp": 10.0, "torch-bp-compiled": 1.0, "torch-vff": 99.0},
    ]
    row = throughput.summarise("bp", contender, rounds, flops_per_image=4.0, product_rate=480.0)
    assert (row["images_per_second"], row["images_per_second_range"], row["n"]) == (30.0, [10.0, 90.0], 3)
    assert (row["over_torch_bp"], row["over_torch_bp_range"]) == (2.0, [1.5, 9.0])
    assert (row["flops_per_second"], row["share_of_matrix_product_rate"]) == (120.0, 0.25)
    alone = throughput.summarise("bp", contender, [{"bp": 10.0, "torch-vff": 5.0}], 4.0, 480.0)
    assert alone["over_torch_bp"] is None


def test_like_is_compared_with_the_fastest_like_of_the_same_round():
    names = ["vff", "vff-triplet", "bp", "torch-vff", "torch-vff-compiled", "torch-bp", "torch-bp-compiled"]
    variants = {name: contenders.variant(config_of(**CONV), name) for name in names}
    speeds = [(8.0, 6.0, 10.0, 2.0, 1.0, 5.0, 4.0), (9.0, 8.0, 12.0, 1.0, 4.0, 5.0, 6.0), (8.0, 5.0, 14.0, 2.5, 2.0, 2.0, 1.0)]
    rounds = [dict(zip(names, speed, strict=True)) for speed in speeds]
    found = {(row["contender"], *row["peers"]): row for row in throughput.comparisons(rounds, variants)}
    streams, bp = found["vff-triplet", "torch-vff", "torch-vff-compiled"], found["bp", "torch-bp", "torch-bp-compiled"]
    assert (streams["ratio"], streams["ratio_range"], streams["n"]) == (2.0, [2.0, 3.0], 3)  # of 3, 2 and 2
    assert (bp["ratio"], bp["ratio_range"]) == (2.0, [2.0, 7.0])
    assert [row["same_algorithm"] for row in (streams, bp)] == [True, True]
    assert not any(row["same_algorithm"] for key, row in found.items() if key[0] == "vff")
    shown = throughput.comparison_table(list(found.values()))
    assert shown[2] == "| vff-triplet | torch-vff, torch-vff-compiled | 2.00 | 2.00 - 3.00 | 3 | the same on both sides |"
    assert ["the same on both sides" in line for line in shown[2:]] == [True, True] + [False] * (len(found) - 2)

    triplet = {name: contenders.variant(config_of(**CONV, labelling="triplet"), name) for name in ("vff", "torch-vff")}
    assert throughput.comparisons([{"vff": 8.0, "torch-vff": 2.0}], triplet)[0]["same_algorithm"]
    assert throughput.comparisons([{"bp": 1.0}], {}) == []


@pytest.mark.parametrize("known", [keys.PEER, keys.FLOPS], ids=["PyTorch", "FLOPs"])
def test_every_key_of_the_configuration_is_in_one_list(known):
    listed = [*known.obeyed, *known.immaterial, *known.only]
    assert sorted(listed) == sorted(FIELDS)


def test_a_key_that_nobody_has_listed_must_keep_its_default():
    known = keys.PEER._replace(obeyed=tuple(key for key in keys.PEER.obeyed if key != "margin"))
    triplet = config_of(**CONV, labelling="triplet")
    known.check(triplet)
    with pytest.raises(UserError, match=r"config\.margin=0\.5: .*use 0\.0"):
        known.check(dataclasses.replace(triplet, margin=0.5))


@pytest.mark.slow
def test_a_quick_run_writes_a_row_for_every_contender(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/throughput.py"), *TINY, "--quick", "--out", str(out)]
    command += ["--deterministic", "--torch-modes", "default"]
    # Compilers that hurry: the order of the speeds says nothing here. PyTorch's is switched off, it takes half a minute.
    hurry = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | hurry)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["contender"]: row for row in found["rows"]}
    assert [*rows, *found["missing"]] == list(contenders.CONTENDERS)
    assert not any(name in found["missing"] for name in contenders.RULES)
    assert found["deterministic"] and "--xla_gpu_deterministic_ops=true" in found["xla_flags"]
    if found["versions"]["torch"]:
        assert found["torch_deterministic"] and not found["missing"]
        assert all(how.startswith("default, ") for name in rows if name.endswith("-compiled") for how in rows[name]["tried"])
        assert all(max(round[name] for name in contenders.TORCH_BP) > 0 for round in found["rounds"])
    for name, row in rows.items():
        speeds = [speed[name] for speed in found["rounds"]]
        low, high = row["images_per_second_range"]
        assert len(speeds) == row["n"] == found["repeats"] == 2
        assert (low, high) == (min(speeds), max(speeds))
        assert 0 < low <= row["images_per_second"] <= high
        assert row["flops_per_second"] == pytest.approx(row["images_per_second"] * row["model_flops_per_image"])
        assert 0 < row["share_of_matrix_product_rate"] < 1.5
        assert row["library"] == ("torch" if name.startswith("torch") else "jax")
        if row["library"] == "jax":
            assert row["compile_seconds"] > 0 and row["peak_bytes"] > 0
        else:
            assert row["peak_bytes"] is None and "CPU" in row["peak_bytes_from"]
            assert row["optimizer"] in ("fused", "foreach") and len(row["tried"]) == 2
        assert f"| {name} | {row['images_per_second']:,.0f} |" in done.stdout
    assert found["matrix_products"]["best"] >= found["matrix_products"]["jax"] > 0
    assert found["command"] == command[2:]
    assert found["config"]["widths"] == [4, 4]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.png"]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    throughput.main()


@pytest.mark.slow
def test_without_pytorch_its_rows_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes the import raise ImportError
    monkeypatch.delitem(sys.modules, "torch_peers", raising=False)
    out = tmp_path / "speed.json"
    run_main(monkeypatch, *TINY, "--only", "bp,torch-bp", "--steps", "1", "--repeats", "1", "--quick", "--out", out)
    found = json.loads(out.read_text())
    assert [row["contender"] for row in found["rows"]] == ["bp"]
    assert found["rows"][0]["over_torch_bp"] is None
    assert "[bench]" in found["missing"]["torch-bp"]
    assert "| torch-bp | did not run: PyTorch cannot be imported" in capsys.readouterr().out


def test_the_fastest_mode_that_compiles_is_kept(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[bench]'")
    calls = []

    def fake_compile(function, mode):
        def compiled(*arguments):
            calls.append(mode)
            if mode == "broken":
                raise RuntimeError("no\ncompiler")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", fake_compile)
    work = contenders.Workload(config_of(**MLP, dataset="digits"), 2, ["broken", "working"])
    config = contenders.variant(config_of(**MLP, dataset="digits"), "torch-bp-compiled")
    contender = contenders.TorchContender(config, work, compiled=True)
    assert contender.facts["failed"] == {"broken": "RuntimeError: no compiler"}
    assert contender.facts["tried"].keys() == {"working, fused", "working, foreach"}
    assert contender.facts["mode"] == "working"
    assert contender.facts["tried"][f"working, {contender.facts['optimizer']}"] == min(contender.facts["tried"].values())
    calls.clear()
    contender.epoch()
    assert calls == ["working", "working"]

    work = contenders.Workload(config_of(**MLP, dataset="digits"), 2, ["broken"])
    with pytest.raises(contenders.Unavailable, match="no compiler"):
        contenders.TorchContender(config, work, compiled=True)
    assert contenders.Workload(config_of(**MLP, dataset="digits"), 2).compile_modes == ("default",)  # the only one of use on a CPU


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--only", "vff,nonsense"], ["--only=nonsense", "torch-bp"]),
        (["--torch-modes", "fast"], ["--torch-modes=fast", "reduce-overhead"]),
        (["--torch-modes", "default", "--only", "vff,torch-bp"], ["--torch-modes=default", "--only"]),
        (["--steps", "0"], ["--steps", "'0'", "at least 1"]),
        (["--repeats=-2"], ["--repeats", "'-2'", "at least 1"]),
        (["--steps", "few"], ["--steps", "few", "--help"]),
        (["--out", "missing/speed.json"], ["--out=missing/speed.json", "folder"]),
        (["--out", "/dev/null/speed.json"], ["--out=/dev/null/speed.json", "folder"]),
        (["--out", "speed.txt"], ["--out=speed.txt", ".json"]),
        (["--workdir", "runs/x"], ["--workdir=runs/x", "--out"]),
        (["--nonsense=1"], ["nonsense"]),
        (["--config.rule=nonsense"], ["config.rule='nonsense'", "choose one of"]),
        (["--config.schedule=sequential"], ["config.schedule='sequential'", "schedule=joint"]),
        (["--config.norm=layer"], ["config.norm='layer'", "norm=auto", "--only"]),
        (["--config.labelling=triplet", "--config.negatives=hard"], ["config.negatives='hard'", "negatives=uniform", "--only"]),
        (["--config.devices=4", "--only=vff"], ["config.devices=4", "devices=0"]),
        (["--config.data_on=host", "--only=vff"], ["config.data_on='host'", "data_on=device"]),
        (["--config.cutout=9"], ["config.cutout=9", "8-pixel images"]),
        (["--config.rule=head"], ["config.rule='head'", "leave it at vff", "--only"]),
        (["--config.frozen_groups=1"], ["config.frozen_groups=1", "bp has grouping=all", "use 0", "leave bp, torch-bp", "--only"]),
        (["--config.frozen_groups=1", "--only=vff,torch-vff"], ["config.frozen_groups=1", "PyTorch", "frozen_groups=0", "--only"]),
        (["--config.frozen_groups=3", "--only=vff"], ["config.frozen_groups=3", "2 groups"]),
        (["--config.init_from=w.safetensors"], ["config.init_from='w.safetensors'", "random weights", "leave it empty"]),
        (["--config.on_nonfinite=skip"], ["config.on_nonfinite='skip'", "PyTorch", "on_nonfinite=stop", "--only"]),
        (["--config.rematerialise=True"], ["config.rematerialise=True", "PyTorch", "rematerialise=False", "--only"]),
        (["--config.network=resnet18", "--only=vff,torch-bp"], ["config.network='resnet18'", "conv4", "--only"]),
        (["--config.network=vgg8b", "--config.image_size=32"], ["config.image_size=32", "image_size=0"]),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *TINY, "--out", "speed.json", *arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("throughput: error: ")
    assert not [part for part in parts if part not in err], err
    assert not list(tmp_path.iterdir())


def test_keys_that_only_some_contenders_obey():
    config = config_of(**CONV, overrides={"group1": {"learning_rate": 1e-4}})
    contenders.check_keys(config, ["vff", "torch-vff"])
    assert contenders.variant(config, "torch-vff").overrides == config.overrides
    with pytest.raises(UserError, match=r"config\.overrides=.*bp has grouping=all.*leave bp out by --only"):
        contenders.check_keys(config, ["vff", "bp"])
    contenders.check_keys(config_of(**CONV, rematerialise=True, frozen_groups=1), ["vff", "vff-triplet", "head"])
    frozen = config_of(**CONV, labelling="triplet", init_from="w.safetensors", norm_statistics="frozen")
    with pytest.raises(UserError, match=r"config\.norm_statistics='frozen': .*use norm_statistics=batch"):
        keys.PEER.check(frozen)
    with pytest.raises(UserError, match=r"config\.init_from="):
        contenders.check_keys(frozen, ["vff"])


def test_out_is_asked_for_and_spinning_threads_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *TINY)
    assert "--out" in capsys.readouterr().err
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *TINY, "--out", tmp_path / "speed.json")
    assert "OMP_WAIT_POLICY=active" in capsys.readouterr().err
