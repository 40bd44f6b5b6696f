"""Settings of every test: on CPU unless asked otherwise, no silent broadcast over a missing axis; fixtures that files share."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, in whatever process, the others take; compiling is most of what the suite does. Workers and commands
# inherit these variables from the process that pytest was started in, which removes the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vffjax-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from oracles import traced_afresh
from vffjax.cli import main as cli

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    return jax.random.key(7)


@pytest.fixture
def traces():
    """For tests that change what compiled functions are traced from: see `oracles.traced_afresh`."""
    with traced_afresh():
        yield


@pytest.fixture
def call(capsys):
    """Runs a command in process; returns status, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, arguments)))
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(call):
    """The command must end with status 2, nothing on stdout, and one line on stderr that holds all `parts`."""

    def run(*arguments, parts):
        status, out, err = call(*arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith("vffjax: error: ")
        assert "Traceback" not in err
        missing = [part for part in parts if part not in err]
        assert not missing, f"{missing} not in {err}"

    return run


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # makes the import raise ImportError
