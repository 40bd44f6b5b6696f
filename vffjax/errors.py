"""The error for bad input, and the lines that the package prints. No line that cannot be printed ends the work."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Bad input. The message is one line that names the key, flag or file, its value, and the fix.

    The command line prints it without a traceback and ends with exit status 2.
    """


def bad_key(key: str, value: object, problem: str, fix: str) -> UserError:
    """The error for a configuration value: `config.KEY=VALUE: problem; fix`. A long value is shortened."""
    try:
        shown = repr(value)
    except Exception as error:  # a whole number with more digits than Python prints, or an object that a configuration file defines
        shown = f"<{type(value).__name__}: {type(error).__name__}>"
    return UserError(f"config.{key}={shortened(shown, 300)}: {problem}; {fix}")


def chosen(key: str, value: Any, table: Mapping[Any, T]) -> T:
    """`table[value]`, where the table holds everything that config.KEY may be. Raises `UserError` for any other value."""
    if value not in table:
        raise bad_key(key, value, "not known here", f"choose one of {', '.join(map(str, table))}")
    return table[value]


def shortened(text: str, limit: int) -> str:
    """`text`; if it has more than `limit` characters, only its beginning and its end."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def printable(text: str, limit: int = 1_000) -> str:
    """`text` as one line that is safe to print: control characters escaped, white space reduced to single spaces, and `shortened`.

    A terminal obeys control characters, and the names and contents of files may come from anyone.
    """
    # Shortened first, so that a text of megabytes takes no time.
    line = " ".join(shortened(text, 2 * limit).split())
    return shortened("".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line), limit)


def said(error: BaseException, limit: int = 200) -> str:
    """What an error is and says, on one line that is safe to print."""
    return f"{type(error).__name__}: {printable(str(error), limit)}"


class SafeStream:
    """Wraps a text stream so that `print` and tqdm never raise.

    The stream may be None, an object without `isatty`, a closed file, or a pipe whose reader has gone. A character that its encoding lacks
    is escaped. `failure` is the first error that lost text, or None; after it nothing more is written.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._write(text))
        return len(text)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._stream is not None and self.failure is None:
            try:
                action()
            except Exception as error:  # in a notebook the stream can be any object
                self.failure = error

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        self._attempt(lambda: getattr(self._stream, "flush", lambda: None)())  # an unbuffered stream may lack it

    def isatty(self) -> bool:
        """Whether the stream says that it is a terminal."""
        try:
            return bool(self._stream.isatty())
        except Exception:
            return False

    def __getattr__(self, name: str) -> Any:  # fileno, encoding and the like, if the stream has them
        if name.startswith("_"):
            raise AttributeError(name)  # while the object is being copied, it has no stream yet
        if self._stream is None and name == "fileno":
            raise io.UnsupportedOperation("there is no stream, and so no file descriptor")
        return getattr(self._stream, name)


def notice(text: str, to: TextIO | None = None) -> None:
    """Prints one `printable` line on stderr, or on `to`. If the stream is missing or closed, the line is lost, and nothing else happens."""
    stream = SafeStream(sys.stderr if to is None else to)  # looked up at each call, because it may have been replaced
    stream.write(printable(text) + "\n")
    stream.flush()


@contextlib.contextmanager
def phase(text: str, to: TextIO | None = None) -> Iterator[None]:
    """Shows `text` on stderr, or on `to`, while the work within goes on, if the stream is a terminal."""
    stream = SafeStream(sys.stderr if to is None else to)
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
    """For work that changes no result, such as drawing a picture. If it fails, `notice` says so, and the run continues."""
    try:
        yield
    except (Exception, SystemExit) as error:  # some libraries exit Python if they cannot be imported
        notice(f"{what} is left out ({said(error, 300)}); the result stands")
