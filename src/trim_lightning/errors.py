"""The errors a user can cause and cure: one line that says what, where, and what to do."""


class UserError(Exception):
    """A mistake in the config, the data or the model that the user can mend.

    The entry points print its message as ``error: <message>`` on one line and exit with 2, without a
    traceback. Say what is wrong, where (file, line or key), and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """First line of an exception's text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__
