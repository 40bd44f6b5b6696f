"""The workflow of CI calls `.ci/run` on every Python from the oldest that the package takes, and checks nothing by itself."""

import os
import pathlib
import tomllib

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; flax brings it")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_workflow_sets_python_up_and_calls_ci_run():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (setup,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
    assert setup["with"] == {"python-version": "${{ matrix.python-version }}"}
    pythons = job["strategy"]["matrix"]["python-version"]
    assert all(isinstance(version, str) for version in pythons)  # 3.10 as a number is 3.1
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert pythons == [oldest, "3.12", "3.13"]


def test_ci_run_can_be_executed():
    assert os.access(ROOT / ".ci/run", os.X_OK)
