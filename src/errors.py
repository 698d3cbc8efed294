"""The errors that a user can mend: each is one clear line, and carries the exit status of a script.

A message names the flag or the file, says what is wrong, and says what would be right.
"""


class UserError(Exception):
    """Something that the user can mend. Scripts print its ``line`` and exit with ``status``.

    Args:
        message: One line for callers of the library, which know arguments and files but no flags.
        line: What scripts print in its place, in terms of flags (default: the message).
    """

    status = 1

    def __init__(self, message: str, line: str | None = None) -> None:
        super().__init__(message)
        self.line = message if line is None else line


class FlagError(UserError):
    """A flag (or a combination of flags) is wrong."""

    status = 2


class ArgumentError(FlagError):
    """An argument of a library function is wrong. Scripts name the flag that sets it.

    Args:
        name: The argument.
        text: Its value, what is wrong with it, and what would be right, such as ``48: must be at most 32``.
        flag: The flag, where its name differs (default: ``--`` and the argument's name).
    """

    def __init__(self, name: str, text: str, flag: str | None = None) -> None:
        separator = "" if text.startswith(":") else " "
        super().__init__(f"{name}{separator}{text}", f"{flag or '--' + name}{separator}{text}")


class FileError(UserError):
    """A file or folder is missing, unreadable, foreign, or could not be written."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


class MeasurementError(UserError):
    """A measurement cannot go on, for example because the curvature of the loss is not finite."""
