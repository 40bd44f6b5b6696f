"""Settings of every test: on CPU unless asked otherwise, no silent broadcast over a missing axis; fixtures that files share.

Compiling is most of what the tests do, so they compile without optimisation, and all processes of a session share what they have
compiled. Tests about the compiler, about rounding at full optimisation or about speed are marked `full_optimisation` and run in a second
call, `pytest --full-optimisation -m full_optimisation`.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers, and the commands that tests start, inherit these variables from the process that pytest was started in. It removes the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vffjax-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping
import pytest

# A failed assertion of these shows its values, as one of a test does.
pytest.register_assert_rewrite("compiled", "devices_apart", "image_sets", "oracles", "runs")

# Annotations are checked at each call where arrays are passed: jaxtyping's shapes and dtypes. An int may stand for a float, as for mypy.
# `dataflow` is left out. It takes programs and no arrays, and calls its functions so often that checks make it 20 times slower.
PROOFS = (Path(__file__).parent.parent / "vffjax/proofs").glob("*.py")
CHECKED = ["vffjax.ops", "vffjax.networks", "vffjax.rules", "vffjax.training"]
CHECKED += [f"vffjax.proofs.{file.stem}" for file in PROOFS if file.stem != "dataflow"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from oracles import traced_afresh  # noqa: E402
from vffjax.cli import main as cli  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of objects and few cycles. To look for cycles at every 700 new objects would take a twentieth of the time.
gc.set_threshold(100_000, 50, 100)

_NO_OPTIMISATION = "JAX_DISABLE_MOST_OPTIMIZATIONS"  # JAX's own name for XLA's and LLVM's level 0
# XLA's older code for fused loops compiles in a quarter of the time. From jax 0.11 on there is only the newer one.
_OLDER_FUSION = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
# Few tests that take minutes together. They come first, because a worker that began with them last would go on long after the others.
_LONG_FILES = ("test_hosts", "test_notebooks", "test_your_data")
_NEEDS_OPTIMISATION = "needs full optimisation: pytest --full-optimisation -m full_optimisation"


def pytest_addoption(parser):
    parser.addoption("--full-optimisation", action="store_true", help="compile as a run does, for the tests marked full_optimisation")


def pytest_configure(config):
    """Chooses the compiler's settings for this process and, by the environment, for the processes that it starts."""
    flags = os.environ.get("XLA_FLAGS", "").replace(_OLDER_FUSION, "")
    if config.option.full_optimisation:
        os.environ.pop(_NO_OPTIMISATION, None)
    else:
        os.environ[_NO_OPTIMISATION] = "1"
        flags = f"{flags} {_OLDER_FUSION}"
    os.environ["XLA_FLAGS"] = flags.strip()  # read when the first program is compiled
    jax.config.update(_NO_OPTIMISATION.lower(), not config.option.full_optimisation)


def fully_optimised():
    """Whether this process compiles as a run of a user does."""
    return _NO_OPTIMISATION not in os.environ and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", "")


def pytest_collection_modifyitems(items):
    """Puts long files first, and skips tests marked `full_optimisation` without it: they would prove nothing. The others hold with it."""
    items.sort(key=lambda item: item.path.stem not in _LONG_FILES)
    for item in items:
        if item.get_closest_marker("full_optimisation") and not fully_optimised():
            item.add_marker(pytest.mark.skip(reason=_NEEDS_OPTIMISATION))


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(op, left, right):
    """Keeps pytest from comparing long values line by line, as it does where CI is set. That takes 15 minutes for two pictures."""
    try:
        long = max(len(repr(left)), len(repr(right))) > 10_000
    except Exception:  # of a value that has no repr, which pytest copes with
        long = False
    signs = {name: os.environ.pop(name) for name in ("CI", "BUILD_NUMBER") if long and name in os.environ}  # by which pytest knows CI
    try:
        explained = yield
    finally:
        os.environ.update(signs)
    if long and op == "==" and isinstance(left, bytes) and isinstance(right, bytes):
        pairs = zip(left, right, strict=False)
        first = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
        return [[f"{len(left)} bytes == {len(right)} bytes", f"they differ from byte {first} on"]]
    return explained


@pytest.fixture(autouse=True)
def _shared_runs_stay_as_they_are():
    """A test that wrote to a run that others read fails itself. Otherwise another test would fail, and only in some orders."""
    yield
    if "runs" in sys.modules:
        written = sys.modules["runs"].written_in_shared_runs()
        assert not written, f"this test wrote to a shared run; give it a `copy_of` that run: {written}"


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
