"""Several processes, mostly one on each machine, that train one run together: how they find each other, wait for each other, and agree.

Process 0 is the first: it alone writes records and pictures. What the processes tell each other here goes through JAX's coordination
service, which process 0 runs, and not through their devices, so that it cannot be mixed up with the collectives of a training program. In
a run of one process nothing here waits, and JAX is not imported before a function needs it.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from vffjax.errors import UserError, notice, printable, said

T = TypeVar("T")
HEARTBEAT = 100  # seconds of silence after which a process counts as lost, unless --heartbeat says otherwise
BAD_INPUT = 2  # the exit status of a process that bad input has ended
LOST = 1  # the exit status of a process that ends because another one did
AGAIN = "give all processes the same command again, on this or another number of hosts: the run goes on from what is saved"
CORRECT = "correct that, and give all processes their command again"
_POLL = 1.0  # seconds between two looks at the other processes
_GRACE = 3.0  # seconds in which a process may say itself what is wrong, before it is ended because another one has ended
_MARGIN = 5.0  # seconds that a loaded machine may be late by
_WAIT = 7 * 24 * 3600 * 1000  # milliseconds for what takes as long as it takes: a process that is lost is noticed by `together`
_AUTO = "auto"
# Where the coordination service keeps who lives, who has ended and how, and who needs the service no more.
_ALIVE, _ENDED, _GONE = "vffjax/alive/", "vffjax/ended/", "vffjax/gone/"


class Processes(NamedTuple):
    """What the command line says about the processes of a run.

    Attributes:
        coordinator: the address HOST:PORT of process 0, or `auto`: JAX finds out everything from the cluster.
        number: of processes; None with `auto`.
        process: the number of this one, from 0; None with `auto`.
        heartbeat: seconds of silence after which a process counts as lost.
    """

    coordinator: str
    number: int | None = None
    process: int | None = None
    heartbeat: int = HEARTBEAT


class _State:
    """What this process knows of the others. JAX has one such group of processes in a process, and so there is one state."""

    joined = False  # whether `join` has made this process one of several
    heartbeat = HEARTBEAT
    watched = False
    lost = 0  # processes that will never say that they leave
    session = 0  # how many times `together` was entered, so that what a run has said does not count in the next one
    last_words: subprocess.Popen[bytes] | None = None
    exchanges = itertools.count()


def join(given: Processes) -> None:
    """Connects this process with the others of its run. To be called before JAX looks for devices.

    Raises:
        UserError: JAX finds no cluster, or the processes do not find each other.
    """
    import jax

    # JAX's own answer to SIGTERM would replace that of `runs.termination`, and stop nothing by itself.
    jax.config.update("jax_enable_preemption_service", False)
    auto = given.coordinator == _AUTO
    shown = f"--coordinator={given.coordinator}"
    try:
        # JAX's own watch aborts a process without advice, so `together`, which gives some, has to end it earlier. A process that is lost
        # was last heard by JAX up to half of this time before.
        jax.distributed.initialize(
            None if auto else given.coordinator,
            given.number,
            given.process,
            cluster_detection_method=None if auto else "deactivate",
            initialization_timeout=max(given.heartbeat, 10),
            heartbeat_timeout_seconds=2 * math.ceil(given.heartbeat + 2 * _POLL + _GRACE + _MARGIN),
            shutdown_timeout_seconds=given.heartbeat,
        )
    except (ValueError, TypeError) as error:
        fix = "give --coordinator HOST:PORT --processes N --process I" if auto else "give HOST:PORT, such as 10.0.0.1:8476"
        raise UserError(f"{shown}: JAX does not find the processes of this run ({said(error)}); {fix}") from error
    except RuntimeError as error:
        fix = "start all processes within this time, all with the address of process 0, at which no other program listens"
        raise UserError(f"{shown}: the processes do not find each other in {given.heartbeat} s ({said(error)}); {fix}") from error
    _State.joined, _State.heartbeat = True, given.heartbeat
    if count() > 1:
        _State.last_words = _prepare_last_words()


def joined() -> bool:
    """Whether this process has been made one of several."""
    return _State.joined


def count() -> int:
    """How many processes train together; 1 if this one is alone."""
    import jax

    return jax.process_count()


def index() -> int:
    """The number of this process, from 0."""
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes records and pictures; a process that is alone is."""
    return index() == 0


def barrier() -> None:
    """Waits until all processes are here. All must call the functions that wait in the same order."""
    if count() > 1:
        _client().wait_at_barrier(f"vffjax/barrier/{next(_State.exchanges)}", _WAIT)


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of the processes. A value must be one of JSON."""
    if count() == 1:
        return [value]
    number, client = next(_State.exchanges), _client()
    folder = f"vffjax/exchange/{number}/"
    client.key_value_set(f"{folder}{index()}", json.dumps(value))
    client.wait_at_barrier(f"vffjax/barrier/{number}", _WAIT)
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    client.wait_at_barrier(f"vffjax/read/{number}", _WAIT)
    if is_first():
        client.key_value_delete(folder)
    return [found[process] for process in range(count())]


def of_first(value: T) -> T:
    """The value of process 0, on all processes."""
    return gathered(value if is_first() else None)[0]  # type: ignore[return-value]


def any_of(value: bool) -> bool:
    """Whether the value is true on any process. All get the same answer."""
    return any(gathered(bool(value)))


def check_same(values: Mapping[str, Any], fix: str) -> None:
    """Raises `UserError` on every process unless all have the same values; the message names the first that differs.

    Args:
        values: by name, in the types of JSON.
        fix: what a user shall do if one differs.
    """
    every = gathered(dict(values))
    for process, there in enumerate(every):
        for name in sorted({*every[0], *there}):
            if every[0].get(name) != there.get(name):
                here, other = (printable(repr(found.get(name)), 100) for found in (every[0], there))
                raise UserError(f"{name}: {here} in process 0, and {other} in process {process}; {fix}")


@contextlib.contextmanager
def first_only() -> Iterator[bool]:
    """Gives whether this process is the first. When the block ends, all processes wait until the first has left it.

    If the first raises an `OSError` or a `UserError`, the others raise a `UserError` with the same words.
    """
    problem: Exception | None = None
    try:
        yield is_first()
    except (OSError, UserError) as error:
        if count() == 1:
            raise
        problem = error
    told = of_first(str(problem) if problem is not None else "")
    if problem is not None:
        raise problem
    if told:
        raise UserError(told)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around the work of a run: if another process ends, or is lost, this one says so, and ends with the status `LOST`.

    If the work ends here by an error, the other processes are told. In a run of one process, and within itself, this does nothing.
    """
    if count() == 1 or _State.watched:
        yield
        return
    _State.watched, _State.session, done = True, _State.session + 1, threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), name="vffjax-hosts", daemon=True)
    watch.start()
    try:
        yield
        barrier()
    except BaseException as error:
        _tell(str(error) or type(error).__name__, CORRECT if isinstance(error, UserError) else AGAIN)
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError) and _lost_contact(error):
            why = f"the connection to another process of this run broke ({said(error)})"
            if joined():
                _end(threading.Event(), why, 0.0)
            raise UserError(f"{why}; {AGAIN}") from error
        raise
    finally:
        done.set()
        watch.join()
        _State.watched = False


def leave(status: int) -> None:
    """Ends this process with a status, if it is one of several that were joined.

    JAX would wait at Python's end for all the others, also after a failure, and then end with a status of its own.
    """
    if not joined():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        if status:
            _tell(f"with status {status}", CORRECT if status == BAD_INPUT else AGAIN, replace=False)
        if is_first():  # with it goes the service, by which the others learn what has happened
            until = time.monotonic() + 2 * _GRACE
            while time.monotonic() < until and len(_client().key_value_dir_get(_GONE)) < count() - 1 - _State.lost:
                time.sleep(0.05)
            time.sleep(0.2)
        else:
            _client().key_value_set(f"{_GONE}{index()}", "")
    if _State.last_words is not None and _State.last_words.stdin is not None:  # this process has said why
        with contextlib.suppress(OSError, ValueError):
            _State.last_words.stdin.write(b".")
            _State.last_words.stdin.close()
    os._exit(status)


def _prepare_last_words() -> "subprocess.Popen[bytes] | None":
    """A small process that waits for the end of this one, and says what to do if this one has not said why it ends.

    If process 0 is lost, JAX aborts all others at once, and no Python code runs in them any more.
    """
    text = f"vffjax: error: a process of this run ended at once, mostly because process 0 is lost; {AGAIN}"
    program = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr)"
    with contextlib.suppress(OSError):  # without it a line is missing, and nothing else
        # In a session of its own, so that Ctrl-C does not end it too.
        return subprocess.Popen([sys.executable, "-I", "-S", "-c", program, text], stdin=subprocess.PIPE, start_new_session=True)
    return None


def _client() -> Any:
    """The client of JAX's coordination service. JAX documents no other way to it; Orbax takes this one too."""
    from jax._src import distributed

    return distributed.global_state.client


def _lost_contact(error: BaseException) -> bool:
    """Whether an error of the runtime says that another process is gone."""
    words = ("Gloo", "gloo", "NCCL", "coordination service", "CoordinationService", "UNAVAILABLE", "DEADLINE", "heartbeat", "Connection")
    return any(word in str(error) for word in words)


def _tell(words: str, advice: str, replace: bool = True) -> None:
    """Tells the other processes how this one ends and what to do then; unless `replace`, only if they have not been told yet."""
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_ENDED}{_State.session}/{index()}", json.dumps([printable(words, 300), advice]), allow_overwrite=replace)


def _watch(done: threading.Event) -> None:
    """Says every second that this process lives, and ends it if another one has ended or is silent."""
    client, heard, beat = _client(), dict[int, tuple[str, float]](), itertools.count()
    while not done.wait(_POLL):
        try:
            client.key_value_set(f"{_ALIVE}{index()}", str(next(beat)), allow_overwrite=True)
            alive, ended = client.key_value_dir_get(_ALIVE), client.key_value_dir_get(f"{_ENDED}{_State.session}/")
        except Exception as error:
            _end(done, f"process 0, which coordinates this run, is gone ({said(error)})")
            continue
        now = time.monotonic()
        for key, text in alive:
            process = int(key.rpartition("/")[2])
            if heard.get(process, ("", 0.0))[0] != text:
                heard[process] = text, now
        for key, text in ended:
            if int(key.rpartition("/")[2]) != index():
                words, advice = json.loads(text)
                _end(done, f"process {key.rpartition('/')[2]} of this run has ended ({words})", advice=advice)
        silent = [process for process, (_, last) in heard.items() if process != index() and now - last > _State.heartbeat]
        _State.lost = len(silent)
        for process in silent[:1]:
            _end(done, f"process {process} of this run has been silent for {_State.heartbeat} s")


def _end(done: threading.Event, why: str, grace: float = _GRACE, advice: str = AGAIN) -> None:
    """Ends this process, unless it ends by itself meanwhile, and then with its own words."""
    if not done.wait(grace):
        notice(f"vffjax: error: {why}; {advice}")
        leave(LOST)
        os._exit(LOST)  # where a program has joined the processes itself
