"""The one error that a user can cause."""


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
