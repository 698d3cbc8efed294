"""Errors that the user can fix. Each has a one-line message and an exit status for scripts.

A message names the argument or file, the problem, and the remedy.
"""


class UserError(Exception):
    """An error that the user can fix. Scripts print the message and exit with ``status``."""

    status = 1


class FlagError(UserError):
    """A flag or a combination of flags is invalid. Only scripts raise it."""

    status = 2


class ArgumentError(UserError):
    """A library argument is invalid. Scripts print the corresponding flag, which has the same name by default.

    Args:
        name: The argument or dataclass field.
        text: Its value, what is wrong and what to do, such as ``48: must be at most 32``.
    """

    status = 2

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text if text.startswith(":") else f" {text}"
        super().__init__(f"{name}{self.text}")


class FileError(UserError):
    """A file or folder is missing, unreadable, not from this project, or cannot be written."""


class TrainingError(UserError):
    """Training cannot continue, for example because the loss is not finite."""


class MeasurementError(UserError):
    """A measurement cannot continue, for example because the curvature of the loss is not finite."""
