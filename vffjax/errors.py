"""The one error that a user can cause, and what is said to people: a line on stderr or stdout never ends the work."""

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Bad input: the message is one line that names the key or file, its value, and the fix.

    The command line prints it without a traceback and ends with exit status 2.
    """


def bad_key(key: str, value: object, problem: str, fix: str) -> UserError:
    """The error for a configuration value: `config.KEY=VALUE: problem; fix`. A long value is shortened."""
    try:
        shown = repr(value)
    except Exception as error:  # a whole number of more digits than Python prints, or an object of a configuration file
        shown = f"<{type(value).__name__}: {type(error).__name__}>"
    return UserError(f"config.{key}={shortened(shown, 300)}: {problem}; {fix}")


def chosen(key: str, value: Any, table: Mapping[Any, T]) -> T:
    """The entry of a table of everything that is known under a configuration's key. Raises `UserError` for a value that it lacks."""
    if value not in table:
        raise bad_key(key, value, "not known here", f"choose one of {', '.join(map(str, table))}")
    return table[value]


def shortened(text: str, limit: int) -> str:
    """`text`, or if it is longer than about `limit` characters its beginning and its end."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def printable(text: str, limit: int = 1_000) -> str:
    """`text` as one line that a terminal shows and does not obey: control characters escaped, white space single, a long one shortened.

    File names, and what files hold, may come from anyone.
    """
    # Shortened first, so that a text of megabytes costs nothing.
    line = " ".join(shortened(text, 2 * limit).split())
    return shortened("".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line), limit)


class SafeStream:
    """A text stream for `print` and tqdm that never raises, whatever stands behind it: nothing at all (`None`), an object without
    `isatty`, a closed file, a reader that has gone, or an encoding that lacks a character, which is then escaped.

    `failure` is the first error that lost some of the text, or None. After it nothing more is written.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        if self._stream is not None and self.failure is None:
            try:
                self._write(text)
            except Exception as error:  # a stream of a notebook is any object
                self.failure = error
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        if self._stream is not None and self.failure is None:
            try:
                self._stream.flush()
            except AttributeError:  # a stream that keeps nothing back may lack it
                pass
            except Exception as error:
                self.failure = error

    def isatty(self) -> bool:
        """Whether a terminal is behind it, as far as it can tell."""
        try:
            return bool(self._stream.isatty())
        except Exception:
            return False

    def __getattr__(self, name: str) -> Any:  # fileno, encoding and the like, where the stream has them
        if name.startswith("_"):
            raise AttributeError(name)  # of an object that is being copied there is no stream yet
        if self._stream is None and name == "fileno":
            raise io.UnsupportedOperation("there is no stream, and so no file descriptor")
        return getattr(self._stream, name)


def notice(text: str) -> None:
    """Prints one line on stderr, as `printable` writes it. Where there is no stderr, or it is closed, the line is lost and nothing else."""
    stream = SafeStream(sys.stderr)  # not earlier: it may have been replaced
    stream.write(printable(text) + "\n")
    stream.flush()


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Shows on a terminal what is being done, as long as it is done. Elsewhere nothing is written."""
    stream = SafeStream(sys.stderr)
    if stream.isatty():
        stream.write(f"\r\x1b[K{text} ...")
        stream.flush()
    try:
        yield
    finally:
        if stream.isatty():
            stream.write("\r\x1b[K")
            stream.flush()


@contextlib.contextmanager
def aid(what: str) -> Iterator[None]:
    """For work that helps people and changes no result, such as a picture: if it fails, `notice` says so and the run goes on."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a library may end Python where it cannot be imported
        notice(f"{what} is left out ({type(error).__name__}: {printable(str(error), 300)}); the result stands")
