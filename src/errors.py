"""The errors that a user can mend: each is one clear line, and carries the exit status of a script.

A message names the flag or the file, says what is wrong, and says what would be right.
"""


class UserError(Exception):
    """Something that the user can mend. Scripts print its message and exit with ``status``."""

    status = 1


class FlagError(UserError):
    """A flag (or a combination of flags) is wrong."""

    status = 2


class FileError(UserError):
    """A file or folder is missing, unreadable, foreign, or could not be written."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite."""


class MeasurementError(UserError):
    """A measurement cannot go on, for example because the curvature of the loss is not finite."""
