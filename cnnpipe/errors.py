"""The exceptions that cnnpipe raises for a user to read.

Every message is one line: what is wrong, what was received, how to fix it.
"""

from __future__ import annotations


def one_line(text: object, max_length: int = 200) -> str:
    """Return the text of another library, such as an exception, as one line.

    A line that is too long loses its middle: some libraries begin with the reason, others end with it.

    Args:
        max_length: largest number of characters; at least 3.
    """
    line = " ".join(str(text).split())
    start = (max_length - 2) // 2
    return line if len(line) <= max_length else f"{line[:start]} …{line[len(line) - (max_length - 2 - start) :]}"


class CnnpipeError(Exception):
    """Base of every error that is shown to the user as one line."""

    exit_status = 1
    follows_result = False
    """Whether the command printed its result before: then no JSON object about the error follows it."""


class ConfigError(CnnpipeError):
    """A setting or a settings file is wrong."""


class UsageError(ConfigError):
    """An option of the command line is wrong."""

    exit_status = 2


class DatasetError(CnnpipeError):
    """A dataset cannot be prepared or read."""


class DownloadError(DatasetError):
    """A dataset could not be downloaded completely."""


class ImageError(DatasetError):
    """One image cannot be decoded.

    Args:
        kind: short machine-readable reason, one of `cnnpipe.images.decode.ERROR_KINDS`.
        message: one line for a person.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # The default rebuilds from `args`, which lack `kind`; decoders run in other processes.
        return type(self), (self.kind, str(self))


class TrainingError(CnnpipeError):
    """Training cannot start, or failed."""


class ModelError(CnnpipeError):
    """A model is missing, damaged or not made by cnnpipe."""


class ParityError(ModelError):
    """An exported model disagrees with its original."""


class RegistryError(CnnpipeError):
    """A run or a champion alias is missing or incomplete."""


class ProviderError(CnnpipeError):
    """The requested device cannot be used."""


class GpuMemoryError(ProviderError):
    """The GPU has too little memory for a batch."""


class PredictionsError(CnnpipeError):
    """The table of predictions cannot be written."""


class StorageError(CnnpipeError):
    """A file cannot be written: the disk is full, read-only or forbidden."""


class AlreadyThereError(StorageError):
    """A file exists and may not be replaced."""


class ServerError(CnnpipeError):
    """No Prefect server or Dask scheduler could be reached or started."""


class FailureBudgetError(CnnpipeError):
    """Finished, but more images failed than allowed."""

    exit_status = 3
    follows_result = True
