"""Code from outside of the package runs only where a person has named its folder, and what is wrong with it is said in one line."""

import dataclasses
import json
import os
import py_compile
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from command_lines import CONFIG, ROOT
from runs import TINY, copy_of, train
from vffjax import data, networks, outside, rules
from vffjax.config import Config, default_config, to_json
from vffjax.errors import UserError
from vffjax.registry import RULES
from vffjax.runs import workdir as workdirs
from vffjax.runs.origin import check_code, code_of
from vffjax.training.checks import make_config

EVIL = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\nfrom vffjax.rules.head import RULE\n"
HONEST = "from vffjax.config import default_config\ndef get_config():\n    return default_config()\n"
NAMING = HONEST.replace("return", "config =") + "    config.rule = 'mine:RULE'\n    return config\n"
RULE = "from vffjax.rules.local import Rule\nRULE = Rule()\n"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    """No test is allowed what another was."""
    monkeypatch.setattr(outside, "_folders", {})
    monkeypatch.setattr(outside, "_loaded", {})


def ran(folder):
    return list(folder.rglob("*.ran"))


# ----------------------------------------------------------------------------------------------------------------------------------
# What a workdir names does not run


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A workdir whose config.json names evil:RULE, with evil.py wherever a careless search would find it."""
    here, path, workdir = tmp_path / "here", tmp_path / "path", tmp_path / "parent" / "run"
    for folder in (here, path, workdir):
        folder.mkdir(parents=True)
    for folder in (here, path, workdir, workdir.parent):
        (folder / "evil.py").write_text(EVIL)
    (here / "honest.py").write_text(HONEST)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "image.png")
    (workdir / "config.json").write_text(json.dumps(to_json(Config()) | {"rule": "evil:RULE"}))
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(path))
    return workdir


USES = {
    "evaluate": ["evaluate", "--workdir={run}"],
    "predict": ["predict", "--workdir={run}", "image.png"],
    "export": ["export", "--workdir={run}", "--out=weights.safetensors"],
    "export a group": ["export", "--workdir={run}", "--group=0", "--out=weights.safetensors"],
    "reproduce": ["reproduce", "{run}"],
    "train": ["train", CONFIG, "--workdir={run}"],
    "train by a configuration beside evil.py": ["train", "--config=honest.py", "--workdir={run}"],
}


@pytest.mark.parametrize("use", USES)
def test_no_command_runs_what_a_workdir_names(use, planted, fails, tmp_path):
    fails(
        *(word.format(run=planted) for word in USES[use]),
        parts=["config.json: config.rule='evil:RULE'", "evil.py is code from outside", "--code"],
    )
    assert ran(tmp_path) == []


def test_nor_does_python(planted, tmp_path):
    for read in (workdirs.load_run, lambda workdir: workdirs.load_group(workdir, 0), workdirs.read_config):
        with pytest.raises(UserError, match=r"evil\.py is code from outside"):
            read(planted)
    assert ran(tmp_path) == []


def test_a_configuration_that_names_one_module_allows_no_other(planted, fails, tmp_path):
    (tmp_path / "here" / "naming.py").write_text(NAMING)
    (tmp_path / "here" / "mine.py").write_text(RULE)
    fails("train", "--config=naming.py", f"--workdir={planted}", parts=["config.rule='evil:RULE'"])
    assert ran(tmp_path) == []


def test_the_hook_of_these_tests_sees_what_runs(planted, call, tmp_path):
    assert call("evaluate", f"--workdir={planted}", f"--code={tmp_path / 'here'}")[0] == 2  # nothing has been trained there
    assert ran(tmp_path) == [tmp_path / "here" / "evil.ran"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "vffjax"], [str(ROOT / "train.py")]], ids=["python -m vffjax", "train.py"])
def test_nor_does_a_process_whose_path_begins_where_it_lies(start, planted, tmp_path):
    words = ["evaluate", f"--workdir={planted}"] if start[0] == "-m" else ["--config=honest.py", f"--workdir={planted}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(ROOT)])}
    done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "evil.py is code from outside" in done.stderr
    assert ran(tmp_path) == []


@pytest.mark.slow
def test_what_only_a_checkpoint_names_does_not_run_either(tmp_path, call, fails):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "evil.py").write_text(EVIL)
    outside.allow(tmp_path / "code")
    changes = TINY | {"train_examples": 40, "batch_size": 8, "widths": (8, 4), "epochs": 1, "rule": "evil:RULE"}
    train(make_config(changes), tmp_path / "trained")
    outside._folders.clear()
    workdir = copy_of(tmp_path / "trained", tmp_path)
    for folder in (workdir, workdir.parent):
        (folder / "evil.py").write_text(EVIL)
    (tmp_path / "code" / "evil.ran").unlink()
    config = json.loads((workdir / "config.json").read_text()) | {"rule": "head"}
    (workdir / "config.json").write_text(json.dumps(config))
    flags = [f"--config.{key}={value}" for key, value in (changes | {"rule": "head"}).items()]
    status, out, err = call("train", CONFIG, "--config.checkpoint_every=1", *flags, f"--workdir={workdir}")
    assert (status, out) == (2, "")
    assert "checkpoints/1: foreign checkpoint: config.rule='evil:RULE': evil.py is code from outside" in err.splitlines()[-1]
    fails("evaluate", f"--workdir={workdir}", parts=["evil.py: not the code by which the run began"])
    assert ran(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------------------
# Names and files that are refused


NAMES = [
    "evil.part:RULE",
    "../evil:RULE",
    "/tmp/evil:RULE",
    "evil:RULE.x",
    "evil:",
    ":RULE",
    "evil:RULE:x",
    "evil.py:RULE",
    "évil:RULE",
    "evil:RULE\u2028",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_module_and_an_object_of_it(name, tmp_path):
    (tmp_path / "evil.py").write_text(EVIL)
    outside.allow(tmp_path)
    with pytest.raises(UserError, match=r"config\.rule=.*not of the form MODULE:NAME"):
        RULES.find(name)
    assert ran(tmp_path) == []


def test_a_control_character_in_a_name(tmp_path):
    with pytest.raises(UserError, match=r"config\.rule=.*control character"):
        make_config({"rule": "evil:RULE\n"})


def test_a_link_out_of_the_folder_and_a_package(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for made in (elsewhere, folder / "evil"):
        made.mkdir(parents=True)
    (elsewhere / "linked.py").write_text(EVIL)
    (folder / "linked.py").symlink_to(elsewhere / "linked.py")
    (folder / "evil" / "__init__.py").write_text(EVIL)
    outside.allow(folder)
    with pytest.raises(UserError, match=r"config\.rule='linked:RULE': .*linked\.py is a link that leads out of its folder"):
        RULES.find("linked:RULE")
    with pytest.raises(UserError, match=r"config\.rule='evil:RULE': there is no evil\.py in .*folder; put it there"):
        RULES.find("evil:RULE")
    assert ran(tmp_path) == []


def test_a_folder_that_is_itself_a_link_may_be_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").write_text(RULE)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    outside.allow(tmp_path / "link")
    assert isinstance(RULES.find("mine:RULE"), rules.Rule)


def test_code_takes_a_folder(fails, tmp_path):
    fails("evaluate", f"--workdir={tmp_path}", f"--code={tmp_path / 'none'}", parts=["--code", "none", "is no folder"])


FAULTS = {
    "syntax": ("RULE = (\n", "line 1: SyntaxError"),
    "an exception": ("\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    "an exception in a function": ("def f():\n    raise OSError(5, 'no disk')\n\nf()\n", "line 2: OSError: [Errno 5] no disk"),
    "the end of Python": ("import sys\nsys.exit('enough')\n", "line 2: SystemExit: enough"),
    "a missing module": ("import no_such_module_anywhere\n", "line 1: ModuleNotFoundError"),
    "a fault of the package's own": ("from vffjax.errors import UserError\nraise UserError('two\\nlines')\n", "line 2: UserError: two;"),
    "an error that cannot be shown": ("class E(Exception):\n    __str__ = None\nraise E\n", "line 3: E: without a message"),
    "JSON": ("import json\n\n\njson.loads('{')\n", "line 4: JSONDecodeError"),
    "a null byte": ("RULE = 1\0\n", "Error: source code"),
    "another object": ("\nRULE = 7\n", "RULE in {file} is of type int; make it a vffjax.rules.local.Rule"),
    "no object": ("OTHER = 7\n", "{file} has no RULE; define RULE there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_module_is_one_line(fault, fails, tmp_path):
    content, problem = FAULTS[fault]
    file = tmp_path / "mine.py"
    file.write_text(content)
    (tmp_path / "naming.py").write_text(NAMING)
    fails(
        "train",
        f"--config={tmp_path / 'naming.py'}",
        f"--workdir={tmp_path / 'run'}",
        parts=["config.rule='mine:RULE': ", str(file), problem.format(file=file)],
    )
    assert not (tmp_path / "run").exists()
    assert not [name for name in sys.modules if name.startswith("_vffjax_outside")]


@pytest.mark.parametrize("content, problem", [("1 / 0\n", "line 1: ZeroDivisionError"), ("a = (\n", "line 1: SyntaxError")])
def test_a_fault_of_a_module_beside_it_is_found_there(content, problem, fails, tmp_path):
    (tmp_path / "mine.py").write_text("\n\n\nimport part\n")
    (tmp_path / "part.py").write_text(content)
    (tmp_path / "naming.py").write_text(NAMING)
    fails("train", f"--config={tmp_path / 'naming.py'}", parts=["config.rule='mine:RULE': ", f"{tmp_path / 'part.py'}, {problem}"])


@pytest.mark.parametrize(
    "room, key, needed", [(networks, "network", "vffjax.networks.network.Network"), (data, "dataset", "vffjax.data.sets.Source")]
)
def test_a_rule_is_no_network_and_no_source(room, key, needed, tmp_path):
    (tmp_path / "mine.py").write_text(RULE)
    outside.allow(tmp_path)
    with pytest.raises(UserError, match=rf"config\.{key}='mine:RULE': RULE in .*mine\.py is of type Rule; make it a {needed}"):
        room.find(dataclasses.replace(Config(), **{key: "mine:RULE"}))


BAD_OPTIONS = {
    "no dataclass": "class Options:\n    scale = 1.0\n",
    "a field without key": "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Options:\n    scale: float = 1.0\n",
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_options_are_declared_as_keys_are(kind, tmp_path):
    (tmp_path / "mine.py").write_text(BAD_OPTIONS[kind] + "from vffjax.rules.local import Rule\nRULE = Rule(options=Options)\n")
    outside.allow(tmp_path)
    with pytest.raises(UserError, match=r"config\.rule_options=.*Options.* is no dataclass of fields that vffjax\.keys\.key declares"):
        make_config({"rule": "mine:RULE"})


# ----------------------------------------------------------------------------------------------------------------------------------
# Which code it is


PART = "from vffjax.rules.local import Rule\nNORM = {!r}\n"
WITH_PARTS = (
    "from vffjax.rules.local import Rule\nimport part\nfrom pack import inner\nfrom space import far\nRULE = Rule(norm=part.NORM)\n"
)


@pytest.fixture
def several(tmp_path):
    """A rule that imports a module, a package and a package without __init__.py from its folder."""
    for folder in ("pack", "space"):
        (tmp_path / folder).mkdir()
    files = {"mine.py": WITH_PARTS, "part.py": PART.format("batch"), "pack/__init__.py": "", "pack/inner.py": "", "space/far.py": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    outside.allow(tmp_path)
    return tmp_path


CODE = {"mine.py", "part.py", "pack/__init__.py", "pack/inner.py", "space/far.py"}


def test_every_file_that_was_run_has_its_digest(several):
    modules = set(sys.modules)
    found = code_of(make_config({"rule": "mine:RULE"}))
    assert set(found) == CODE
    assert all(outside._digest(several / name) == digest for name, digest in found.items())
    assert not {"part", "pack", "pack.inner", "space", "space.far"} & (set(sys.modules) - modules)
    assert not [path for path in several.rglob("*") if path.suffix == ".pyc"]


def test_files_of_one_name_in_two_folders_both_count(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("import helper\nRULE = SOURCE = helper.VALUE\n")
        (tmp_path / name / "helper.py").write_text(f"VALUE = {name!r}\n")
    seen = []
    for changed in ("", "first", "second"):
        if changed:
            (tmp_path / changed / "helper.py").write_text("VALUE = 'changed'\n")
        for name in ("first", "second"):
            outside.allow(tmp_path / name)
        found = outside.sha256({"rule": "first:RULE", "dataset": "second:SOURCE"})
        assert set(found) == {"first.py", "second.py", "helper.py"}
        seen.append(found["helper.py"])
    assert len(set(seen)) == 3


@pytest.mark.parametrize("file", sorted(CODE))
def test_other_code_is_refused_and_restored_code_is_taken(file, several):
    config = make_config({"rule": "mine:RULE"})
    run = {"code_sha256": code_of(config)}
    sound = (several / file).read_text()
    (several / file).write_text(sound + "# changed\n")
    check_code(run, config)  # what runs in this process is still the code by which it began
    outside.allow(several)
    with pytest.raises(
        UserError, match=rf"^{file}: not the code by which the run began \(other SHA-256\); restore it, or start in a new --workdir$"
    ):
        check_code(run, config)
    (several / file).write_text(sound)
    outside.allow(several)
    check_code(run, config)


def test_code_that_has_not_changed_is_not_run_again(several):
    first = RULES.find("mine:RULE")
    outside.allow(several)
    assert RULES.find("mine:RULE") is first
    (several / "part.py").write_text(PART.format("layer"))
    assert RULES.find("mine:RULE") is first  # a run that trains is not disturbed by an editor
    outside.allow(several)
    assert RULES.find("mine:RULE").norm == "layer"


def test_byte_code_is_not_run_in_place_of_the_source(several):
    """Of another program, but with the time and the size of this one."""
    source = several / "part.py"
    source.write_text(PART.format("layer"))
    py_compile.compile(str(source), doraise=True)
    stat = source.stat()
    source.write_text(PART.format("input"))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert RULES.find("mine:RULE").norm == "input"


def test_a_module_that_this_process_has_already_is_run_again_for_a_rule_and_then_put_back(several, monkeypatch):
    """Otherwise its digest would be unknown, and the run could not be continued by another process."""
    monkeypatch.syspath_prepend(str(several))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import part

    try:
        assert set(code_of(make_config({"rule": "mine:RULE"}))) == CODE
        assert sys.modules["part"] is part
    finally:
        del sys.modules["part"]


def test_a_folder_does_not_hide_a_library_of_its_name(tmp_path):
    """A folder without __init__.py is no package where Python finds a real one."""
    (tmp_path / "wandb_like").mkdir()
    site = tmp_path / "site"
    (site / "wandb_like").mkdir(parents=True)
    (site / "wandb_like" / "__init__.py").write_text("NORM = 'layer'\n")
    imports = f"import sys\nsys.path.append({str(site)!r})\nimport wandb_like\nfrom vffjax.rules.local import Rule\n"
    (tmp_path / "mine.py").write_text(imports + "RULE = Rule(norm=wandb_like.NORM)\n")
    outside.allow(tmp_path)
    try:
        assert RULES.find("mine:RULE").norm == "layer"
        assert set(outside.sha256({"rule": "mine:RULE"})) == {"mine.py"}
    finally:
        sys.modules.pop("wandb_like", None)


class Odd(types.ModuleType):
    """A module that answers every question with an error, as libraries do that load themselves late."""

    def __getattr__(self, name):
        raise RuntimeError(f"asked for {name}")


def test_modules_that_may_not_be_asked_are_left_alone(several, monkeypatch):
    monkeypatch.setitem(sys.modules, "odd_module", Odd("odd_module"))
    monkeypatch.setitem(sys.modules, "absent_module", None)
    assert set(code_of(make_config({"rule": "mine:RULE"}))) == CODE


def test_the_folder_that_was_named_last_is_searched_first(tmp_path):
    for norm in ("batch", "layer"):
        (tmp_path / norm).mkdir()
        (tmp_path / norm / "mine.py").write_text(RULE.replace("Rule()", f"Rule(norm={norm!r})"))
        outside.allow(tmp_path / norm)
    assert RULES.find("mine:RULE").norm == "layer"
    outside.allow(tmp_path / "batch")
    assert RULES.find("mine:RULE").norm == "batch"


def test_default_config_takes_a_name_from_outside():
    config = default_config()
    config.rule = "mine:RULE"
    with pytest.raises(UserError, match=r"mine\.py is code from outside of vffjax, and nobody who may has said where it lies"):
        make_config(config)
