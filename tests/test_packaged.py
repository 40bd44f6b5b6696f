"""The configurations that come with vffjax: in the wheel, by name, and with errors that agree with the ledger."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from command_lines import ROOT
from vffjax import outside
from vffjax.cli import packaged
from vffjax.cli.config_file import load_config_file, running
from vffjax.cli.flags import parse_train
from vffjax.config import converted
from vffjax.errors import UserError
from vffjax.training.checks import make_config

# The configuration keys by which the rows of MEASURED differ from the variant that they stand under.
DIFFERS = {"rule", "grouping", "auxiliary", "head_weight", "seed", "data_dir"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel, by name, as hatchling builds it from a copy of what it reads."""
    pytest.importorskip("hatchling")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("vffjax", "configs"):
        # Other processes write and rename files of __pycache__ meanwhile.
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_the_configurations_and_nothing_else(wheel):
    files = [path for kind in ("*.py", "*.html", "*.txtpb") for path in (ROOT / "vffjax").rglob(kind)]
    here = {f"vffjax/{path.relative_to(ROOT / 'vffjax').as_posix()}": path for path in files}
    here |= {f"vffjax/configs/{path.name}": path for path in (ROOT / "configs").glob("*.py")}
    packed = {name: content for name, content in wheel.items() if not name.startswith("vffjax-")}
    assert packed == {name: path.read_bytes() for name, path in here.items()}


def test_an_installed_package_finds_its_configurations_inside(wheel, tmp_path):
    for name, content in wheel.items():
        path = tmp_path / "installed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    code = "from vffjax.cli import packaged; print(packaged.folder()); from vffjax.cli.flags import parse_train\n"
    code += "config, name, _ = parse_train(['--config', 'cifar10:small']); print(name, config.epochs)"
    (tmp_path / "empty").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{tmp_path / 'installed' / 'vffjax' / 'configs'}\ncifar10-small 6\n", done.stderr
    assert not list((tmp_path / "empty").iterdir())


def test_a_name_means_the_file_that_comes_with_vffjax_and_a_file_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = "from vffjax.config import default_config\ndef get_config():\n    c = default_config()\n    c.epochs = 77\n    return c\n"
    for name in ("digits", "digits.py"):
        (tmp_path / name).write_text(mine)
    assert load_config_file("digits")[0]["epochs"] == 30
    assert load_config_file("digits.py")[0]["epochs"] == load_config_file("./digits")[0]["epochs"] == 77
    assert load_config_file("cifar10:small") == load_config_file(f"{ROOT}/configs/cifar10.py:small")
    (tmp_path / "mine").write_text(mine)
    with pytest.raises(UserError, match=r"--config=mine: no configuration of this name .*; for your file mine give \./mine"):
        load_config_file("mine")


def test_code_of_ones_own_goes_with_a_name_if_its_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "_folders", {})
    (tmp_path / "mine.py").write_text("from vffjax.rules.head import RULE\n")
    given = ["--config=digits", "--config.rule=mine:RULE"]
    with pytest.raises(UserError, match="nobody who may has said where it lies"):
        outside.sha256({"rule": parse_train(given)[0].rule})
    assert list(outside.sha256({"rule": parse_train([*given, f"--code={tmp_path}"])[0].rule})) == ["mine.py"]


def test_the_command_lists_what_each_configuration_trains_and_its_errors(call):
    status, out, err = call("configs")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    listed = [variant for about in json.loads(call("configs", "--json")[1]) for variant in about["variants"]]
    assert {name.partition(":")[0] for name in (variant["name"] for variant in listed)} == set(packaged.names())
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(packaged.names())
    for variant in listed:
        config = converted(load_config_file(variant["name"])[0])
        assert variant["trains"]["epochs"] == config.epochs
        assert re.search(rf"^  {variant['name']}\n      {config.network} ", out, re.MULTILINE)
        # A run that is read later needs no code from beside the configuration.
        assert not any(outside.is_outside(getattr(config, key)) for key in ("rule", "network", "dataset"))
    small = next(variant for variant in listed if variant["name"] == "cifar10:small")
    (by_vff,) = [error for error in small["measured"] if error["by"] == "vff"]
    assert by_vff.items() >= {"n": 3, "source": "results/cifar10-small-vff"}.items()
    assert f"      test error {by_vff['test_error']} ± {by_vff['sd']} % (n = 3) by vff\n" in out


def rows():
    """Each measured error that names a record, with the configuration that it stands under."""
    for name in packaged.names():
        with running(name) as loaded:
            measured = getattr(loaded.module, "MEASURED", {})
            for variant, errors in ({None: measured} if loaded.variants is None else measured).items():
                for by, text in errors.items():
                    if source := re.search(r"results/[\w.-]+", text):
                        yield f"{name}:{variant} by {by}", loaded.config(variant), source[0]


@pytest.mark.parametrize(("row", "config", "source"), [pytest.param(*row, id=row[0]) for row in rows()])
def test_an_error_is_of_the_configuration_that_it_stands_under(row, config, source):
    # That the figure is the record's is checked by benchmarks/tables.py.
    # Keys that are younger than the record had the defaults.
    record = sorted(ROOT.glob(f"{source}-s[0-9]*.json"))[0]
    recorded = converted({}).to_dict() | json.loads(record.read_text())["config"]
    here, by = converted(config).to_dict(), row.rpartition(" by ")[2]
    # The options of another rule are other ones, and have their defaults.
    here["rule_options"] = make_config({"rule": recorded["rule"]}).to_dict()["rule_options"]
    assert {key for key, value in recorded.items() if value != here[key]} <= DIFFERS
    assert recorded["rule"] == ("head" if by == "back-propagation" else by)  # any other row is named by its rule
    assert (recorded["grouping"] == "all") == (by == "back-propagation")


def test_an_error_that_is_not_written_as_one_is_refused(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(packaged, "folder", lambda: pathlib.Path(tmp_path))
    text = (ROOT / "configs" / "digits.py").read_text()
    (tmp_path / "digits.py").write_text(text.replace("1.7 ± 0.6 %", "about 2 %"))
    fails("configs", parts=["--config=digits: MEASURED: 'about 2 % (n = 3", "write for example"])
