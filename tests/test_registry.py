"""Rules, networks and data sources are found by name, and nobody outside of their rooms asks for one of them by its name."""

import ast
import re
import subprocess
import sys

import pytest

from command_lines import ROOT
from vffjax import data, networks, rules
from vffjax.config import FIELDS
from vffjax.data.sets import Source
from vffjax.errors import UserError
from vffjax.networks.network import Network
from vffjax.registry import NETWORKS, ROOMS, RULES, SOURCES
from vffjax.rules.local import Rule

KINDS = {RULES: Rule, NETWORKS: Network, SOURCES: Source}
NAMES = {name for room in ROOMS for name in room.names}


@pytest.mark.parametrize("room, name", [(room, name) for room in ROOMS for name in room.names])
def test_every_name_is_found_and_is_of_its_kind(room, name):
    record = room.find(name)
    assert isinstance(record, KINDS[room])
    assert room.find(name) is record


def test_the_rooms_are_those_of_the_configuration():
    assert {room.key for room in ROOMS} <= set(FIELDS)
    assert [room.package for room in ROOMS] == [module.__name__ for module in (rules, networks, data)]
    for room in ROOMS:
        assert FIELDS[room.key].default in room.names
        assert list(room.names) == sorted(room.names)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.key)
@pytest.mark.parametrize("name", ["brand_new", "local", "network", "sets", "__init__", "os", "", "vff.py", "../rules/vff"])
def test_what_is_no_record_is_not_known(room, name):
    """Other modules of the room among them."""
    with pytest.raises(UserError, match=rf"^config\.{room.key}={re.escape(repr(name))}: not known; .*choose one of {room.names[0]}, "):
        room.find(name)


def test_names_are_known_and_checked_without_jax():
    code = """
import sys
from vffjax.cli import key_help
from vffjax.config import converted, default_config
from vffjax.registry import ROOMS
names = [room.names for room in ROOMS]
converted(default_config())
key_help.every_key()
heavy = [name for name in sys.modules if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")]
records = [f"{room.package}.{name}" for room in ROOMS for name in room.names if f"{room.package}.{name}" in sys.modules]
print(len(sum(names, ())), heavy, records)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{len(NAMES)} [] []\n", done.stderr


# ----------------------------------------------------------------------------------------------------------------------------------
# Nobody asks for one by name

HOMES = tuple(room.package.removeprefix("vffjax.") + "/" for room in ROOMS)
KEYS = {room.key for room in ROOMS}
# How often words stand there that mean something else: the parameters of a group's head, and torchvision's name of a convolution.
OTHERS = {
    ("proofs/locality.py", "head"): 1,
    ("training/optimizers.py", "head"): 1,
    ("weights/description.py", "head"): 1,
    ("weights/torchvision.py", "head"): 1,
    ("weights/torchvision.py", "conv"): 1,
}
VALUES = re.compile(rf"\b(?:{'|'.join(sorted(KEYS))})[ =:]*({'|'.join(sorted(NAMES))})\b")  # in a text, such as rule=vff


def docstrings(tree):
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    firsts = (node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body)
    return {first.value for first in firsts if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)}


def named(source, names=NAMES):
    """The names that stand in a module as strings, however they are used; those in texts only as the value of a key."""
    tree = ast.parse(source)
    passed = docstrings(tree)
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed]
    found = [node.value for node in strings if node.value in names]
    return sorted(found + [match[1] for node in strings for match in VALUES.finditer(node.value)])


def is_key(node):
    """Whether an expression is the rule, network or dataset of a configuration, or a sequence with one of them. `plan.rule` is a record."""
    if isinstance(node, ast.Tuple | ast.List):
        return any(map(is_key, node.elts))
    return bool(re.search(rf"(config(\(.*\))?|\b(c|base))(\.|, ')({'|'.join(KEYS)})('\))?$", ast.unparse(node)))


def asked(source):
    """Lines where a module asks what one of the keys is: `config.rule == x`, `config.rule in x`, `match config.rule`, `x[c.rule]`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith", "get"):
            parts = [node.func.value, *node.args]
        else:
            continue
        found += [part.lineno for part in parts if is_key(part)]
    return found


def modules(folder):
    return {path.relative_to(ROOT / folder).as_posix(): path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}


def test_no_name_of_a_record_stands_outside_its_room():
    found = {}
    for file, source in modules("vffjax").items():
        names = named(source)
        if file == "config.py":
            for room in ROOMS:  # the defaults, once each
                names.remove(FIELDS[room.key].default)
        if names and not file.startswith(HOMES):
            for name in names:
                found[file, name] = found.get((file, name), 0) + 1
    assert found == OTHERS


def test_a_room_names_only_its_own_records():
    """A rule does not ask for a network, nor a network for a rule. Words that name both a rule and something else are left out."""
    for room in ROOMS:
        others = NAMES - set(room.names) - {"head", "conv"}
        home = room.package.removeprefix("vffjax.") + "/"
        found = {
            file: names
            for file, source in modules("vffjax").items()
            if file.startswith(home) and (names := set(named(source, others)) & others)
        }
        assert not found


@pytest.mark.parametrize("folder", ["vffjax", "benchmarks"])
def test_nobody_asks_which_rule_network_or_set_it_is(folder):
    found = {
        file: lines
        for file, source in modules(folder).items()
        if not (folder == "vffjax" and file.startswith(HOMES)) and (lines := asked(source))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "config.optimizer == 'vff'",
        "TABLE = {'vff': 1}",
        "x in ('ff', 'bp')",
        "match x:\n    case 'cifar10': pass",
        "f'{x} with rule=symba'",
        "f'{x}' + 'vgg8b'",
        "use(rule='predsim')",
        "raise E('use network=conv')",
        "def f(x='mnist'): pass",
    ],
)
def test_the_search_finds_a_name(code):
    assert len(named(code)) == 1


@pytest.mark.parametrize("code", ["'''vff'''", "def f():\n    'vff'", "class C:\n    'vff'", "'how vff trains'", "vff = 1", "'vffs'"])
def test_the_search_passes_what_names_none(code):
    assert named(code) == []


@pytest.mark.parametrize(
    "code",
    [
        "config.rule == name",
        "name != self.config.network",
        "c.dataset in names",
        "(config.rule, x) == y",
        "match config.rule:\n    case x: pass",
        "TABLE[config.rule]",
        "getattr(config, 'network') == x",
        "config.rule.startswith(x)",
        "TABLE.get(plan.config.dataset)",
        "read_config(path).rule == x",
    ],
)
def test_the_search_finds_a_question(code):
    assert asked(code)


@pytest.mark.parametrize(
    "code", ["plan.rule is None", "rules.find(config)", "print(config.rule)", "match.rule == 1", "config.norm == 'layer'"]
)
def test_the_search_passes_what_asks_for_nothing(code):
    assert not asked(code)
