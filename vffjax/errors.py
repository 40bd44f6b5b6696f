"""The one error that a user can cause."""


class UserError(Exception):
    """Bad input: the message is one line that names the key or file, its value, and the fix.

    The command line prints it without a traceback and ends with exit status 2.
    """


def bad_key(key: str, value: object, problem: str, fix: str) -> UserError:
    """The error for a configuration value: `config.KEY=VALUE: problem; fix`."""
    return UserError(f"config.{key}={value!r}: {problem}; {fix}")
