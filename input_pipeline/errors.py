"""The one error of the input pipeline."""


class DataError(ValueError):
    """Data that cannot be used: the message names the file (and line), what was found and what is expected.

    Holds its message as the only argument, so that it comes unchanged through the pickling between processes.
    """

    def __init__(self, message: str):
        super().__init__(message)
