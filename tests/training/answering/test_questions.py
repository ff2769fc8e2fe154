"""Records as questions: right answers, subsets, and what is asked without images."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.formats.records import OWN_VIDEO
from megatron_vlm.errors import DataError
from megatron_vlm.training.answering.questions import questions


def write(path, *records):
    path.write_text(json.dumps(list(records)))
    return str(path)


def record(question="<image>\nWhat?", answer="cat", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": "a.png"} if "<image>" in question else {}), **more}


def test_right_answers_and_subsets(tmp_path):
    people = [{"answer": "cat"}, {"answer": "a cat"}]
    first = write(tmp_path / "a.json", record(id="x"), record(answers=["1", "one"]), record(answers=people))
    second = write(tmp_path / "b.json", record(kind="shape"), record(kind=3))
    asked = list(questions("llava", [first, second], ".", 2))
    assert [(q.number, q.name, q.references, q.subset) for q in asked] == [
        (0, "x", ("cat",), "a.json"),
        (1, "1", ("1", "one"), "a.json"),
        (2, "0", ("cat",), "b.json"),
        (3, "1", ("cat",), "b.json"),
    ]
    assert [q.subset for q in questions("llava", [second], ".", subset_key="kind")] == ["shape", "3"]
    assert list(questions("llava", [first], "."))[2].references == ("cat", "a cat")
    with pytest.raises(
        DataError, match=r"sample record 0, in .*a\.json: no text or number under 'kind', which --subset-key"
    ):
        list(questions("llava", [first], ".", subset_key="kind"))
    for answers in ([], [""], "cat", [{"text": "cat"}]):
        with pytest.raises(DataError, match="'answers' must be a list of right answers"):
            list(questions("llava", [write(tmp_path / "c.json", record(answers=answers))], "."))


class Processor:
    """Keeps what it is asked to encode."""

    video = OWN_VIDEO

    def encode_prompt(self, turns, images):
        self.asked = [turn.text for turn in turns], len(images)
        return type("Sample", (), {"input_ids": range(4)})


def test_blind_questions_have_no_images_and_no_marks(tmp_path):
    from megatron_vlm.models.generation import SamplingConfig

    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (question,) = questions(
        "llava", [write(tmp_path / "a.json", record("<image>\nWhat <image>?", image=["a.png"] * 2))], str(tmp_path)
    )
    processor, sampling = Processor(), SamplingConfig(max_new_tokens=4)
    question.encode(processor, 8, sampling)
    assert processor.asked == (["<image>\nWhat <image>?"], 2)
    question.encode(processor, 8, sampling, blind=True)
    assert processor.asked == (["What ?"], 0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"sample record 0, in .*a\.json: cannot read image"):
        question.encode(processor, 8, sampling)
