"""The errors that a user can fix: one clear line, and the exit status of a script.

A message names the argument or file, says what is wrong, and what to do.
"""


class UserError(Exception):
    """Something that the user can fix. Scripts print the message and exit with ``status``."""

    status = 1


class FlagError(UserError):
    """A flag, or a combination of flags, is wrong. Only scripts raise it."""

    status = 2


class ArgumentError(UserError):
    """An argument of the library is wrong. Scripts print its flag, by default of the same name.

    Args:
        name: The argument, or the field of a dataclass.
        text: Its value, what is wrong, and what to do, such as ``48: must be at most 32``.
    """

    status = 2

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text if text.startswith(":") else f" {text}"
        super().__init__(f"{name}{self.text}")


class FileError(UserError):
    """A file or folder is missing, unreadable, foreign, or could not be written."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


class MeasurementError(UserError):
    """A measurement cannot go on, for example because the curvature of the loss is not finite."""
