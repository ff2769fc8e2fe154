"""What the keys of a record and of its turns mean, in every format alike.

    read        the conversation, images, ``id``; ``system``, ``history``; of a turn ``loss``, ``weight``, ``train``
    refused     what would change what is trained, and cannot be done here: by name, with what to do instead
    harmless    what is about the record and not of it
    unknown     none of these: the record is taken, and a report counts the key once a source

A key whose value is empty (null, "", [], {}) says nothing: tables have one for every column.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_vlm.errors import DataError, Reason

SYSTEM = ("system", "system_prompt")
LOSS = ("loss", "train", "weight")
_PAIRS = (
    "pairs of a better and a worse answer are for preference training, which is not built: keep the answer to learn"
)
_SOUND = "sound is not trained on here: leave such records out"
_TOOLS = "calls of tools are not trained on here: write them into the texts, or leave such records out"
REFUSED = {
    "tools": _TOOLS, "functions": _TOOLS, "tool_calls": _TOOLS, "function_call": _TOOLS,
    "audio": _SOUND, "audios": _SOUND,
    "objects": "other programs fill boxes and names of 'objects' into the texts (<bbox>, <ref-object>): write them there",
    "documents": "documents are no part of a prompt here: write them into the texts",
    "chosen": _PAIRS, "rejected": _PAIRS, "rejected_response": _PAIRS, "rejected_messages": _PAIRS,
    "rejected_images": _PAIRS, "positive_messages": _PAIRS, "negative_messages": _PAIRS, "kto_tag": _PAIRS,
    "reasoning_content": "thoughts beside an answer are not trained on here: write them into the answer, or remove the key",
    "loss_scale": "only whole turns are left out of the loss, by loss, weight or train: remove the key",
}  # fmt: skip
IMAGE_NAMES = (
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "image_url",
    "image_urls",
    "img",
    "imgs",
    "img_path",
)
"""Names that other programs have for ``image``: refused where a record has no image under its own."""
HARMLESS = frozenset({
    "id", "idx", "index", "uid", "uuid", "hash", "key", "__key__", "__url__", "__local_path__", "source", "sources",
    "dataset", "dataset_name", "data_source", "data_name", "origin", "from_dataset", "category", "categories",
    "subcategory", "type", "task", "task_type", "task_name", "ability", "subset", "split", "lang", "language",
    "url", "urls", "width", "height", "width_list", "height_list", "image_width", "image_height", "image_size",
    "image_id", "image_ids", "question_id", "sample_id", "conv_id", "conversation_id", "license", "licence", "meta",
    "metadata", "score", "scores", "rating", "ratings", "quality", "timestamp", "date", "created", "created_at",
    "model", "num_turns", "length", "tokens", "num_tokens", "n_tokens", "tags", "tag", "difficulty", "domain",
    "answer_type", "question_type", "filename", "file_name", "name", "caption_source", "relevance_ratings",
    "relevance_min", "image_correspondence_ratings", "image_correspondence_min", "visual_dependency_ratings",
    "visual_dependency_min", "formatting_ratings", "formatting_min", "total_length", "markdown", "annotator",
    "annotations", "refusal", "finish_reason",
})  # fmt: skip


def says_nothing(value: Any) -> bool:
    """Whether a value is as good as an absent key."""
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)


def unknown_keys(data: Mapping[str, Any], read: Collection[str], where: str = "") -> Iterator[str]:
    """Yields the keys that no list has.

    Args:
        data: of a record, or of a turn.
        read: keys that are read.
        where: of a turn: how errors and reports name it.

    Raises:
        DataError: a key that is refused, or a loss of the whole record.
    """
    for key, value in data.items():
        if key in read or says_nothing(value):
            continue
        if key in REFUSED:
            raise DataError(f"{where and where + ': '}'{key}': {REFUSED[key]}", reason=Reason.UNSUPPORTED)
        if not where and key in LOSS:
            if not switch(value, f"'{key}'"):
                raise DataError(f"'{key}' {value!r} of a whole record: leave the record out", reason=Reason.UNSUPPORTED)
        elif key not in HARMLESS:
            yield str(key)[:60]


def loss_of(item: Mapping[str, Any], role: str, where: str) -> bool:
    """Returns whether a turn's own keys leave it in the loss.

    Raises:
        DataError: a weight between nothing and all, keys that disagree, or a loss asked for on what is no answer.
    """
    said = {key: switch(item[key], f"{where}: '{key}'") for key in LOSS if not says_nothing(item.get(key))}
    if len(set(said.values())) > 1:
        raise DataError(f"{where}: {', '.join(said)} say different things of its loss", reason=Reason.UNSUPPORTED)
    asked = [key for key in ("loss", "train") if said.get(key)]
    if asked and role != "assistant":
        message = (
            f"{where}: '{asked[0]}' asks for a loss on a {role} turn: only answers can be asked for; remove the key"
        )
        raise DataError(message, reason=Reason.UNSUPPORTED)
    return all(said.values())


def switch(value: Any, where: str) -> bool:
    """Returns a switch that may be written as a number; raises DataError for anything but 0, 1, false and true."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"{where} {value!r}: only 0 and 1 (false and true) can be done here", reason=Reason.UNSUPPORTED)


def system_of(data: Mapping[str, Any]) -> str | None:
    """Returns the system text beside a conversation; None: there is none.

    Raises:
        DataError: not a text, or two that differ.
    """
    found = {key: data[key] for key in SYSTEM if not says_nothing(data.get(key))}
    for key, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"'{key}' must be a text, this is {type(value).__name__}")
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} are two system texts: keep one")
    return next(iter(found.values()), None)


def history_of(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the pairs of question and answer that come before a conversation; raises DataError."""
    history = data.get("history")
    if says_nothing(history):
        return []
    pairs: list[Any] = history if isinstance(history, list) else [history]
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history[{index}] must be a list of two texts, a question and its answer")
    return [(question, answer) for question, answer in pairs]
