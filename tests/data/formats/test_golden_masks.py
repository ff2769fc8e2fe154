"""The same conversation in every format, encoded for Idefics2: the labels are those worked out by hand below."""

import dataclasses
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.errors import Reason
from tests.data.formats.make import built, picture, write_json, write_tar

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>" * 5, "<end_of_utterance>"
ONE = f"{FAKE}{IMAGE}{FAKE}"


def turns(mark, ask, answer):
    """A system turn, two questions, a picture in each."""
    return [
        (None, "Be brief."), (ask, f"{mark}\nWhat digit is this?"), (answer, "seven"),
        (ask, f"And this: {mark}"), (answer, "one"),
    ]  # fmt: skip


def conversations(mark, ask, answer, system=True):
    return [{"from": role or "system", "value": text} for role, text in turns(mark, ask, answer)[not system :]]


def messages(parts):
    made = []
    for role, text in turns("<image>", "user", "assistant"):
        pieces = [[{"type": "text", "text": p}] if p else [] for p in text.split("<image>")]
        content = list(pieces[0])
        for index, piece in enumerate(pieces[1:]):
            content += [parts(index), *piece]
        made.append({"role": role or "system", "content": content if "<image>" in text else text})
    return made


def write_inputs(folder):
    """Returns format -> (input, settings)."""
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i, size=(40, 30)))
    names = ["0.png", "1.png"]
    llava = {"image": names, "conversations": conversations("<image>", "human", "gpt")}
    here = {"image": names, "conversations": conversations("<ImageHere>", "user", "assistant")}
    paths = iter(names)
    chat = messages(lambda _: {"type": "image_url", "image_url": {"url": next(paths)}})
    bytes_of = [{"bytes": picture(i, size=(40, 30)), "path": None} for i in range(2)]
    table = pyarrow.Table.from_pylist([{"images": bytes_of, "conversations": llava["conversations"]}])
    pyarrow.parquet.write_table(table, folder / "p.parquet")
    write_json(folder / "i.jsonl", [llava])
    entry = {"root": ".", "annotation": "i.jsonl", "data_augment": False, "repeat_time": 1, "max_dynamic_patch": 4}
    members = [(f"a.{i}.png", picture(i, size=(40, 30))) for i in range(2)]
    text = json.dumps({"conversations": llava["conversations"]}).encode()
    return {
        "llava": write_json(folder / "l.json", [llava]),
        "xcomposer": write_json(folder / "x.json", [here]),
        "internvl": write_json(folder / "meta.json", {"set": entry}),
        "openai": write_json(folder / "o.jsonl", [{"messages": chat}]),
        "parquet": folder / "p.parquet",
        "webdataset": write_tar(folder / "w.tar", [*members, ("a.json", text)]),
    }


ALL = f"System: Be brief.{END}\nUser:", f"\nWhat digit is this?{END}\nAssistant: seven{END}\nUser: And this: ", END
# Answers alone: the assistant's text, with the space before it, through the token that ends the turn.
ANSWERS = [
    ("<s>" + ALL[0] + ONE + f"\nWhat digit is this?{END}\nAssistant:", False),
    (f" seven{END}", True),
    (f"\nUser: And this: {ONE}{END}\nAssistant:", False),
    (f" one{END}", True),
    ("\n", False),
]
# Pre-training: all but BOS and what stands for a picture.
EVERYTHING = [
    ("<s>", False), (ALL[0], True), (ONE, False), (ALL[1], True), (ONE, False), (f"{END}\nAssistant: one{END}\n", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    inputs = write_inputs(folder)
    return {name: built(folder / f"out-{name}", name, path, root=str(folder))[1][0] for name, path in inputs.items()}


@pytest.mark.parametrize("answer_only, expected", [(True, ANSWERS), (False, EVERYTHING)])
@pytest.mark.parametrize("format", ["llava", "xcomposer", "internvl", "openai", "parquet", "webdataset"])
def test_labels(samples, make_processor, format, answer_only, expected):
    processor = make_processor(DataConfig(seq_length=256, answer_loss_only=answer_only))
    sample = samples[format]
    images = [decode_image(data) for data in sample.images]
    encoded = processor.encode(sample.key, sample.turns, images, options=sample.options)
    kept = (encoded.labels != IGNORE_INDEX).tolist()
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == [
        i for i, k in zip(encoded.input_ids.tolist(), kept) if k
    ]
    runs = []
    for flag, group in itertools.groupby(zip(encoded.input_ids.tolist(), kept), key=lambda pair: pair[1]):
        runs.append((processor.tokenizer.decode([i for i, _ in group]), flag))
    assert runs == expected
    count = processor.count(sample.turns, [image.size for image in images], sample.options)
    assert count == dataclasses.replace(
        count, tokens=len(kept), supervised=sum(kept), image_tokens=10, reason=Reason.NONE
    )
