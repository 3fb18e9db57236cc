"""The one error root. Every message names the thing, the value and the remedy."""


class StaticKeyError(ValueError):
    """Root of all errors this package raises on purpose."""


class FeatSizeError(StaticKeyError):
    """A token grid does not fit the layer or the input."""


class BackendError(StaticKeyError):
    """The requested attention backend cannot run on these inputs."""


class UnknownNameError(StaticKeyError):
    """A mixer, model or data set of that name does not exist."""


class UnsupportedHostError(StaticKeyError):
    """A model whose attention cannot be swapped."""


class DataError(StaticKeyError):
    """Training or test data is missing, empty or broken."""


class OutputError(StaticKeyError):
    """A result cannot be written, or would overwrite somebody's work."""


class DivergedError(StaticKeyError):
    """Training produced a loss that is not finite."""
