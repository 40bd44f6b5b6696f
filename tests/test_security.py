"""Nothing that comes from outside is executed or leads outside: no pickle, archives, folders of data, names of files."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from command_lines import CONFIG, ROOT
from image_sets import BATCHES, CIFAR_NAMES, CIFAR_URL, PER_BATCH, fake_cifar, load, put_manual
from image_sets import fails as refused
from runs import TINY, finished
from vffjax.data import load as data
from vffjax.errors import UserError, printable
from vffjax.uses import prediction

# ----------------------------------------------------------------------------------------------------------------------------------
# No pickle

# What pickle.loads asks for before it can run anything but its own opcodes.
NO_PICKLE = """
import sys

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"unpickled: {arguments}")

sys.addaudithook(refuse)
"""
WHOLE = """
from vffjax.cli.main import main
for line in [
    ["train", *{flags!r}, "--workdir={folder}/run"],
    ["evaluate", "--workdir={folder}/run"],
    ["predict", "--workdir={folder}/run", "{folder}/zero.png"],
    ["export", "--workdir={folder}/run", "--out={folder}/w.safetensors"],
    ["train", *{flags!r}, "--config.init_from={folder}/w.safetensors", "--workdir={folder}/next"],
    ["train", *{flags!r}, "--config.init_from={folder}/w.safetensors", "--workdir={folder}/next"],
]:
    try:
        main(line)
    except SystemExit as end:
        assert end.code == 0, line
print("done")
"""


def in_python(code, **variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_nothing_is_unpickled_from_training_to_training_again(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "zero.png")
    flags = [CONFIG, *(f"--config.{key}={value}" for key, value in (TINY | {"epochs": 1}).items())]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = in_python(NO_PICKLE + WHOLE.format(flags=flags, folder=tmp_path), **cache)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert (tmp_path / "next" / "summary.json").exists()


def test_the_hook_sees_a_pickle():
    done = in_python(NO_PICKLE + "import pickle, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))")
    assert "unpickled: ('fractions', 'Fraction')" in done.stderr


PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def unpickling(code, name="code"):
    """Where a module could unpickle: an import of such a library, `numpy.load` or `torch.load` that may."""
    found = []
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"{name}:{node.lineno}: {module}" for module in modules if module.partition(".")[0] in PICKLES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            call = f"{node.func.value.id}.{node.func.attr}"
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            safe = {"np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
            if call in safe and given.get(safe[call][0]) is not safe[call][1]:
                found.append(f"{name}:{node.lineno}: {call}")
    return found


def test_no_module_can_unpickle():
    files = [*(ROOT / "vffjax").rglob("*.py"), ROOT / "train.py", *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    assert len(files) > 30
    assert [line for file in files for line in unpickling(file.read_text(), file.name)] == []


UNSAFE = ["import pickle", "from dill import loads", "import os, shelve", "import marshal as m", "np.load(f)", "torch.load(f)"]
UNSAFE += ["np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=unknown)", "torch.load(f, weights_only=False)"]


@pytest.mark.parametrize("code", UNSAFE)
def test_the_search_finds_what_unpickles(code):
    assert len(unpickling(code)) == 1


@pytest.mark.parametrize(
    "code", ["np.load(f, allow_pickle=False)", "torch.load(f, weights_only=True)", "import json", "from os import path"]
)
def test_the_search_passes_what_does_not(code):
    assert unpickling(code) == []


# ----------------------------------------------------------------------------------------------------------------------------------
# Archives and prepared folders


def evil_archive(outside):
    """A cifar archive with the right files, and members that would leave the folder: by dots, by an absolute path, by links."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    files = {name: rng.integers(0, 10, PER_BATCH * 3073, np.uint8).tobytes() for name in BATCHES}
    files["batches.meta.txt"] = "\n".join(CIFAR_NAMES).encode()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:

        def add(name, content=b"evil", **link):
            entry = tarfile.TarInfo(name)
            entry.size = 0 if link else len(content)
            for key, value in link.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content))

        add("../../evil")
        add("cifar-10-batches-bin/../../../../evil")
        add(f"{outside}/evil")
        add("cifar-10-batches-bin/link", type=tarfile.SYMTYPE, linkname=str(outside))
        add("cifar-10-batches-bin/link/evil")
        add("cifar-10-batches-bin/file", type=tarfile.SYMTYPE, linkname=f"{outside}/target")
        add("cifar-10-batches-bin/file", b"overwritten")
        add("cifar-10-batches-bin/hard", type=tarfile.LNKTYPE, linkname=f"{outside}/target")
        for name, content in files.items():
            add(f"cifar-10-batches-bin/{name}", content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, monkeypatch):
    from tensorflow_datasets.image_classification import cifar

    outside, data_dir = tmp_path / "outside", tmp_path / "a" / "b" / "tfds"
    outside.mkdir()
    (outside / "target").write_text("mine")
    put_manual(monkeypatch, cifar.Cifar10, data_dir, {CIFAR_URL: evil_archive(outside)})
    try:
        data.prepare("cifar10", str(data_dir))
    except UserError as error:  # to refuse such an archive whole is as good
        assert "preparing it failed" in str(error)
    else:
        assert len(load(data_dir).test) == PER_BATCH
    assert (outside / "target").read_text() == "mine"
    assert [path.name for path in outside.iterdir()] == ["target"]
    assert [path for path in tmp_path.rglob("*") if path.name == "evil" or path.is_symlink()] == []
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["tfds"]


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    with fake_cifar(data_dir):
        return data.prepare("cifar10", str(data_dir))


CLASS = {
    "as protocol buffer": lambda plain: plain | {"pythonClassName": "planted_module.Features"},
    "as JSON": lambda _: {"type": "planted_module.Features", "content": {}},
}


@pytest.mark.parametrize("form", CLASS)
def test_a_prepared_folder_cannot_have_a_module_imported(form, cifar_folder, tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = cifar_folder / "features.json"
    sound = path.read_text()
    try:
        path.write_text(json.dumps(CLASS[form](json.loads(sound))))
        refused(lambda: load(cifar_folder.parents[1]), "planted_module", "features.json")
    finally:
        path.write_text(sound)
    assert not (tmp_path / "planted_module.ran").exists()
    assert len(load(cifar_folder.parents[1]).test) == PER_BATCH


def test_a_prepared_folder_cannot_have_a_file_outside_read(cifar_folder, tmp_path):
    folder = tmp_path / "tfds" / "cifar10" / cifar_folder.name
    shutil.copytree(cifar_folder, folder)
    assert len(load(tmp_path / "tfds").test) == PER_BATCH
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}"))
    for path in folder.glob("*.array_record-*"):
        path.rename(folder.parent / path.name)  # sound, and there
    message = refused(lambda: load(tmp_path / "tfds"), "outside its folder", f"delete {folder} and")
    assert f"delete {folder.parent} and" not in message


def test_a_folder_of_data_may_be_given_by_any_path(cifar_folder, monkeypatch, tmp_path):
    # What is refused are files outside the folder, not folders that are named in a roundabout way.
    data_dir = cifar_folder.parents[1]
    (tmp_path / "link").symlink_to(data_dir)
    monkeypatch.chdir(data_dir)
    for given in (".", f"../{data_dir.name}", f"{data_dir}/cifar10/..", tmp_path / "link"):
        assert len(load(given).test) == PER_BATCH


# ----------------------------------------------------------------------------------------------------------------------------------
# Names of files

NASTY = "\x1b[2J\x1b]0;title\x07\nvffjax: error: forged\r\x9b31m\u202edrow\u2028x"


@pytest.mark.parametrize("suffix", [".png", ".safetensors"])
def test_a_name_cannot_forge_a_second_line(suffix, call, tmp_path):
    path = tmp_path / f"a{NASTY}{suffix}"
    path.write_bytes(b"nothing")
    if suffix == ".png":
        status, out, err = call("predict", f"--workdir={finished()}", path)
    else:
        status, out, err = call("train", CONFIG, f"--config.init_from={path}", f"--workdir={tmp_path / 'run'}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err[:-1].isprintable()
    assert "forged" in err


def test_names_are_shown_safely_where_all_is_well(call, tmp_path):
    path = tmp_path / f"a{NASTY}\udcff.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(path)
    status, out, _ = call("predict", f"--workdir={finished()}", path)
    assert status == 0
    assert all(line.isprintable() for line in out.split("\n"))
    assert len(out.splitlines()) == 4  # the name, two groups, the ensemble
    # The same as JSON, whole.
    assert json.loads(call("predict", "--json", f"--workdir={finished()}", path)[1])[0]["image"] == str(path)


def test_class_names_of_a_foreign_run_are_shown_safely(call, monkeypatch, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    rank = prediction.rank
    monkeypatch.setattr(prediction, "rank", lambda p, names, top: rank(p, [NASTY + name for name in names], top))
    out = call("predict", f"--workdir={finished()}", tmp_path / "a.png")[1]
    assert "\\x1b[2J" in out
    assert all(line.isprintable() for line in out.split("\n"))
    assert len(out.splitlines()) == 4


def test_what_is_printable():
    assert printable("grün 図 a  b\n") == "grün 図 a b"
    assert printable("\x1b[0m\x00\u202e\udcff") == "\\x1b[0m\\x00\\u202e\\udcff"
    assert printable("a" * 50 + "b" * 50, 20) == "a" * 10 + " ... " + "b" * 10
