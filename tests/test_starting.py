"""How the commands are started, and configuration files as the Python modules that they are."""

import importlib.metadata
import sys

import pytest

from command_lines import ROOT, in_a_process
from vffjax import outside
from vffjax.cli import main as cli
from vffjax.cli.config_file import load_config_file

VERSION = f"vffjax {importlib.metadata.version('vffjax')}\n"


def test_python_m_is_the_command():
    done = in_a_process("-m", "vffjax", "train")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: vffjax train --config NAME|FILE")
    done = in_a_process("-m", "vffjax", "nothing")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("argument", ["--version", "version", "-V"])
def test_the_version(argument, call):
    assert call(argument) == (0, VERSION, "")


def test_the_version_of_a_checkout_that_is_not_installed(call, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.importlib.metadata, "version", missing)
    assert call("version") == (0, "vffjax 0.2.0\n", "")


def test_version_takes_no_arguments(fails):
    fails("version", "now", parts=["'now'", "vffjax version takes no arguments"])


# --- configuration files


BODY = "\ndef get_config():\n    c = default_config()\n    c.epochs = {}\n    return c\n"
HEAD = "from __future__ import annotations\nfrom vffjax.config import default_config\n"
DATACLASS = "import dataclasses\n@dataclasses.dataclass\nclass Mine:\n    epochs: int = 7\n"


def test_a_file_with_annotations_and_a_dataclass(tmp_path):
    (tmp_path / "c.py").write_text(HEAD + DATACLASS + BODY.format("Mine().epochs"))
    assert load_config_file(str(tmp_path / "c.py"))[0]["epochs"] == 7


@pytest.fixture
def two_folders(tmp_path):
    for folder, epochs in (("one", 3), ("two", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_part.py").write_text(f"EPOCHS = {epochs}\n")
        (tmp_path / folder / "c.py").write_text(HEAD + "import shared_part\n" + BODY.format("shared_part.EPOCHS"))
    return tmp_path


def test_each_file_gets_its_own_neighbour_and_leaves_nothing(two_folders, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before, modules = list(sys.path), set(sys.modules)
    assert [load_config_file(str(two_folders / folder / "c.py"))[0]["epochs"] for folder in ("one", "two", "one")] == [3, 4, 3]
    assert sys.path == before
    assert set(sys.modules) == modules
    assert not list(two_folders.rglob("__pycache__"))


def test_a_neighbour_of_a_relative_path_that_get_config_imports(two_folders, monkeypatch):
    monkeypatch.chdir(two_folders / "two")
    late = BODY.replace("    c =", "    import shared_part\n    c =").format("shared_part.EPOCHS")
    (two_folders / "two" / "late.py").write_text(HEAD + late)
    assert load_config_file("late.py")[0]["epochs"] == 4
    assert "shared_part" not in sys.modules


def test_what_fails_leaves_nothing_either(two_folders, fails):
    (two_folders / "one" / "bad.py").write_text("import shared_part\n1 / 0\n")
    given = f"--config={two_folders / 'one' / 'bad.py'}"
    fails("train", given, parts=["line 2: ZeroDivisionError"])  # once before, for what this package itself imports late
    before, modules = list(sys.path), set(sys.modules)
    fails("train", given, parts=["line 2: ZeroDivisionError"])
    assert (sys.path, set(sys.modules) - modules) == (before, set())


def test_modules_of_this_package_are_no_neighbours_of_a_file_in_the_root_of_the_checkout():
    assert not outside._Beside(str(ROOT)).holds("vffjax.config")
    assert outside._Beside(str(ROOT / "tests")).holds("command_lines")
    assert not outside._Beside(str(ROOT / "test")).holds("command_lines")


def test_what_a_virtual_environment_below_the_folder_holds_is_no_neighbour(tmp_path, monkeypatch):
    """To import JAX a second time, for example, would end the process."""
    site = tmp_path / ".venv" / "lib" / "site-packages"
    (site / "kept_package").mkdir(parents=True)
    (site / "kept_package" / "__init__.py").write_text("from kept_package import part\n")
    (site / "kept_package" / "part.py").write_text("")
    (tmp_path / "near_package").mkdir()
    (tmp_path / "near_package" / "__init__.py").write_text("from near_package import part\n")
    (tmp_path / "near_package" / "part.py").write_text("")
    (tmp_path / "c.py").write_text(HEAD + "import kept_package, near_package\n" + BODY.format(3))
    monkeypatch.syspath_prepend(str(site))
    try:
        load_config_file(str(tmp_path / "c.py"))
        assert {"kept_package", "kept_package.part"} <= set(sys.modules)
        assert not {"near_package", "near_package.part"} & set(sys.modules)
    finally:
        for name in ("kept_package", "kept_package.part"):
            sys.modules.pop(name, None)
