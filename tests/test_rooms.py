"""The rooms of the package: no import goes up or in a circle, modules are short, and docs/architecture.md names them all."""

import ast
import graphlib
import pathlib
import re

import pytest

from vffjax import registry

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LONGEST = 350  # lines that a module stays below
NOT_IN_A_FOLDER = "the door", "the ground"


def rooms_of_the_page():
    """Each room's modules by docs/architecture.md, the rooms from top to bottom; a room without a folder by its heading's words."""
    rooms = PAGE.partition("## The rooms\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    headings = [re.match(r"`(\w+)/`|(the \w+)", room) for room in rooms]
    return {heading[1] or heading[2]: re.findall(r"^- `(\w+\.py)`: ", room, re.M) for heading, room in zip(headings, rooms, strict=True)}


ROOMS = rooms_of_the_page()
FILES = {path.relative_to(ROOT / "vffjax").as_posix(): path for path in sorted((ROOT / "vffjax").rglob("*.py"))}


def room(file):
    """The room of a file of the package."""
    folder, inside, _ = file.partition("/")
    return folder if inside else next(heading for heading in NOT_IN_A_FOLDER if file in ROOMS[heading])


def module(file):
    """A file's name in an import statement."""
    return ".".join(["vffjax", *file.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]).rstrip(".")


MODULES = {module(file): file for file in FILES}


def imported(source):
    """The package's files that a module imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]  # what is imported from a module is no module
            if name:
                yield MODULES[name]


IMPORTS = {file: set(imported(path.read_text())) for file, path in FILES.items()}


def test_the_page_names_every_room_and_module():
    named = {name if heading in NOT_IN_A_FOLDER else f"{heading}/{name}" for heading, names in ROOMS.items() for name in names}
    empty = {file for file, path in FILES.items() if path.name == "__init__.py" and not path.read_bytes()}
    # A rule, a network, a source or a command is one file and need not be named.
    folders = {"rules": registry.RULES, "networks": registry.NETWORKS, "data": registry.SOURCES}
    alone = {f"{folder}/{name}.py" for folder, kind in folders.items() for name in kind.names}
    alone |= {file for file in FILES if file.startswith("cli/commands/")}
    assert named <= set(FILES)
    assert named >= set(FILES) - alone - empty


def test_no_module_imports_one_of_a_room_above():
    order = list(ROOMS)
    up = [(file, other) for file, others in IMPORTS.items() for other in others if order.index(room(other)) < order.index(room(file))]
    assert not up


@pytest.mark.parametrize("graph", ["modules", "rooms"])
def test_no_import_goes_in_a_circle(graph):
    edges = IMPORTS
    if graph == "rooms":
        edges = {name: {room(other) for file in FILES if room(file) == name for other in IMPORTS[file]} - {name} for name in ROOMS}
    assert any(edges.values())
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError


def test_modules_are_short():
    lines = {file: len(path.read_text().splitlines()) for file, path in FILES.items()}
    assert not {file: count for file, count in lines.items() if count >= LONGEST}
    assert len((ROOT / "train.py").read_text().splitlines()) < 60


def test_no_module_is_a_drawer_for_everything():
    assert not {file for file in FILES if file.endswith(("utils.py", "helpers.py", "misc.py"))}
