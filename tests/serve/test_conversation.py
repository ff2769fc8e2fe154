"""What is asked, and what is kept of it: no file, mark or answer goes to the wrong turn."""

import pytest

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.serve.conversation import Conversation


def test_turns_of_two_models_share_pictures_and_keep_their_own_answers(picture, tmp_path):
    talk = Conversation(["base", "tuned"], "Be short.", [str(picture)])
    first = talk.ask("What?")
    turns = [("system", "Be short."), ("user", "<image>\nWhat?")]
    assert first["asks"] == [{"model": m, "turns": turns, "images": [str(picture)], "videos": []} for m in (0, 1)]
    assert talk.ask("What?") == first  # not answered: nothing has changed
    talk.answered(["a", "b"])
    second = talk.ask("And now?")
    assert [ask["turns"][2] for ask in second["asks"]] == [("assistant", "a"), ("assistant", "b")]
    assert second["number"] == 1 and second["asks"][0]["images"] == [str(picture)] and talk.attached == []
    talk.answered(["c", "d"])
    talk.save(str(tmp_path / "talk.json"))
    (source,) = open_sources("llava", [tmp_path / "talk.json"])
    records = [record for _, _, record in read_source(source)]
    assert [turn.text for turn in records[1].turns] == ["Be short.", "<image>\nWhat?", "b", "And now?", "d"]
    assert records[0].images == (str(picture),) and records[0].label == "base"
    with pytest.raises(ConfigError, match="exists: name another file"):
        talk.save(str(tmp_path / "talk.json"))
    talk.reset()
    assert talk.ask("Who?")["asks"][0]["turns"] == [("system", "Be short."), ("user", "<image>\nWho?")]
    assert talk.ask("Who?")["number"] == 2


def test_marks_say_where_files_go(picture, tmp_path):
    talk = Conversation(["m"])
    with pytest.raises(ConfigError, match="1 <image> for 0 images attached"):
        talk.ask("This <image>?")
    (tmp_path / "clip").mkdir()
    for name in (picture, tmp_path / "clip", picture):
        talk.attach(str(name))
    ask = talk.ask("?")["asks"][0]
    assert ask["turns"] == [("user", "<image>\n<video>\n<image>\n?")] and ask["videos"] == [str(tmp_path / "clip")]
    assert talk.ask("<video> or <image> <image>")["asks"][0]["turns"] == [("user", "<video> or <image> <image>")]


def test_what_cannot_be_attached_or_saved(tmp_path):
    talk = Conversation(["m"])
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png is "):
        talk.attach(str(tmp_path / "a.png"))
    with pytest.raises(DataError, match="cannot read image"):
        talk.attach(str(tmp_path / "none.png"))
    with pytest.raises(ConfigError, match="cannot read video"):
        talk.attach(str(tmp_path / "none.mp4"))
    assert talk.attached == []
    with pytest.raises(ConfigError, match="nothing was said"):
        talk.save(str(tmp_path / "x.json"))
