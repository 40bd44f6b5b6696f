"""The examples in docstrings give the results that they show. Only modules with examples are imported."""

import ast
import doctest
import importlib
import io
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def examples():
    """A docstring with examples, as a test, by the name of what it describes.

    They are read from the source and not from the objects, because a decorated function may not look like one of its module.
    """
    for path in sorted((ROOT / "vffjax").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>> " in (text := ast.get_docstring(node) or ""):
                yield pytest.param(name, text, id=f"{name}.{getattr(node, 'name', '')}")


@pytest.mark.parametrize("module, text", list(examples()))
def test_an_example_gives_what_it_shows(module, text):
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, names, module, None, None)
    runner, report = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), io.StringIO()
    runner.run(example, out=report.write)
    assert runner.tries == len(example.examples) > 0
    assert not runner.failures, report.getvalue()
