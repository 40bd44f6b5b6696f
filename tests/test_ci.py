"""The workflow of CI calls `.ci/run` on every Python from the oldest that the package takes, and checks nothing by itself."""

import os
import re
import tomllib

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler

from command_lines import ROOT, in_a_process
from compiled import PINNED

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; flax brings it")


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


def test_the_newest_jax_of_ci_is_the_one_that_the_bounds_of_compilers_are_about():
    """Those tests skip with any other version, and CI would then leave them out in silence."""
    pinned = re.findall(r"^jax==(.*)$", (ROOT / ".ci/constraints-newest.txt").read_text(), re.MULTILINE)
    assert pinned == [PINNED]


def test_ci_run_leaves_no_test_out_and_the_readme_the_slow_ones():
    """Every test runs with one of the compiler's two settings: marked `full_optimisation` in the second call, others in the first."""
    calls = re.findall(r"^python -m pytest(.*)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    whole = [call.replace("--durations=15", "").strip() for call in calls if "files" not in call and "tests/" not in call]
    assert whole == ["", "--full-optimisation -m full_optimisation"]
    (command,) = re.findall(r"^    python3 -m venv .* -m pytest(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command == ' -m "not slow"'


# The level at which XLA's part for CPU compiles, as XLA itself is told it.
LEVEL = """
from jax._src import compiler
print(compiler.get_compile_options(1, 1).executable_build_options.debug_options.xla_backend_optimization_level)
"""


def test_without_the_option_nothing_is_optimised(request):
    if request.config.option.full_optimisation:
        pytest.skip("this session optimises")
    assert (level(), in_a_process("-c", LEVEL).stdout) == (0, "0\n")


@pytest.mark.full_optimisation
def test_with_the_option_everything_is_optimised(request):
    assert request.config.option.full_optimisation
    assert level() >= 2
    assert int(in_a_process("-c", LEVEL).stdout) >= 2


def level():
    jax.jit(lambda x: x + 1)(jnp.zeros(3))  # after a first compilation too
    return compiler.get_compile_options(1, 1).executable_build_options.debug_options.xla_backend_optimization_level
