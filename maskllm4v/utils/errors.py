"""What a user can do wrong, as one family of exceptions."""

from maskllm4v.utils.redaction import redacted


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: bad settings, wrong files, unfit layers.

    The command line and the stages print its message, without a traceback, and exit with status 1
    (``verify``: 2, for its 1 says that a file was read and found wrong).
    Messages name the key or file, what was found there, and what is allowed, and never a password in an address.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(UserError):
    """A key of ``params.yaml`` is unknown, missing, of the wrong type, or contradicts another."""


class PatternError(UserError):
    """An N:M pattern is malformed, does not fit a layer, or a mask violates it."""


class CheckpointError(UserError):
    """A file of ours (or one given as a checkpoint) is missing, damaged, or of another model."""


class DataError(UserError):
    """A data source is empty, unreadable, or not what its manifest says."""


class TrainingError(UserError):
    """Training cannot go on, for example because the loss is not finite any more."""


class ExactnessError(UserError):
    """An exact run asks for an operation whose bits depend on the maker of the CPU."""
