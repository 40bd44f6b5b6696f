"""Bad input to every command: status 2, one line that names what is wrong and the fix, at once, and nothing is lost or made."""

import gc
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import safetensors.numpy

from command_lines import CONFIG, ROOT, TINY_FLAGS, in_a_process
from image_sets import CIFAR_NAMES, fake_cifar, tar_gz
from oracles import slow_but
from runs import contents, copy_of, finished, tiny
from test_tfds_files import edit_info, example, flip_byte, to_tfrecord, truncate_shard
from vffjax import backend
from vffjax.data import load as data
from vffjax.runs import experiment

HEAD = "from vffjax.config import default_config\nimport ml_collections\nimport sys\n"
ENDLESS = "9" * 5_000
CIFAR = "--config.dataset=cifar10"
CIFAR_CONFIG = CONFIG.replace("digits", "cifar10")


class Place:
    """An empty folder `cwd` that the command runs in, and what lies beside it."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "cwd").mkdir()

    def file(self, name, content=b""):
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, text, variant=""):
        return f"--config={self.file('bad.py', text)}{variant}"

    def run(self, hurt=None):
        """A finished run, damaged."""
        workdir = copy_of(finished(), self.folder)
        if hurt:
            hurt(workdir)
        return f"--workdir={workdir}"

    def cifar(self, hurt):
        """A small cifar10, damaged, as TFDS flags."""
        data_dir = self.folder / "tfds"
        folder = data_dir / "cifar10" / "3.0.2"
        folder.mkdir(parents=True)
        for name, (content, _) in prepared().items():
            (folder / name).write_bytes(content)
        hurt(folder)
        return [CIFAR, f"--config.data_dir={data_dir}"]

    def everything(self):
        return contents(self.folder), sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))


_PREPARED = {}


def prepared():
    """The files of a small cifar10."""
    return _PREPARED


@pytest.fixture(scope="module", autouse=True)
def _warmed_up(tmp_path_factory):
    """What is imported once, and made once, is not timed."""
    import vffjax.costs.memory
    import vffjax.proofs.locality
    import vffjax.uses.prediction
    import vffjax.uses.reproduction  # noqa: F401

    backend.start()
    finished()
    folder = tmp_path_factory.mktemp("tfds")
    with fake_cifar(folder):
        _PREPARED.update(contents(data.prepare("cifar10", str(folder))))


def train(*flags):
    return lambda _: ["train", CONFIG, *flags]


def config(text, *flags, variant=""):
    return lambda place: ["train", place.config(text, variant), *flags]


def body(*lines, flags=()):
    """A configuration file whose get_config changes the default `c` by some lines."""
    return config(
        HEAD + "def get_config():\n    c = default_config()\n" + "".join(f"    {line}\n" for line in lines) + "    return c\n", *flags
    )


def cifar(hurt):
    return lambda place: ["train", CONFIG, *place.cifar(hurt)]


def workdir(command, hurt, *rest):
    return lambda place: [command, place.run(hurt), *rest]


def predict(name, content):
    return lambda place: ["predict", f"--workdir={finished()}", place.file(name, content)]


def start(content, name="w.safetensors"):
    """Training from a weight file."""
    return lambda place: ["train", *TINY_FLAGS, f"--workdir={place.folder / 'new'}", f"--config.init_from={place.file(name, content)}"]


def export_to_a_folder(place):
    (place.folder / "cwd" / "e.stablehlo").mkdir()
    return ["export", f"--workdir={finished()}", "--out=e.stablehlo"]


def curve_over_a_run(name):
    def over(place):
        workdir = place.run().partition("=")[2]
        return ["evaluate", f"--workdir={workdir}", "--inference=early_exit", f"--curve={workdir}/{name}"]

    return over


def picture_is_a_folder(place):
    (place.folder / "cwd" / "c.png").mkdir()
    return ["evaluate", f"--workdir={finished()}", "--inference=early_exit", "--curve=c.json"]


def of(command, *rest):
    return lambda _: [command, *rest]


def on_run(command, *rest):
    return lambda _: [command, f"--workdir={finished()}", *rest]


# ----------------------------------------------------------------------------------------------------------------------------------
# Flags of train, and what they set

FLAGS = {
    "no command": (of("trian"), ["COMMAND=trian", "evaluate, export, list, locality"]),
    "a command of two lines": (of("a\nvffjax: error: b"), ["COMMAND=a vffjax: error: b", "choose one of"]),
    "no --config": (of("train", "--workdir=runs/x"), ["--config: missing", "configs/digits.py"]),
    "--config without a value": (of("train", "--config"), ["--config: missing"]),
    "a stray argument": (train("stray"), ["'stray'", "--config.KEY=VALUE"]),
    "an argument behind --": (train("--", "stray"), ["'--'", "--config.KEY=VALUE"]),
    "an unknown flag": (train("--wordir=x"), ["wordir", "workdir"]),
    "a flag of absl that hides others": (train("--undefok=wordir", "--wordir=x"), ["'--undefok=wordir': not known", "give --config FILE"]),
    "a file of flags": (train("--flagfile=/dev/zero"), ["'--flagfile=/dev/zero': not known", "give --config FILE"]),
    "an unknown key": (train("--config.epoch=3"), ["config.epoch='3'", "did you mean config.epochs?"]),
    "an unknown key, apart": (train("--config.epoch", "3"), ["config.epoch='3'", "did you mean config.epochs?"]),
    "a word for a number": (train("--config.epochs=many"), ["config.epochs='many'", "such as 10"]),
    "a fraction for a number": (train("--config.seed=1.5"), ["config.seed='1.5'", "such as 0"]),
    "no value": (train("--config.epochs"), ["config.epochs=''"]),
    "an empty value": (train("--config.epochs="), ["config.epochs=''", "such as 10"]),
    "a word for a truth": (train("--config.flip=maybe"), ["config.flip='maybe'", "such as False"]),
    "a value for no": (train("--noconfig.flip=1"), ["'--noconfig.flip=1': not known", "--config.KEY=VALUE"]),
    "no number": (train("--noconfig.epochs"), ["'--noconfig.epochs': not known", "--config.KEY=VALUE"]),
    "a key of a number": (train("--config.epochs.often=1"), ["config.epochs.often='1'", "no entries", "--config.epochs='10'"]),
    "a key of no key": (train("--config.epoch.often=1"), ["config.epoch='1'", "did you mean config.epochs?"]),
    "a key of no group": (train("--config.overrides.head.momentum=1"), ["config.overrides.head={'momentum': 1}", "name groups group0"]),
    "an entry of no name": (train("--config.overrides.=1"), ["config.overrides.=1", "name groups group0"]),
    "an entry that is not known": (train("--config.overrides.group0.epochs=1"), ["config.overrides.group0.epochs=1", "use one of"]),
    "a word in an entry": (train("--config.overrides.group0.momentum=fast"), ["config.overrides.group0.momentum='fast'", "type float"]),
    "an entry nested deeply": (train("--config.overrides.group0.momentum=" + "(" * 10**5), ["momentum='(((", "type float"]),
    "an entry of an entry": (
        train("--config.overrides.group0.momentum=1", "--config.overrides.group0.momentum.deep.er=1"),
        ["config.overrides.group0.momentum.deep.er='1'", "config.overrides.group0.momentum.deep is not a dictionary"],
    ),
    "an unknown data set": (train("--config.dataset=digit"), ["config.dataset='digit'", "did you mean 'digits'?", "cifar10"]),
    "an empty choice": (train("--config.rule="), ["config.rule=''", "choose one of cwc, deeper_forward"]),
    "a choice with a ligature": (train("--config.rule=vﬀ"), ["config.rule='vﬀ'", "choose one of cwc, deeper_forward"]),
    "a choice of two lines": (train("--config.rule=a\nvffjax: error: b"), ["config.rule='a\\nvffjax: error: b'", "control character"]),
    "a choice that colours": (train("--config.rule=\x1b[31mred"), ["config.rule='\\x1b[31mred'", "control character"]),
    "a choice that is no text": (train("--config.rule=\udcff"), ["config.rule='\\udcff'", "choose one of"]),
    "a choice of 100,000 letters": (
        train("--config.rule=" + "x" * 10**5),
        ["config.rule='xxx", " ... ", "choose one of cwc, deeper_forward"],
    ),
    "a negative temperature": (train("--config.temperature=-1"), ["config.temperature=-1.0", "the least is 0.0001"]),
    "a rate that is no number": (train("--config.learning_rate=nan"), ["config.learning_rate=nan", "finite"]),
    "a rate beyond floats": (train("--config.learning_rate=1e999"), ["config.learning_rate=inf", "finite"]),
    "a rate beyond float32": (train("--config.learning_rate=1e39"), ["config.learning_rate=1e+39", "the most is 1000000.0"]),
    "a seed beyond 32 bits": (train(f"--config.seed={2**31}"), ["config.seed=2147483648", "the most is 2147483647"]),
    "a seed of 5,000 digits": (train(f"--config.seed={ENDLESS}"), ["config.seed='999", "such as 0"]),
    "a width of 0": (train("--config.widths=(0,4,4,4)"), ["config.widths=(0, 4, 4, 4)", "at least one"]),
    "a width beyond memory": (train(f"--config.widths=({10**30},4,4,4)"), [f"config.widths=({10**30}, 4, 4, 4)", "at most 65536"]),
    "a network beyond memory": (
        train("--config.widths=(65536,8192,65536,8192)"),
        ["config.widths=(65536, 8192, 65536, 8192)", "layer 1 would have 4831838208 parameters", "use smaller widths"],
    ),
    "states beyond memory": (
        train("--config.network=conv", f"--config.widths=({'14000,' * 200})", f"--config.pools=({'1,' * 200})"),
        ["config.widths=(14000, 14000", "config.batch_size=64", "GB at the least", "lower them"],
    ),
    "a step beyond memory": (
        train("--config.dataset=synthetic", "--config.widths=(65536,1,1,1)", "--config.copies_per_class=10000"),
        ["config.copies_per_class=10000", "GB at the least", "lower them"],
    ),
    "a million layers": (
        train("--config.network=mlp", f"--config.widths=({'1,' * 10**5})"),
        ["config.widths=(1, 1, 1", "at most 1000 widths"],
    ),
    "too few widths": (train("--config.widths=(4,4,4)"), ["config.widths=(4, 4, 4)", "give 4 widths"]),
    "a width for widths": (train("--config.widths=16"), ["config.widths=(16,)", "give 4 widths"]),
    "a word for widths": (train("--config.widths=wide"), ["config.widths=('wide',)", "give for example"]),
    "a sum for widths": (train("--config.widths=(10**3,)"), ["config.widths=('(10**3,)',)", "give for example"]),
    "no widths": (train("--config.widths=()"), ["config.widths=()", "give for example"]),
    "negative pools": (train("--config.pools=(-1,1,1,1)"), ["config.pools=(-1, 1, 1, 1)", "windows of at least 1"]),
    "pools that leave nothing": (train("--config.pools=(4,4,1,1)"), ["config.pools=(4, 4, 1, 1)", "smaller"]),
    "pools beyond any image": (train(f"--config.pools=({10**30},1,1,1)"), ["config.pools=(1000000", "smaller windows"]),
    "a sweep for rule head": (train("--config.inference=sweep", "--config.rule=head"), ["config.inference='sweep'", "inference=heads"]),
    "a batch larger than the data": (train("--config.batch_size=9999"), ["config.batch_size=9999", "use at most 1293"]),
    "a batch beyond memory": (train(f"--config.batch_size={2**40}"), [f"config.batch_size={2**40}", "the most is 1048576"]),
    "an evaluation beyond memory": (train(f"--config.eval_batch_size={2**40}"), [f"config.eval_batch_size={2**40}", "the most is"]),
    "copies beyond memory": (train(f"--config.copies_per_class={10**9}"), ["config.copies_per_class=1000000000", "the most is 10000"]),
    "more epochs than anybody waits for": (train(f"--config.epochs={10**12}"), [f"config.epochs={10**12}", "the most is 1000000"]),
    "more images than there are": (train("--config.train_examples=9999"), ["config.train_examples=9999", "1437"]),
    "a crop wider than the image": (train("--config.crop_padding=9"), ["config.crop_padding=9", "use at most 8"]),
    "a group that is not there": (train("--config.overrides={'group2':{}}"), ["config.overrides.group2={}", "group0 to group1"]),
    "a group of 5,000 digits": (train(f"--config.overrides={{'group{ENDLESS}':{{}}}}"), ["config.overrides.group999", "not a group"]),
    "a group that is a number": (train("--config.overrides={1:{}}"), ["config.overrides.1={}", "not a group"]),
    "overrides that are no dictionary": (
        train("--config.overrides=abc"),
        ["config.overrides='abc'", "not a value of type dict", "--config.overrides.NAME=VALUE"],
    ),
    "overrides nested deeply": (train("--config.overrides=" + "(" * 10**5), ["config.overrides='(((", "give one such as {}"]),
    "a misspelt folder of data": (train(CIFAR, "--config.data_dir=no"), ["config.data_dir='no'", "create it"]),
    "a file for a folder of data": (lambda p: ["train", CONFIG, CIFAR, f"--config.data_dir={p.file('f')}"], ["/f'", "not a folder"]),
    "a folder of data with a line break": (train(CIFAR, "--config.data_dir=a\nb"), ["config.data_dir='a\\nb'", "control character"]),
    "a folder of data with a null byte": (train(CIFAR, "--config.data_dir=a\0b"), ["config.data_dir='a\\x00b'", "control character"]),
    "a folder of data of 5,000 letters": (train(CIFAR, f"--config.data_dir={'x' * 5_000}"), ["config.data_dir='xxx", "create it"]),
    "an empty workdir": (train("--workdir="), ["--workdir=", "'' is empty", "give a path"]),
    "a workdir with a line break": (train("--workdir=a\nb"), ["--workdir=a b", "control character", "give a path"]),
    "a workdir of 5,000 letters": (train("--workdir=" + "x" * 5_000), ["xxx", "File name too long", "another --workdir"]),
    "a workdir that is a file": (lambda p: ["train", *TINY_FLAGS, f"--workdir={p.file('f')}"], ["/f: not a folder", "give a folder"]),
    "a workdir below a file": (lambda p: ["train", *TINY_FLAGS, f"--workdir={p.file('f')}/deeper"], ["/f", "another --workdir"]),
    "a workdir of another run": (
        lambda p: ["train", *TINY_FLAGS, "--config.seed=5", p.run()],
        ["config.seed=5", "/run holds a run with 0", "another --workdir"],
    ),
}

# ----------------------------------------------------------------------------------------------------------------------------------
# Configuration files


def pipe(place):
    os.mkfifo(place.folder / "pipe.py")
    return ["train", f"--config={place.folder / 'pipe.py'}"]


FILES = {
    "a missing file": (of("train", "--config=nothing.py"), ["--config=nothing.py", "No such file", "configs/digits.py"]),
    "a name with a null byte": (of("train", "--config=./a\0b"), ["--config=./a\\x00b", "null byte", "configs/digits.py"]),
    "a name of 5,000 letters": (of("train", "--config=./" + "x" * 5_000), ["--config=./xxx", "File name too long"]),
    "a misspelt name": (of("train", "--config=digit"), ["--config=digit:", "did you mean digits?", "vffjax configs"]),
    "a misspelt variant": (of("train", "--config=cifar10:smal"), ["no variant 'smal'", "choose one of full, laptop, small"]),
    "a name as a run has it": (of("train", "--config=cifar10-small"), ["did you mean cifar10:small?"]),
    "a variant of a name without": (of("train", "--config=digits:small"), ["has no variants; use --config=digits"]),
    "a name of nothing": (of("locality", "--config=zzz\0"), ["--config=zzz\\x00: no configuration", "vffjax configs lists all"]),
    "a file that comes with vffjax": (of("train", "--config=configs/digits.py"), ["No such file", "; --config=digits is"]),
    "code beside a name": (of("train", "--config=digits", "--config.rule=mine:RULE"), ["nobody who may has said", "by --code"]),
    "no folder of code": (train("--code=nowhere"), ["--code=nowhere", "no folder"]),
    "a key by another name": (train("--config.lr=3e-4"), ["config.lr='3e-4'", "did you mean config.learning_rate?"]),
    "a key in capitals": (train("--config.WD=1"), ["config.WD='1'", "did you mean config.weight_decay?"]),
    "the beginning of a key": (train("--config.clip=1"), ["did you mean config.clip_norm?"]),
    "a key like no other": (train("--config.dropout=0.1"), ["config.dropout='0.1': no such key; see vffjax train --help"]),
    "a key without config": (train("--epochs=3"), ["argument '--epochs=3'", "did you mean --config.epochs=3?"]),
    "a key without config, apart": (train("--lr", "3e-4"), ["argument '--lr'", "did you mean --config.learning_rate=3e-4?"]),
    "a misspelt flag": (train("--workdr=x"), ["argument '--workdr=x'", "did you mean --workdir=x?"]),
    "a configuration without its flag": (of("train", "digits"), ["argument 'digits'", "did you mean --config=digits?"]),
    "help of a misspelt key": (of("train", "--help", "epoch"), ["--help epoch: no such key; did you mean --help epochs?"]),
    "help of a key like no other": (of("train", "--help=zzz"), ["--help zzz: no such key; vffjax train --help lists the keys"]),
    "a folder for a file": (of("train", f"--config={ROOT}"), [f"--config={ROOT}: not a file", "configs/digits.py"]),
    "a device": (of("train", "--config=/dev/null"), ["--config=/dev/null: not a file", "configs/digits.py"]),
    "a pipe": (pipe, ["pipe.py: not a file", "configs/digits.py"]),
    "two megabytes": (config("#" * 2_000_000), ["bad.py: 2000000 bytes", "configs/digits.py"]),
    "a file without variants": (of("train", CONFIG + ":small"), ["digits.py:small", "no variants"]),
    "an empty variant": (of("train", CONFIG + ":"), ["digits.py:", "no variants"]),
    "an unknown variant": (of("train", CIFAR_CONFIG + ":smal"), ["'smal'", "full, laptop, small"]),
    "a number for variants": (
        config("VARIANTS = 5\ndef get_config(v='a'): pass\n", variant=":x"),
        ["bad.py:x: VARIANTS=5: not names", "make it a tuple"],
    ),
    "a text for variants": (
        config("VARIANTS = 'full'\ndef get_config(v='a'): pass\n", variant=":fu"),
        ["VARIANTS='full'", "make it a tuple"],
    ),
    "numbers for variants": (
        config("VARIANTS = (1,)\ndef get_config(v='a'): pass\n", variant=":1"),
        ["VARIANTS=(1,)", "make it a tuple"],
    ),
    "a variant that has to be given": (
        config("VARIANTS = ('a', 'b')\ndef get_config(v): pass\n"),
        ["get_config needs v", "give a variant", "bad.py:NAME, one of a, b"],
    ),
    "two arguments": (config("def get_config(a, b): pass\n"), ["get_config needs a, b", "give a variant"]),
    "a syntax error": (config("def get_config(:\n"), ["bad.py: line 1: SyntaxError", "correct the file"]),
    "an exception": (config("def get_config():\n    return 1 / 0\n"), ["line 2: ZeroDivisionError: division by zero", "correct the file"]),
    "an import": (config("import nothing_of_this_name\n"), ["line 1: ModuleNotFoundError", "nothing_of_this_name"]),
    "sys.exit": (config("import sys\ndef get_config():\n    sys.exit(0)\n"), ["line 3: SystemExit: 0", "correct the file"]),
    "an exception beside Exception": (
        config("class Own(BaseException): pass\ndef get_config():\n    raise Own('x')\n"),
        ["line 3: Own: x", "correct the file"],
    ),
    "an exception without words": (
        config("class Own(Exception):\n    def __str__(self): raise self\ndef get_config():\n    raise Own(Own())\n"),
        ["line 4: Own: without a message", "correct the file"],
    ),
    "an exception of two lines": (config("raise ValueError('a\\nb\\x1b[2J')\n"), ["line 1: ValueError: a", "correct the file"]),
    "endless recursion": (config("def get_config():\n    return get_config()\n"), ["line 2: RecursionError", "correct the file"]),
    "the library's own error": (
        config(HEAD + "from vffjax.config import converted\nconverted({'epochs': 0})\n"),
        ["bad.py: config.epochs=0: too small", "the least is 1"],
    ),
    "no get_config": (config("x = 1\n"), ["no function get_config"]),
    "a number for get_config": (config("get_config = 5\n"), ["no function get_config", "configs/digits.py"]),
    "no return": (config("def get_config():\n    pass\n"), ["returns NoneType", "default_config()"]),
    "a dictionary": (config("def get_config():\n    return {'epochs': 3}\n"), ["returns dict", "default_config()"]),
    "not Python": (config("\0"), ["SyntaxError"]),
    "an unknown key in the file": (body("c.epoch = 3"), ["line 6", "config.epoch: no such key", "did you mean config.epochs?"]),
    "a wrong type": (body("c.epochs = 'many'"), ["line 6", "'epochs'", "many"]),
    "nothing for a number": (body("c.epochs = None"), ["config.epochs=None", "type int"]),
    "a number of 5,001 digits": (body("c.epochs = 10**5000"), ["config.epochs=<int: ValueError>", "too large"]),
    "a real number of 5,001 digits": (body("c.learning_rate = 10**5000"), ["line 6: OverflowError", "correct the file"]),
    "a key unlocked": (body("c.unlock()", "c.epoch = 3"), ["config.epoch=3", "did you mean config.epochs?"]),
    "a key that is a number": (
        config("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({1: 2})\n"),
        ["config.1=2", "no such key"],
    ),
    "a dictionary for a number": (
        body("c.unlock()", "del c['epochs']", "c.epochs = ml_collections.ConfigDict({'a': 1})"),
        ["config.epochs={'a': 1}", "type int"],
    ),
    "a configuration that holds itself": (body("c.unlock()", "c.overrides = c"), ["config.overrides.", "not a group"]),
    "a place held for a value": (
        body("c.unlock()", "del c['epochs']", "c.epochs = ml_collections.config_dict.required_placeholder(int)"),
        ["bad.py", "RequiredValueError", "correct the file"],
    ),
    "an override that is a set": (
        body("c.overrides = {'group0': {'learning_rate': {1}}}"),
        ["config.overrides.group0.learning_rate={1}", "type float"],
    ),
}

# ----------------------------------------------------------------------------------------------------------------------------------
# Folders of data


def edit_features(change):
    def edit(folder):
        path = folder / "features.json"
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain))

    return edit


def shard_lengths(count):
    def edit(folder):
        splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
        splits[0]["shardLengths"] = [str(count)]
        edit_info(splits=splits)(folder)

    return edit


def names_files_elsewhere(folder):
    path = folder / "dataset_info.json"
    path.write_text(path.read_text().replace("{DATASET}-{SPLIT}", "../../../{SPLIT}"))


def set_shape(plain):
    plain["featuresDict"]["features"]["image"]["image"]["shape"]["dimensions"] = ["100000", "100000", "3"]


def set_class(plain):
    plain["pythonClassName"] = "this.Zen"  # importing `this` prints


def records(*given):
    return lambda folder: to_tfrecord(folder, {"train": [example(), *given]})


PREPARE = 'run "vffjax prepare cifar10"'
DATA = {
    "no json files": (cifar(lambda f: (f / "features.json").unlink()), ["features.json is missing", PREPARE]),
    "json that is no json": (cifar(lambda f: (f / "dataset_info.json").write_text('{"name": "cif')), ["3.0.2", PREPARE]),
    "json nested deeply": (cifar(lambda f: (f / "dataset_info.json").write_text("[" * 10**5)), ["3.0.2", "recursion", PREPARE]),
    "another set": (cifar(edit_info(name="cifar100")), ["is of 'cifar100'", PREPARE]),
    "an unknown format": (cifar(edit_info(fileFormat="sheets")), ["3.0.2", "'sheets'", PREPARE]),
    "no splits": (cifar(edit_info(splits=[])), ["dataset_info.json", "no images in split 'train'", PREPARE]),
    "a missing file of images": (cifar(lambda f: next(f.glob("*-test.*")).unlink()), ["cifar10-test.", "missing", PREPARE]),
    "an empty file": (cifar(lambda f: next(f.glob("*-train.*")).write_bytes(b"")), ["cifar10/3.0.2", PREPARE]),
    "a truncated file": (cifar(truncate_shard), ["cifar10/3.0.2", PREPARE]),
    "a flipped byte": (cifar(flip_byte), ["cifar10/3.0.2", PREPARE]),
    "fewer images than records": (cifar(shard_lengths(30)), ["cifar10-train.", "holds 35 records, not the 30", PREPARE]),
    "more images than records": (cifar(shard_lengths(10**12)), ["cifar10-train.", "holds 35 records, not the 1000000000000", PREPARE]),
    "images beyond memory": (cifar(edit_features(set_shape)), ["cifar10/3.0.2", PREPARE]),
    "files elsewhere": (cifar(names_files_elsewhere), ["outside its folder", "cifar10/3.0.2 and " + PREPARE]),
    "a class from elsewhere": (cifar(edit_features(set_class)), ["features.json", "'this.Zen'", PREPARE]),
    "a label out of range": (cifar(records(example(label=10))), ["record 1 of split 'train' has label 10", PREPARE]),
    "an image of another size": (cifar(records(example(size=(32, 31)))), ["31x32 RGB, not 32x32x3", PREPARE]),
    "a record that is no image": (cifar(records(example(image=b"GIF89a"))), ["record 1 of split 'train' cannot be used", PREPARE]),
    "a batch beyond a small set": (
        lambda p: ["train", CONFIG, *p.cifar(lambda _: None), "--config.pools=(1,2,1,2)", "--config.batch_size=33"],
        ["config.batch_size=33", "use at most"],
    ),
    "evaluation of a damaged set": (
        lambda p: ["evaluate", p.run(configured(dataset="cifar10")), f"--data_dir={p.cifar(truncate_shard)[1].partition('=')[2]}"],
        ["/run"],
    ),
    "prepare what needs it not": (of("prepare", "digits"), ["'digits'", "cifar10, cifar100, fashion_mnist, mnist"]),
    "prepare an unknown set": (of("prepare", "imagenet"), ["'imagenet'", "cifar10, cifar100, fashion_mnist, mnist"]),
    "prepare a set that clears the screen": (of("prepare", "\x1b[2J"), ["'\\x1b[2J'", "cifar10, cifar100, fashion_mnist, mnist"]),
    "prepare nothing": (of("prepare"), ["DATASET", "vffjax prepare --help"]),
    "prepare in a file": (lambda p: ["prepare", "mnist", f"--data_dir={p.file('f')}"], ["data_dir", "/f'", "a file, not a folder"]),
    "prepare in a name of 5,000 letters": (of("prepare", "mnist", f"--data_dir={'x' * 5_000}"), ["xxx", "too long", "--data_dir"]),
    "prepare in a null byte": (of("prepare", "mnist", "--data_dir=a\0b"), ["--data_dir", "'a\\x00b'", "give a path"]),
    "prepare from another archive": (
        lambda p: ["prepare", "cifar10", f"--data_dir={archived(p, tar_gz({'batches.meta.txt': chr(10).join(CIFAR_NAMES).encode()}))}"],
        ["config.dataset='cifar10'", "wrong checksum", "TFDS_DATA_DIR"],
    ),
    "prepare from what is no archive": (
        lambda p: ["prepare", "cifar10", f"--data_dir={archived(p, b'no archive')}"],
        ["config.dataset='cifar10'", "preparing it failed", "TFDS_DATA_DIR"],
    ),
}


def archived(place, content):
    manual = place.folder / "tfds" / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "cifar-10-binary.tar.gz").write_bytes(content)
    return place.folder / "tfds"


# ----------------------------------------------------------------------------------------------------------------------------------
# Workdirs


def configured(**changes):
    def edit(workdir):
        plain = json.loads((workdir / "config.json").read_text())
        (workdir / "config.json").write_text(json.dumps(plain | changes))

    return edit


def config_json(content):
    return lambda workdir: (workdir / "config.json").write_bytes(content)


def all_checkpoints_damaged(workdir):
    for path in workdir.glob("checkpoints/*/group1/manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:-1])


def no_checkpoints(workdir):
    for path in workdir.glob("checkpoints/*.json"):
        path.unlink()


WORKDIRS = {}
for command, rest in {"evaluate": [], "predict": ["x.png"], "export": ["--out=w.safetensors"]}.items():
    help_ = f"vffjax {command} --help"
    WORKDIRS |= {
        f"{command} nothing": (of(command, *rest), ["--workdir", help_]),
        f"{command} an empty name": (of(command, "--workdir=", *rest), ["--workdir", "'' is empty", help_]),
        f"{command} a folder without a run": (
            of(command, "--workdir=.", *rest),
            ["--workdir=.", "no run here", "give the folder of a run"],
        ),
        f"{command} an epoch that is not saved": (
            on_run(command, "--epoch=99", *rest),
            ["--epoch=99: not saved", "best, latest, or one of"],
        ),
        f"{command} an epoch that is no number": (on_run(command, "--epoch=²", *rest), ["--epoch=²: not saved", "best, latest, or one of"]),
        f"{command} an epoch of 5,000 digits": (on_run(command, f"--epoch={ENDLESS}", *rest), ["--epoch", "best, latest, or", help_]),
        f"{command} without checkpoints": (workdir(command, no_checkpoints, *rest), ["checkpoint", "/run", "; "]),
        f"{command} with damaged checkpoints": (
            workdir(command, all_checkpoints_damaged, *rest),
            ["group1/manifest.ocdbt", "damaged", "; "],
        ),
        f"{command} by a configuration that is no JSON": (
            workdir(command, config_json(b"{"), *rest),
            ["config.json: cannot be read", "restore it"],
        ),
        f"{command} by a configuration of bytes": (
            workdir(command, config_json(b"\xff"), *rest),
            ["config.json: cannot be read", "restore it"],
        ),
        f"{command} by a configuration that is a list": (
            workdir(command, config_json(b"[1]"), *rest),
            ["config.json: cannot be read", "restore"],
        ),
        f"{command} by a configuration nested deeply": (
            workdir(command, config_json(b"[" * 10**5), *rest),
            ["/run", "nested too deeply", "restore"],
        ),
        f"{command} by a configuration out of range": (
            workdir(command, configured(epochs=0), *rest),
            ["config.json: config.epochs=0", "the least is 1"],
        ),
        f"{command} by another network": (
            workdir(command, configured(widths=[16, 13]), *rest),
            ["config.widths", "[16, 13]", "config.json"],
        ),
    }

OPTIONS = {
    "evaluate by guessing": (on_run("evaluate", "--inference=guess"), ["--inference", "'guess'", "heads", "sweep"]),
    "a threshold of nothing": (on_run("evaluate", "--inference=early_exit", "--threshold="), ["--threshold", "''", "up to 1"]),
    "a threshold of 0": (on_run("evaluate", "--inference=early_exit", "--threshold=0"), ["--threshold", "'0'", "up to 1"]),
    "a threshold above 1": (on_run("evaluate", "--inference=early_exit", "--threshold=1.01"), ["--threshold", "'1.01'", "up to 1"]),
    "a threshold below 0": (on_run("evaluate", "--inference=early_exit", "--threshold=-0.5"), ["--threshold", "'-0.5'", "up to 1"]),
    "a threshold that is no number": (on_run("evaluate", "--inference=early_exit", "--threshold=nan"), ["--threshold", "'nan'", "0.9"]),
    "a threshold of 5,000 digits": (on_run("evaluate", "--inference=early_exit", f"--threshold={ENDLESS}"), ["--threshold", "up to 1"]),
    "a threshold without early exit": (on_run("evaluate", "--threshold=0.5"), ["--threshold=0.5", "add --inference=early_exit"]),
    "a threshold for heads": (on_run("evaluate", "--inference=heads", "--threshold=1"), ["--threshold=1.0", "add --inference=early_exit"]),
    "exits without early exit": (on_run("evaluate", "--exits=all"), ["--exits=all", "add --inference=early_exit"]),
    "exits somewhere": (on_run("evaluate", "--inference=early_exit", "--exits=some"), ["--exits", "'some'", "voting", "all", "--help"]),
    "a curve without early exit": (on_run("evaluate", "--curve=c.json"), ["--curve=c.json", "add --inference=early_exit"]),
    "a curve that is no JSON": (on_run("evaluate", "--inference=early_exit", "--curve=c.png"), ["--curve=c.png", "give a .json file"]),
    "a curve in no folder": (on_run("evaluate", "--inference=early_exit", "--curve=no/c.json"), ["--curve=no/c.json", "existing folder"]),
    "a curve with a folder for its picture": (picture_is_a_folder, ["--curve=c.json: c.png exists", "another .json file"]),
    "a curve over a run's configuration": (curve_over_a_run("config.json"), ["config.json exists", "another .json file"]),
    "a curve over a run's picture": (curve_over_a_run("curves.json"), ["curves.png exists", "another .json file"]),
    "early exit of a folder without a run": (of("evaluate", "--workdir=.", "--inference=early_exit"), ["no run here", "give the folder"]),
    "evaluate neither": (of("evaluate"), ["--workdir or --config", "give the folder"]),
    "evaluate two things": (on_run("evaluate", "--config=c.py"), ["--workdir", "leave out --config"]),
    "evaluate an epoch of none": (of("evaluate", CONFIG, "--config.init_from=w.safetensors", "--epoch=2"), ["--epoch=2", "leave it out"]),
    "evaluate random weights": (of("evaluate", CONFIG), ["config.init_from=''", "weights are random", "give --config.init_from"]),
    "evaluate a stray argument": (on_run("evaluate", "stray"), ["stray", "vffjax evaluate --help"]),
    "evaluate with a file of data": (on_run("evaluate", "--data_dir=a\0"), ["--data_dir", "'a\\x00'", "give a path"]),
    "predict no image": (on_run("predict"), ["IMAGE", "vffjax predict --help"]),
    "predict no class": (on_run("predict", "--top=0", "x.png"), ["--top", "'0'", "at least 1"]),
    "predict a word of classes": (on_run("predict", "--top=two", "x.png"), ["--top", "'two'", "--help"]),
    "predict classes of 5,000 digits": (on_run("predict", f"--top={ENDLESS}", "x.png"), ["--top", "no whole number", "--help"]),
    "export without a run": (of("export"), ["--workdir", "vffjax export --help"]),
    "export to a pickle": (on_run("export", "--out=w.pt"), ["--out=w.pt", "give a .safetensors or .stablehlo file"]),
    "export to a folder": (on_run("export", "--out=.safetensors/"), ["--out=", "give a .safetensors or"]),
    "export to a folder of a good name": (export_to_a_folder, ["--out=", "e.stablehlo: exists and is not a file", "give another"]),
    "export to a missing folder": (on_run("export", "--out=no/w.safetensors"), ["--out=no/w.safetensors", "an existing folder"]),
    "export to 5,000 letters": (on_run("export", f"--out={'x' * 5_000}.safetensors"), ["--out=xxx", "give a .safetensors or"]),
    "export to an empty name": (on_run("export", "--out="), ["--out", "'' is empty", "--help"]),
    "export as another library's": (on_run("export", "--format=onnx"), ["--format", "'onnx'", "safetensors", "stablehlo", "--help"]),
    "export by other names": (on_run("export", "--names=timm"), ["--names", "'timm'", "torchvision", "--help"]),
    "export of names in a program": (
        on_run("export", "--out=e.stablehlo", "--names=torchvision"),
        ["--names=torchvision", ".stablehlo", "use --format=safetensors"],
    ),
    "export of weights to a program": (
        on_run("export", "--format=safetensors", "--out=e.stablehlo"),
        ["--format=safetensors: --out=e.stablehlo", "give a .safetensors file"],
    ),
    "export of a program to weights": (
        on_run("export", "--format=stablehlo", "--out=w.safetensors"),
        ["--format=stablehlo: --out=w.safetensors", "give a .stablehlo file"],
    ),
    "export of a program to a missing folder": (on_run("export", "--out=no/e.stablehlo"), ["--out=no/e.stablehlo", "an existing folder"]),
    "export of a program from a folder without a run": (
        of("export", "--workdir=.", "--format=stablehlo"),
        ["no run here", "give the folder of a run"],
    ),
    "export of a program over a run": (
        lambda p: ["export", run := p.run(), f"--out={run.partition('=')[2]}/config.stablehlo"],
        ["config.stablehlo: ", "config.json beside it was not written by an export", "give another .stablehlo file"],
    ),
    "memory without a configuration": (of("memory"), ["--config: missing", "configs/digits.py"]),
    "memory of no layers": (of("memory", CONFIG, "--depths=0"), ["--depths=0", "2,4,8"]),
    "memory of a million layers": (of("memory", CONFIG, "--depths=999999"), ["--depths=999999", "the most is 1000"]),
    "memory of words": (of("memory", CONFIG, "--depths=deep"), ["--depths=deep", "2,4,8"]),
    "memory of more images than there are": (of("memory", CONFIG, "--batches=999996"), ["--batches=999996", "use at most 1293"]),
    "memory of a batch that has no quarter": (of("memory", CONFIG, "--batches=7"), ["--batches=7", "use for example 8"]),
    "memory on what is no device": (
        of("memory", CONFIG, "--target=gpu"),
        ["--target=gpu: not known", "choose one of here, cpu, a100, b200, h100, t4, v4, v5e, v5p, v6e, tpu"],
    ),
    "memory to no JSON": (of("memory", CONFIG, "--out=x.txt"), ["--out=x.txt", "give a .json file"]),
    "memory to a missing folder": (of("memory", CONFIG, "--out=no/x.json"), ["--out=no/x.json", "an existing folder"]),
    "memory with a workdir": (of("memory", CONFIG, "--workdir=x"), ["--workdir=x", "use --out"]),
    "memory of a layer that XLA cannot count": (
        of("memory", CONFIG, "--config.widths=(65536,8192,65536,8192)"),
        ["config.widths=(65536, 8192", "layer 1 would have 4831838208 parameters", "smaller widths"],
    ),
    "memory of a width beyond memory": (
        of("memory", CONFIG, f"--config.widths=({10**30},4,4,4)"),
        ["config.widths=(1000", "at most 65536"],
    ),
    "locality without a configuration": (of("locality"), ["--config: missing", "configs/digits.py"]),
    "locality of an unknown key": (of("locality", CONFIG, "--config.epoch=3"), ["config.epoch='3'", "did you mean config.epochs?"]),
    "locality with a workdir": (of("locality", CONFIG, "--workdir=x"), ["--workdir=x", "use --out"]),
    "locality to no JSON": (of("locality", CONFIG, "--out=x"), ["--out=x", "give a .json file"]),
    "locality of a batch larger than the data": (
        of("locality", CONFIG, "--config.batch_size=9999"),
        ["config.batch_size=9999", "use at most"],
    ),
    "reproduce nothing": (of("reproduce"), ["WORKDIR", "vffjax reproduce --help"]),
    "reproduce a folder without a run": (of("reproduce", "."), ["no run here", "give the folder of a run"]),
    "reproduce an empty name": (of("reproduce", ""), ["WORKDIR", "'' is empty", "give a path"]),
    "reproduce into itself": (lambda p: ["reproduce", p.run().partition("=")[2], f"--into={p.folder / 'run'}"], ["--into=", "/run", "; "]),
}

# ----------------------------------------------------------------------------------------------------------------------------------
# Images and weight files; test_prediction.py, test_weights.py and test_fuzz.py have more


def png(width, height):
    """A PNG that claims a size and holds no such pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def image_pipe(place):
    os.mkfifo(place.folder / "pipe.png")
    return ["predict", f"--workdir={finished()}", place.folder / "pipe.png"]


def huge_image(place):
    path = place.file("big.png", png(8, 8))
    os.truncate(path, 2**28 + 1)  # a file with a hole
    return ["predict", f"--workdir={finished()}", path]


CONVERT = "convert or replace it"
IMAGES = {
    "an image that is missing": (on_run("predict", "no.png"), ["no.png: No such file", "give a PNG, JPEG, WebP or BMP"]),
    "an image that is a folder": (on_run("predict", "."), [".: no PNG, JPEG, WebP or BMP file in this folder", "give another"]),
    "an image that is a device": (on_run("predict", "/dev/zero"), ["/dev/zero: not a file", "give a PNG, JPEG"]),
    "an image that is a pipe": (image_pipe, ["pipe.png: not a file", "give a PNG, JPEG"]),
    "an image of no bytes": (predict("a.png", b""), ["a.png: not a readable", CONVERT]),
    "an image that is text": (predict("a.png", b"not an image"), ["a.png: not a readable", CONVERT]),
    "an image that is a GIF": (predict("a.png", b"GIF89a\x01\0\x01\0\0\0\0;"), ["a.png: not a readable", CONVERT]),
    "an image cut off": (predict("a.png", png(8, 8)[:45]), ["a.png: not a readable", CONVERT]),
    "an image with fewer pixels than it says": (predict("a.png", png(4_000, 4_000)), ["a.png: not a readable", CONVERT]),
    "an image with too many pixels": (predict("a.png", png(10_000, 10_000)), ["a.png: 10000x10000 pixels", "at most"]),
    "an image with far too many pixels": (predict("a.png", png(10**5, 10**5)), ["a.png: far too many pixels", "at most"]),
    "an image of 256 MB": (huge_image, ["big.png: 268435457 bytes", "at most 268435456"]),
    "a table that is no CSV file": (on_run("predict", "--csv=a.txt", "."), ["--csv=a.txt: cannot be written", "give a .csv file"]),
    "a table of nothing": (on_run("predict", "--csv=a.csv", "no.png"), ["no.png: No such file"]),
    "an image with a null byte": (on_run("predict", "a\0.png"), ["a\\x00.png", "; "]),
    "an image with a name of two lines": (
        predict("a\nvffjax: error: b\x1b[2J.png", b""),
        ["a vffjax: error: b\\x1b[2J.png: not a readable"],
    ),
    "an image with a name of 5,000 letters": (on_run("predict", "x" * 5_000), ["xxx", "; "]),
}


def weight_file(**tensors):
    return safetensors.numpy.save(tensors)


WEIGHTS = {
    "weights that are missing": (train("--config.init_from=no.safetensors"), ["no.safetensors", "No such file", "vffjax export"]),
    "weights by another name": (train("--config.init_from=w.npz"), ["config.init_from='w.npz'", "not a .safetensors file", "hf://"]),
    "PyTorch's weights for another network": (
        train("--config.init_from=w.pt"),
        ["w.pt: PyTorch's files are read for resnet18", "vffjax export"],
    ),
    "PyTorch's weights that are missing": (
        train("--config.network=resnet18", "--config.init_from=no.pth"),
        ["no.pth: cannot be read (No such file", "torchvision or timm"],
    ),
    "an address without an owner": (
        train("--config.init_from=hf://resnet18"),
        ["config.init_from='hf://resnet18': no address", "hf://OWNER"],
    ),
    "an address of a pickle": (
        train("--config.init_from=hf://timm/resnet18/pytorch_model.bin"),
        ["config.init_from='hf://timm", "not a .safetensors file"],
    ),
    "weights in a folder": (train(f"--config.init_from={ROOT}/.safetensors"), [".safetensors: cannot be read", "vffjax export"]),
    "weights with a line break": (train("--config.init_from=a\n.safetensors"), ["config.init_from='a\\n", "control character"]),
    "weights of no bytes": (start(b""), ["w.safetensors: not safetensors", "init_from=''"]),
    "weights that are a pickle": (start(b"\x80\x04\x95\x10\0\0\0\0\0\0\0}."), ["w.safetensors: not safetensors", "init_from=''"]),
    "weights cut off": (start(weight_file(a=np.zeros(9, np.float32))[:-1]), ["w.safetensors: truncated", "init_from=''"]),
    "weights of another network": (start(weight_file()), ["w.safetensors: tensor group0.", "missing", "init_from=''"]),
    "weights with a header of 4 GB": (start((2**32).to_bytes(8, "little") + b"{}"), ["w.safetensors: not safetensors", "init_from=''"]),
    "weights nested deeply": (
        start((10**5).to_bytes(8, "little") + b"[" * 10**5),
        ["w.safetensors: a damaged header (RecursionError", "init_from=''"],
    ),
}

ROWS = FLAGS | FILES | DATA | WORKDIRS | OPTIONS | IMAGES | WEIGHTS
SECONDS = 5


def test_the_table_is_whole():
    tables = (FLAGS, FILES, DATA, WORKDIRS, OPTIONS, IMAGES, WEIGHTS)
    assert len(ROWS) == sum(map(len, tables)) >= 90  # no name stands in two tables


def is_one_line(err):
    """One line, as a terminal shows it, that is not longer than anybody reads."""
    return err.count("\n") == 1 and err.startswith("vffjax: error: ") and err[:-1].isprintable() and len(err) < 1_100


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
@pytest.mark.parametrize(("arguments", "parts"), ROWS.values(), ids=ROWS.keys())
def test_bad_input_is_one_line_at_once_and_changes_nothing(arguments, parts, call, tmp_path, monkeypatch):
    place = Place(tmp_path)
    monkeypatch.chdir(tmp_path / "cwd")
    argv = arguments(place)
    before, run_before = place.everything(), contents(finished())
    began = time.monotonic()
    status, out, err = call(*argv)
    seconds = time.monotonic() - began
    assert (status, out) == (2, ""), err
    assert is_one_line(err), err
    missing = [part for part in parts if part not in err]
    assert not missing, f"{missing} not in {err}"
    assert place.everything() == before
    assert contents(finished()) == run_before
    assert seconds < SECONDS


IN_A_PROCESS = [
    "a command of two lines",
    "an unknown key",
    "a pipe",
    "states beyond memory",
    "weights nested deeply",
    "memory of words",
    "evaluate a folder without a run",
    "prepare an unknown set",
    "an image of 256 MB",
]


@pytest.mark.parametrize("name", slow_but(IN_A_PROCESS, "a command of two lines", "an unknown key"))
def test_start_and_all_takes_less_than_five_seconds_of_a_processor(name, tmp_path):
    place = Place(tmp_path)
    argv = list(map(str, ROWS[name][0](place)))
    code = "from vffjax.cli.main import main; import sys; main(sys.argv[1:])"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *argv]
    with subprocess.Popen(command, cwd=tmp_path / "cwd", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.stdout.read(), process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, out) == (2, b""), err
    assert is_one_line(err), err
    assert used.ru_utime + used.ru_stime < SECONDS


@pytest.mark.parametrize(("flag", "says"), [("rule=vf", "did you mean 'vff'"), ("overrides.group0.epochs=1", "cannot be overridden")])
def test_bad_flags_are_refused_before_jax_is_imported(flag, says):
    # That is what makes the answer quick on any machine.
    code = "import sys; from vffjax.cli.main import main\ntry: main(['train', *sys.argv[1:]])\nexcept SystemExit as e: "
    done = in_a_process("-c", code + "print('jax' in sys.modules, e.code)", CONFIG, f"--config.{flag}")
    assert done.stdout == "False 2\n"
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


# ----------------------------------------------------------------------------------------------------------------------------------
# What the machine refuses


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of requests
def test_data_that_cannot_be_downloaded_are_refused_with_the_way_out(fails, tmp_path, monkeypatch):
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
    for key in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "tfds").mkdir()
    fails("train", CONFIG, CIFAR, f"--workdir={tmp_path / 'run'}", parts=["config.dataset='cifar10'", "prepare"])
    assert [path.name for path in tmp_path.rglob("*")] == ["tfds"]
    gc.collect()  # while warnings of what it frees are ignored; a later test would fail by them


def test_a_workdir_that_cannot_be_written_is_refused(fails, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path / 'run'}", parts=[str(tmp_path), "permissions"])


DISK = [OSError(28, "No space left on device", "checkpoints/3"), PermissionError(13, "Permission denied")]


@pytest.mark.parametrize("error", DISK, ids=repr)
def test_what_the_disk_refuses_is_one_line_with_the_way_out(error, fails, monkeypatch, tmp_path):
    def refuse(*_):
        raise error

    monkeypatch.setattr(experiment, "train", refuse)
    where = error.filename or str(tmp_path)
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path}", parts=[f"{where}: {error.strerror}", "check space and permissions"])


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")], ids=repr)
def test_what_the_memory_refuses_is_one_line_with_the_way_out(error, fails, monkeypatch, tmp_path):
    def refuse(*_):
        raise error

    monkeypatch.setattr(experiment, "train", refuse)
    fails("train", *TINY_FLAGS, f"--workdir={tmp_path}", parts=["out of memory", str(error), "config.batch_size"])


def test_any_other_error_is_a_bug_and_keeps_its_traceback(call, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("mine")

    monkeypatch.setattr(experiment, "train", fail)
    with pytest.raises(RuntimeError, match="mine"):
        call("train", *TINY_FLAGS, f"--workdir={tmp_path}")


def test_more_steps_than_can_be_counted_are_refused():
    from vffjax.errors import UserError
    from vffjax.training.checks import check_against_data
    from vffjax.training.plan import make_plan

    many = tiny(epochs=100_000, batch_size=1)
    check_against_data(make_plan(many, 21_474, 10), 21_474, (8, 8, 1))
    with pytest.raises(UserError, match=r"config\.epochs=100000: more than 2147483647 steps; use fewer"):
        check_against_data(make_plan(many, 21_475, 10), 21_475, (8, 8, 1))


def test_a_sweep_for_rule_head_is_refused(fails, tmp_path):
    workdir = copy_of(finished(), tmp_path)  # the arrays of rule vff are those of rule head
    configured(rule="head")(workdir)
    fails("evaluate", f"--workdir={workdir}", "--inference=sweep", parts=["rule", "head", "; "])


def test_a_damaged_checkpoint_is_named_and_left_as_it_was(call, tmp_path):
    workdir = copy_of(finished(), tmp_path)
    all_checkpoints_damaged(workdir)
    before = contents(workdir)
    status, out, err = call("train", *TINY_FLAGS, f"--workdir={workdir}")
    assert (status, out) == (2, "")
    assert re.search(r"vffjax: error: .*checkpoints/\d/group1/manifest\.ocdbt.*damaged.*; ", err.splitlines()[-1])
    assert {name: content for name, (content, _) in contents(workdir).items()} == {name: content for name, (content, _) in before.items()}


def test_the_contents_of_a_folder_tell_a_change(tmp_path):
    # What the table relies on.
    place = Place(tmp_path)
    path = place.file("f", "1")
    before = place.everything()
    path.write_text("2")
    assert place.everything() != before
    path.write_text("1")
    os.utime(path, ns=(0, 0))
    assert place.everything() != before
    assert pathlib.Path(tmp_path, "cwd").is_dir()
