"""Everything gradloc refuses, by kind, and what it warns of by a kind of its own.

Each kind is also the builtin error a caller would expect, so ``except ValueError`` and
``except GradlocError`` both work. A message names the argument, what came, what is allowed, and what
to do next.
"""


class GradlocError(Exception):
    """Base of every error that gradloc raises on purpose."""


class ConfigError(GradlocError, ValueError):
    """An argument has a value that is not allowed."""


class UnknownNameError(GradlocError, KeyError):
    """A name that isn't among those that there are."""

    __str__ = Exception.__str__  # KeyError shows its message in quotes


class UnsupportedError(GradlocError, TypeError):
    """An object of a kind that gradloc can't work with, such as an optimizer that isn't torch's."""


class AlreadyWrappedError(GradlocError, RuntimeError):
    """The optimizer already has a recorder, or the model an annealer that is at work."""


class NotTrainedError(GradlocError, RuntimeError):
    """Something was asked for that training has to make first."""


class NotRecordingError(GradlocError, RuntimeError):
    """Something was asked of a recorder that isn't there, or is closed."""


class RunNotFoundError(GradlocError, FileNotFoundError):
    """There is no run at the path that was named."""


class RunExistsError(GradlocError, FileExistsError):
    """A run is there already, or another process is writing it."""


class StoreError(GradlocError, OSError):
    """The run's directory can't be written or read."""


class DamagedShardError(GradlocError, ValueError):
    """A shard's bytes aren't what its writer left."""


class SchemaVersionError(GradlocError, ValueError):
    """A file was written by a version whose format this one can't read."""


class EmptyRunError(GradlocError, ValueError):
    """The run holds no observation for what was asked."""


class ModelMismatchError(GradlocError, ValueError):
    """A run, mask or plan belongs to another model."""


class NonFiniteError(GradlocError, ArithmeticError):
    """NaN or infinite values where finite ones are needed."""


class CertificateError(GradlocError, AssertionError):
    """A routed model does not compute what its plan promises."""


class WeakEvidenceWarning(UserWarning):
    """Masks were made from tests that can't tell "not needed" from "not known"."""
