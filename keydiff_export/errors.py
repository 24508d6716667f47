"""The one exception that a user's input can cause."""


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do. The CLI exits with code 2."""
