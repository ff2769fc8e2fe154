"""Every error that a user can cause. Each message says what happened, shows the numbers and says what to set."""


class MegatronVLMError(Exception):
    """Base of the errors below: the command line prints these without a traceback and exits with 1."""


class ConfigError(MegatronVLMError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(MegatronVLMError):
    """A sample, record or shard that cannot be used; names the culprit.

    Args:
        message: what is wrong and what to do.
        key: key of the sample, where one is known.
        shard: file that holds it.
        offset: byte offset in that file, or record number for raw json input.
    """

    def __init__(self, message: str, *, key: str | None = None, shard: str | None = None, offset: int | None = None):
        where = ", ".join(
            f"{name} {value}" for name, value in (("sample", key), ("in", shard), ("at", offset)) if value is not None
        )
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.key, self.shard, self.offset = message, key, shard, offset

    def __reduce__(self):  # keyword-only fields survive the trip out of a worker process
        return _rebuild_data_error, (self.message, self.key, self.shard, self.offset)


def _rebuild_data_error(message: str, key: str | None, shard: str | None, offset: int | None) -> DataError:
    return DataError(message, key=key, shard=shard, offset=offset)


class ConversionError(MegatronVLMError):
    """Weights that do not fit the model: missing, unexpected or badly shaped tensors, or a wrong family."""


class CheckpointError(MegatronVLMError):
    """A training checkpoint that is absent, incomplete or damaged."""


class TrainingError(MegatronVLMError):
    """A run that cannot go on: out of memory, or numbers that are not finite."""
