"""The exceptions that cnnpipe raises for a user to read.

CnnpipeError                     exit status 1
├── ConfigError                  a setting or a settings file is wrong
│   └── UsageError               exit status 2: an option of the command line is wrong
├── DatasetError                 a dataset cannot be prepared or read
│   ├── DownloadError            a dataset could not be fetched whole
│   └── ImageError               one image cannot be decoded; carries its `kind`
├── TrainingError                training cannot start or went wrong
├── ModelError                   a model is missing, damaged or not one of ours
│   └── ParityError              an exported model disagrees with its original
├── RegistryError                a run or an alias is missing or half written
├── ProviderError                the device asked for cannot be used
│   └── GpuMemoryError           the GPU has no room for a batch
├── PredictionsError             the table of predictions cannot be written
├── StorageError                 a file cannot be written (full, read-only)
│   └── AlreadyThereError        a file is there already and may not be replaced
├── ServerError                  no Prefect server or Dask scheduler could be reached or started
└── FailureBudgetError           exit status 3: finished, but too many images failed

Every message is one line: what is wrong, what was received, how to mend it.
"""

from __future__ import annotations

__all__ = [
    "AlreadyThereError",
    "CnnpipeError",
    "ConfigError",
    "DatasetError",
    "DownloadError",
    "FailureBudgetError",
    "GpuMemoryError",
    "ImageError",
    "ModelError",
    "ParityError",
    "PredictionsError",
    "ProviderError",
    "RegistryError",
    "ServerError",
    "StorageError",
    "TrainingError",
    "UsageError",
    "one_line",
]


def one_line(text: object, max_length: int = 200) -> str:
    """Return what another library says, such as an exception, on one line.

    What is too long loses its middle: some libraries begin with the reason, others end with it.

    Args:
        max_length: of the line, characters; at least 3.
    """
    line = " ".join(str(text).split())
    start = (max_length - 2) // 2
    return line if len(line) <= max_length else f"{line[:start]} …{line[len(line) - (max_length - 2 - start) :]}"


class CnnpipeError(Exception):
    """Base of every error that is shown to the user as one line."""

    exit_status = 1


class ConfigError(CnnpipeError):
    """A setting or a settings file is wrong."""


class UsageError(ConfigError):
    """An option of the command line is wrong."""

    exit_status = 2


class DatasetError(CnnpipeError):
    """A dataset cannot be prepared or read."""


class DownloadError(DatasetError):
    """A dataset could not be fetched whole."""


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
    """Training cannot start or went wrong."""


class ModelError(CnnpipeError):
    """A model is missing, damaged or not one of ours."""


class ParityError(ModelError):
    """An exported model disagrees with the model it came from."""


class RegistryError(CnnpipeError):
    """A run or an alias is missing or half written."""


class ProviderError(CnnpipeError):
    """The device asked for cannot be used."""


class GpuMemoryError(ProviderError):
    """The GPU has no room for a batch."""


class PredictionsError(CnnpipeError):
    """The table of predictions cannot be written."""


class StorageError(CnnpipeError):
    """A file cannot be written: the disk is full, read-only or forbidden."""


class AlreadyThereError(StorageError):
    """A file is there already and may not be replaced."""


class ServerError(CnnpipeError):
    """No Prefect server, or no Dask scheduler with workers, could be reached or started."""


class FailureBudgetError(CnnpipeError):
    """The work is finished and written, but more images failed than allowed."""

    exit_status = 3
