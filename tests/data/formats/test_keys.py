"""Keys of records and turns mean the same in every format: read, refused by name, harmless, or reported."""

import json

import pytest

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.view.check import check_sources
from megatron_vlm.errors import DataError, Reason
from tests.data.formats.make import built, picture, records_of, samples_of, write_json, write_pictures, write_tar

KINDS = (
    "llava",
    "xcomposer",
    "internvl",
    "openai",
    "parquet:conversations",
    "parquet:messages",
    "parquet:texts",
    "webdataset",
)
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
PLAIN = [("user", "Hi", {}), ("assistant", "Salut", {})]


def write(folder, kind, turns, beside=(), images=()):
    """Writes one record in a format and returns (format, path)."""
    format, _, column = kind.partition(":")
    mark = "<ImageHere>" if format == "xcomposer" else "<image>"
    turns = [(role, text.replace("<image>", mark), extra) for role, text, extra in turns]
    beside = json.loads(json.dumps(dict(beside)).replace("<image>", mark))
    conversations = [{"from": ROLES[role], "value": text, **extra} for role, text, extra in turns]
    messages = [{"role": role, "content": text, **extra} for role, text, extra in turns]
    texts = [{"user": q[1], "assistant": a[1], **a[2]} for q, a in zip(turns[::2], turns[1::2])]
    main = {"conversations": conversations, "messages": messages, "texts": texts}
    if format == "webdataset":
        members = [(f"a.{i}.png", picture(i)) for i in range(len(images))]
        record = {"conversations": conversations, **beside}
        return format, write_tar(folder / "a.tar", [*members, ("a.json", json.dumps(record).encode())])
    if format == "parquet":
        import pyarrow
        import pyarrow.parquet

        row = {column: main[column], **beside, **({"images": list(images)} if images else {})}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "a.parquet")
        return format, folder / "a.parquet"
    column = "messages" if format == "openai" else "conversations"
    record = {column: main[column], **beside, **({"images": list(images)} if images else {})}
    return format, write_json(folder / "a.jsonl", [record])


def read(folder, kind, turns, beside=(), images=()):
    """Builds the record and returns its turns as (role, text, loss)."""
    write_pictures(folder, 2)
    format, path = write(folder, kind, turns, beside, images)
    built(folder / "out", format, path, root=str(folder))
    (sample,) = samples_of(folder / "out")
    return [(turn.role, turn.text, turn.loss) for turn in sample.turns]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_conversation(tmp_path, kind, key):
    wanted = [("system", "Answer in French.", True), ("user", "Hi", True), ("assistant", "Salut", True)]
    assert read(tmp_path, kind, PLAIN, {key: "Answer in French."}) == wanted
    format, path = write(tmp_path, kind, PLAIN, {"system": "One.", "system_prompt": "Two."})
    assert "two system texts" in str(records_of(format, path)[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "texts" not in kind])
def test_a_system_text_twice(tmp_path, kind):
    turns = [("system", "One.", {}), *PLAIN]
    assert read(tmp_path, kind, turns, {"system": "One."})[0] == ("system", "One.", True)
    format, path = write(tmp_path, kind, turns, {"system": "Two."})
    assert "keep one" in str(records_of(format, path)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_history_comes_before_the_conversation(tmp_path, kind):
    turns = [("user", "And <image>?", {}), ("assistant", "blue", {})]
    found = read(tmp_path, kind, turns, {"history": [["Is <image> red?", "no"], ["Sure?", "yes"]]}, ["0.png", "1.png"])
    texts = ["Is <image> red?", "no", "Sure?", "yes", "And <image>?", "blue"]
    assert found == [(("user", "assistant")[i % 2], text, True) for i, text in enumerate(texts)]
    if "parquet" not in kind:  # whose columns have one type
        format, path = write(tmp_path, kind, PLAIN, {"history": [["Hi"]]})
        assert "history[0] must be a list of two texts" in str(records_of(format, path)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "key, off, on", [("loss", False, True), ("weight", 0, 1), ("train", False, True), ("weight", 0.0, 1.0)]
)
def test_a_turn_may_have_no_loss(tmp_path, kind, key, off, on):
    turns = [
        ("user", "Hi", {}),
        ("assistant", "WRONG", {key: off}),
        ("user", "Again", {}),
        ("assistant", "ok", {key: on}),
    ]
    assert [loss for _, _, loss in read(tmp_path, kind, turns)] == [True, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_cannot_be_done_is_refused(tmp_path, kind):
    def said(extra, role="assistant"):
        turns = [(r, text, extra if r == role else {}) for r, text, _ in PLAIN]
        (found,) = records_of(*write(tmp_path, kind, turns))
        assert found.reason is Reason.UNSUPPORTED
        return str(found)

    assert "'weight' 0.5: only 0 and 1" in said({"weight": 0.5})
    assert "'loss' 'no': only 0 and 1" in said({"loss": "no"})
    assert "loss, weight say different things" in said({"loss": True, "weight": 0})
    if "texts" not in kind:
        assert "'train' asks for a loss on a user turn" in said({"train": True}, "user")


REFUSED = {
    "tools": [{"name": "f"}], "functions": "f", "audios": ["a.mp3"], "audio": "a.mp3", "objects": {"ref": ["cat"]},
    "rejected_response": "no", "chosen": "yes", "documents": ["d"], "loss": False, "weight": 0.5, "img": "0.png",
    "image_path": "0.png",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_change_training_is_refused_by_name(tmp_path, kind):
    for key, value in REFUSED.items():
        (found,) = records_of(*write(tmp_path, kind, PLAIN, {key: value}))
        assert isinstance(found, DataError) and found.reason is Reason.UNSUPPORTED and f"'{key}'" in str(found), key
        empty = [] if isinstance(value, list) else None
        (found,) = records_of(*write(tmp_path, kind, PLAIN, {key: empty, "id": 3}))
        assert not isinstance(found, DataError) and not found.unknown, (key, found)  # a column without a value


@pytest.mark.parametrize("kind", KINDS)
def test_harmless_keys_pass_and_unknown_ones_are_reported_once(tmp_path, kind, caplog):
    turns = [(role, text, {"colour": "red", "id": 1}) for role, text, _ in PLAIN]
    beside = {"id": "x", "source": "s", "width": 3, "lang": "en", "score": 0.5, "mood": "good"}
    (record,) = records_of(*write(tmp_path, kind, turns, beside))
    column = {"openai": "messages", "parquet:messages": "messages", "parquet:texts": "texts"}.get(kind, "conversations")
    assert record.unknown == (f"{column}[].colour", "mood")
    format, path = write(tmp_path, kind, turns, beside)
    (warning,) = [found for found in check_sources(open_sources(format, [path])) if isinstance(found, DataError)]
    assert warning.reason is Reason.UNKNOWN_KEYS and "mood (1)" in str(warning) and str(path) in str(warning)
    with caplog.at_level("WARNING"):
        built(tmp_path / "out", format, path)
    (line,) = caplog.messages
    assert "keys that are not known and not read" in line and path.name in line and f"{column}[].colour (1)" in line
