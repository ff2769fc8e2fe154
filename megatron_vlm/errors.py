"""Every error that a user can cause. Each message says what happened, shows the numbers and says what to set."""

import difflib
import enum
from collections.abc import Iterable


def printable(text: str) -> str:
    """Returns the text as any terminal and log can take it: half characters (lone surrogates, of file names too) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known name nearest to ``key``, or the known names if they are few."""
    known = sorted(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if match:
        return f" (did you mean {match[0]!r}?)"
    return f" (known: {', '.join(known)})" if len(known) <= 40 else ""


class MegatronVLMError(Exception):
    """Base of the errors below: the command line prints these without a traceback and exits with 1."""

    def __init__(self, *args: object):
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(MegatronVLMError):
    """A setting, or a combination of settings, that cannot work."""


class Reason(enum.Enum):
    """Why a sample cannot be used: what reports call it, and its number in files of token counts (append only).

    The first group is what a processor says of a sample that is sound in itself: a run leaves it out and counts it.
    """

    NONE = "", 0
    TOO_LONG = "too_long", 1
    NOTHING_SUPERVISED = "nothing_supervised", 2
    MAX_IMAGE_NUM = "max_image_num", 4
    CONTROL_TOKENS = "control_tokens", 5
    IMAGE_TOO_SMALL = "image_too_small", 7
    TOO_MANY_PATCHES = "too_many_patches", 8
    IMAGES_FOR_A_TEXT_MODEL = "images_for_a_text_model", 9

    PLACEHOLDERS = "placeholders", 3
    UNREADABLE = "unreadable", 6
    BAD_RECORD = "bad_record", 10
    BAD_JSON = "bad_json", 11
    ROLES = "roles_out_of_order", 12
    EMPTY_ANSWER = "empty_answer", 13
    UNSUPPORTED = "unsupported", 14
    MISSING_IMAGE = "missing_image", 15
    UNREADABLE_IMAGE = "unreadable_image", 16
    DAMAGED_SHARD = "damaged_shard", 17
    DUPLICATE_ID = "duplicate_id", 18
    UNKNOWN_KEYS = "unknown_keys", 19
    SPECIAL_TOKENS_AS_TEXT = "special_tokens_as_text", 20
    SKIPPED_MEMBERS = "skipped_members", 21

    def __init__(self, text: str, number: int):
        self.text, self.number = text, number

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return self is not Reason.NONE

    @property
    def words(self) -> str:
        """As a report for people writes it."""
        return self.text.replace("_", " ")

    @property
    def of_the_processor(self) -> bool:
        """Whether the sample is sound in itself, and only this model with these settings cannot use it."""
        return self in _OF_THE_PROCESSOR

    @property
    def asked_for(self) -> bool:
        """Whether a limit that the run sets itself leaves the sample out: it is counted, and no sign of bad data."""
        return self in (Reason.TOO_LONG, Reason.TOO_MANY_PATCHES, Reason.MAX_IMAGE_NUM)

    @property
    def is_warning(self) -> bool:
        """Whether it is worth saying, and nothing is left out for it."""
        return self in _WARNINGS

    @classmethod
    def numbered(cls, number: int) -> "Reason":
        """Returns the reason that a file of counts means."""
        return _NUMBERED[number]


_NUMBERED = {reason.number: reason for reason in Reason}
_OF_THE_PROCESSOR = frozenset(reason for reason in Reason if reason.number in (1, 2, 4, 5, 7, 8, 9))
_WARNINGS = frozenset({Reason.DUPLICATE_ID, Reason.UNKNOWN_KEYS, Reason.SPECIAL_TOKENS_AS_TEXT, Reason.SKIPPED_MEMBERS})


class DataError(MegatronVLMError):
    """A sample, record or shard that cannot be used; names the culprit.

    Args:
        message: what is wrong and what to do.
        reason: its kind, by which reports count.
        key: key of the sample, where one is known.
        shard: file that holds it.
        offset: byte offset in that file, or record number for raw json input.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: Reason = Reason.BAD_RECORD,
        key: str | None = None,
        shard: str | None = None,
        offset: int | None = None,
    ):
        where = ", ".join(
            f"{name} {value}" for name, value in (("sample", key), ("in", shard), ("at", offset)) if value is not None
        )
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.reason, self.key, self.shard, self.offset = printable(message), reason, key, shard, offset

    def at(self, *, key: str | None = None, shard: str | None = None, offset: int | None = None) -> "DataError":
        """Returns the same error at another place: what is not given is unknown there."""
        return DataError(self.message, reason=self.reason, key=key, shard=shard, offset=offset)

    def __reduce__(self):  # keyword-only fields survive the trip out of a worker process
        return _rebuild_data_error, (self.message, self.reason, self.key, self.shard, self.offset)


def _rebuild_data_error(
    message: str, reason: Reason, key: str | None, shard: str | None, offset: int | None
) -> DataError:
    return DataError(message, reason=reason, key=key, shard=shard, offset=offset)


class ConversionError(MegatronVLMError):
    """Weights that do not fit the model: missing, unexpected or badly shaped tensors, or a wrong family."""


class CheckpointError(MegatronVLMError):
    """A training checkpoint that is absent, incomplete or damaged."""


class TrainingError(MegatronVLMError):
    """A run that cannot go on: out of memory, or numbers that are not finite."""
