"""The notebooks run from top to bottom, on digits or on small pictures; cells that install, download or mount Drive are left out here."""

import json
import os
import re
import shlex
import sys

import pytest

from command_lines import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What replaces the cell tagged `parameters`, and what a notebook finds where cells were left out.
PARAMETERS = {
    "colab": 'NAME, EPOCHS, FOLDER = "digits", 2, "drive"',
    "your_images": 'PHOTOS, EPOCHS, SIDE = "photos", 3, 16',
    "your_rule": "EPOCHS = 2",
}
SKIPPED = {"colab": 3, "your_images": 1, "your_rule": 1}


def cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_leaves_out_no_more_than_it_says(notebook):
    """No outputs are kept, since they age and hold paths; only cells that install, clone or mount are left out; one cell has parameters."""
    found = cells(notebook)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in found)
    left_out = ["".join(cell["source"]) for cell in found if tagged(cell, "skip-ci")]
    assert len(left_out) == SKIPPED[notebook.stem]
    assert all(re.search(r"git clone|drive\.mount|vffjax prepare", source) for source in left_out)
    assert sum(tagged(cell, "parameters") for cell in found) == 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_installs_its_next_cell_can_import(notebook):
    """The next process would be the first that sees an editable install, and the kernel is running already."""
    (arguments,) = re.findall(r"^%pip install (.*)$", "".join(cells(notebook)[0]["source"]), re.MULTILINE)
    found = shlex.split(arguments)
    assert found[-1].split("[")[0] == "./vffjax"
    assert set(found[:-1]) == {"-q"}


def test_the_address_of_the_repository_is_the_same_everywhere():
    (address,) = re.findall(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    for notebook in NOTEBOOKS:
        assert re.findall(r'REPOSITORY = "(.*?)"', "".join(cells(notebook)[0]["source"])) == [address]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the libraries that run notebooks
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    book = nbformat.read(notebook, as_version=4)
    book.cells = [cell for cell in book.cells if not tagged(cell, "skip-ci")]
    for cell in book.cells:
        if tagged(cell, "parameters"):
            cell.source = PARAMETERS[notebook.stem]
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    lines = "".join(output["text"] for output in outputs if output["output_type"] == "stream").splitlines()
    assert any(re.search(r"error +\d+\.\d+ %|\d+\.\d % on \d+ images", line) for line in lines)
    assert ("local" in lines) == (notebook.stem != "your_images")
    assert (tmp_path / "weights.safetensors").exists() == (notebook.stem == "your_images")  # by a command of the shell
