"""``data check``, ``stats`` and ``preview`` as a user runs them: every problem named, figures right, the page complete."""

import base64
import io
import json
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.cli.data import run
from megatron_vlm.cli.main import main
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.data.view.preview import _picture
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from tests.data.formats.make import write_tar


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


GOOD = turns(("human", "<image>What?"), ("gpt", "a dot"))
PROBLEMS = {
    "missing image": {"image": "none.png", "conversations": GOOD},
    "unreadable image": {"image": "broken.png", "conversations": GOOD},
    "placeholders": {"image": ["dot.png", "dot.png"], "conversations": GOOD},
    "roles out of order": {"conversations": turns(("gpt", "first"), ("human", "second"))},
    "empty answer": {"image": "dot.png", "conversations": turns(("human", "<image>What?"), ("gpt", " "))},
    "bad record": {"image": 7, "conversations": GOOD},
    "too long": {"conversations": turns(("human", "a " * 60), ("gpt", "b " * 60))},
    "control tokens": {"conversations": turns(("human", "a"), ("gpt", "<end_of_utterance>"))},
}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), (250, 0, 0)).save(tmp_path / "dot.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "dot.png").read_bytes()[:60])
    return tmp_path


def test_check_of_records_names_every_problem(folder, idefics2_dir, capsys):
    good = {"image": "dot.png", "conversations": GOOD}
    records = [{"id": 1, **good}, *({"id": kind, **record} for kind, record in PROBLEMS.items()), {"id": 1, **good}]
    (folder / "data.json").write_text(json.dumps(records))
    words = ["check", str(folder / "data.json"), "--format", "llava", "--image-root", str(folder)]
    refuse = ["--set", "data.special_tokens_in_text=refuse"]
    assert run([*words, "--model", str(idefics2_dir), "--seq-length", "100", *refuse]) == 1
    lines = capsys.readouterr().out.splitlines()
    for number, kind in enumerate(PROBLEMS, 1):
        assert [line for line in lines if line.startswith(f"{kind}: ") and f"record {number}" in line], (kind, lines)
    assert any(line.startswith("warning: ") and "the id '1' is also that of record 0" in line for line in lines)
    assert [line.split(maxsplit=1) for line in lines[-10:-1]] == [["1", k] for k in [*PROBLEMS, "duplicate id"]]
    assert lines[-1] == "2 sound samples, 8 problems, 1 warnings"

    assert run(words) == 1  # without a model nobody knows how long a sample is, or what its end token is
    assert "4 sound samples, 6 problems, 1 warnings" in capsys.readouterr().out
    (folder / "data.json").write_text(json.dumps([records[0], records[-1]]))
    assert run(words) == 0
    assert "2 sound samples, 0 problems, 1 warnings" in capsys.readouterr().out
    (folder / "data.json").write_text(json.dumps([records[0]])[:-1] + ', {"id": ]')
    assert run(words) == 1
    assert re.search(r"bad json: .*line 1 column \d+", capsys.readouterr().out)


def test_check_tells_of_special_tokens_in_texts(folder, idefics2_dir, capsys):
    """They are text to every family; whoever meant the token hears of it."""
    talk = turns(("human", "a"), ("gpt", "<s>b</s>"))
    (folder / "data.json").write_text(
        json.dumps([{"conversations": talk}, {"conversations": talk[:1] + turns(("gpt", "c"))}])
    )
    words = [
        "check",
        str(folder / "data.json"),
        "--format",
        "llava",
        "--model",
        str(idefics2_dir),
        "--seq-length",
        "100",
    ]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "special tokens of the model in texts, which are encoded as text: </s> (1), <s> (1)" in out
    assert "2 sound samples, 0 problems, 1 warnings" in out
    assert run(["build", "--format", "llava", "--input", words[1], "--out", str(folder / "out")]) == 0
    assert run(["check", str(folder / "out"), *words[4:]]) == 0
    assert "encoded as text: </s> (1), <s> (1)" in capsys.readouterr().out


def test_check_of_tars_names_every_problem(folder, idefics2_dir, capsys):
    """As records: the same problems, each with its tar and key; and tars that cannot be read at all."""
    problems = {kind: PROBLEMS[kind] for kind in PROBLEMS if kind not in ("missing image", "bad record")}
    problems["bad json"] = {"image": "dot.png"}
    for number in range(2):
        write_tar(
            folder / "in" / f"{number}.tar", members_of(folder, {"good": {"image": "dot.png", "conversations": GOOD}})
        )
    write_tar(folder / "in" / "2.tar", members_of(folder, {f"x/{k.replace(' ', '_')}": r for k, r in problems.items()}))
    (folder / "in" / "3.tar").write_bytes((folder / "in" / "0.tar").read_bytes()[:700])
    words = ["check", str(folder / "in"), str(folder / "none.tar"), "--format", "webdataset"]
    refuse = ["--set", "data.special_tokens_in_text=refuse"]
    assert run([*words, "--model", str(idefics2_dir), "--seq-length", "100", *refuse]) == 1
    lines = capsys.readouterr().out.splitlines()
    for kind in problems:
        place = f"sample x/{kind.replace(' ', '_')}, in {folder}/in/2.tar: "
        assert [line for line in lines if line.startswith(f"{kind}: {place}")], (kind, lines)
    assert [line for line in lines if line.startswith(f"damaged shard: in {folder}/in/3.tar: cut short")]
    assert [line for line in lines if line.startswith(f"damaged shard: in {folder}/none.tar: the tar is missing")]
    assert [line for line in lines if "the id 'good' is also that of good" in line and f"{folder}/in/1.tar" in line]
    assert "       2  damaged shard" in lines and "       1  too long" in lines
    assert lines[-1] == f"2 sound samples, {len(problems) + 2} problems, 1 warnings"
    assert run(["check", str(folder / "in" / "0.tar"), "--format", "webdataset"]) == 0
    assert "1 sound samples, 0 problems, 0 warnings" in capsys.readouterr().out


def members_of(folder, records):
    """The members of a tar of LLaVA's records, their images looked up in ``folder``."""
    for key, record in records.items():
        images = record.get("image") or []
        for i, name in enumerate([images] if isinstance(images, str) else images):
            yield f"{key}.{i}.png", (folder / name).read_bytes()
        text = json.dumps({"id": key, **record})
        yield f"{key}.json", (text if "conversations" in record else text[:-1]).encode()


def test_check_of_one_part_of_an_energon_folder(folder, capsys):
    for name, answer in (("a", "a dot"), ("b", "")):
        record = {"image": "dot.png", "conversations": turns(("human", "<image>What?"), ("gpt", answer))}
        write_tar(folder / "in" / f"{name}.tar", members_of(folder, {name: record}))
    meta = folder / "in" / ".nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text("sample_type: {__class__: CrudeWebdataset}\n")
    (meta / "split.yaml").write_text("split_parts: {train: [a.tar], val: [b.tar]}\n")
    words = ["check", str(folder / "in"), "--format", "webdataset"]
    assert run(words) == 0
    assert run([*words, "--part", "val"]) == 1
    assert f"empty answer: sample b, in {folder}/in/b.tar: empty answer in turn 1" in capsys.readouterr().out
    assert run([*words, "--part", "none"]) == 1
    assert "no part 'none' in split_parts (known: train, val)" in capsys.readouterr().out


def test_check_of_shards_with_a_model(digits_dir, idefics2_dir, capsys):
    words = ["check", str(digits_dir), "--model", str(idefics2_dir), "--seq-length", "48"]
    assert run(words) == 1
    out = capsys.readouterr().out
    long = sum(i % 5 == 2 and i % 7 != 3 for i in range(97))
    assert f"{97 - long} sound samples, {long} problems, 0 warnings" in out and out.count("too long: ") == long
    assert run(words[:-1] + ["96"]) == 0


def test_stats(digits_dir, idefics2_dir, tmp_path, capsys, make_processor):
    words = ["stats", str(digits_dir), "--model", str(idefics2_dir), "--seq-length", "96", "--global-batch-size", "4"]
    assert run([*words, "--set", "data.answer_loss_only=true", "--out", str(tmp_path / "stats.png")]) == 0
    out = capsys.readouterr().out
    config = DataConfig(seq_length=96, answer_loss_only=True, num_workers=0, packing=True)
    processor, dataset = make_processor(config), Dataset([digits_dir])
    raws = [dataset.read(i) for i in range(97)]
    encoded = [processor.encode(raw.key, raw.turns, [decode_image(data) for data in raw.images]) for raw in raws]
    tokens = np.array([len(sample.input_ids) for sample in encoded])
    learned = sum(int((sample.labels[1:] != -100).sum()) for sample in encoded)
    images = np.array([len(raw.images) for raw in raws])
    assert f"{tokens.sum():,}, {learned / tokens.sum():.1%} supervised" in out
    assert f"{tokens.mean():.1f} mean; {tokens.min()} least" in out
    assert f"{images.mean():.1f} mean; 0 least" in out and f"{np.mean(images > 0):.1%} of samples have any" in out
    loader = RowLoader(
        config, processor, paths=[digits_dir], seed=1, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    steps = loader.steps_per_epoch()
    loader.close()
    rows = int(re.search(r"packed rows +(\d+) of 96", out).group(1))
    assert f"{tokens.sum() / rows / 96:.1%} full" in out and steps in (-(-rows // 4), -(-(rows + 1) // 4))
    assert "25 of 4 samples not packed" in out and "100.00%" in out
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.size == (1040, 1200) and len(set(picture.resize((104, 120)).getdata())) > 3


class Page(HTMLParser):
    """Text, images and classes of a page; fails on anything that would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.spans = [], [], []
        self.feed(text)
        assert self.open == ["html", "body"] or not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        if tag == "img":
            self.images.append((attributes["class"], attributes["src"].split(",")[1]))
        elif tag not in ("meta",):
            self.open.append(tag)
            self.spans.append([attributes.get("class"), ""]) if tag == "span" else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            self.spans[-1][1] += data


def test_preview(digits_dir, idefics2_dir, tmp_path):
    words = ["preview", str(digits_dir), "--model", str(idefics2_dir), "--seq-length", "96", "--samples", "12"]
    words += ["--set", "data.packing=true", "--set", "data.on_too_long=drop"]
    out = tmp_path / "page.html"
    assert run([*words, "--out", str(out), "--seed", "5", "--set", "data.answer_loss_only=true"]) == 0
    text = out.read_text()
    page = Page(text)
    # The samples and rows are those that training starts with.
    config = DataConfig(seq_length=96, packing=True, num_workers=0, answer_loss_only=True)
    from megatron_vlm.models.families.idefics2.processor import Idefics2Processor

    processor = Idefics2Processor.from_pretrained(idefics2_dir, config)
    loader = RowLoader(
        config, processor, paths=[digits_dir], seed=5, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    keys, rows, pixels = [], 0, []
    while len(keys) < 12:
        (row,) = loader.next_step().rows
        keys += row.keys
        pixels += row.pixels
        rows += 1
    loader.close()
    assert re.findall(r"<h3>(digits-\d+)</h3>", text) == keys and text.count('<div class="bar">') == rows
    assert f"as {rows} packed rows of 96 tokens" in text
    seen = [data for kind, data in page.images if kind != "own"]
    assert len(seen) == len(pixels) > 5
    for data, wanted in zip(seen, pixels):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(picture / 255 - (wanted.numpy() * 0.5 + 0.5)).max() < 1e-6
    kinds = [kind for kind, _ in page.spans]
    assert kinds.count("i") == len(pixels) + 1 and kinds.count("s") > len(keys)
    assert all(words.endswith("<end_of_utterance>") for kind, words in page.spans[2:] if kind == "s")


def test_preview_draws_tiles_apart(digits_dir, tmp_path):
    """Families that cut images: each tile as the tower gets it, in order, and the page of one of them."""
    makers = {"internvl3": write_tiny_internvl3, "xcomposer2": partial(write_tiny_xcomposer2, variant="4khd-7b")}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 190, 3), dtype=np.uint8))
    talk = [Turn(role="user", text="<image>What?"), Turn(role="assistant", text="a dot")]
    for family, write in makers.items():
        model = tmp_path / family
        model.mkdir()
        write(str(model))
        config = DataConfig(seq_length=512, hd_num=6 if family == "xcomposer2" else None)
        processor = registry.get(family).processor(model, config)
        (pixels,) = processor.encode("a", talk, [image]).pixels
        sheet, caption = _picture(pixels, processor)
        side, across = processor.tiles(pixels)
        tiles = [part for band in pixels.split(side, 1) for part in band.split(side, 2)]
        assert caption == f"{len(tiles)} tiles of {side} x {side}" and len(tiles) > across > 1
        drawn, step = np.asarray(sheet), side + max(1, side // 24)
        mean, std = (np.array(values)[:, None, None] for values in (processor.mean, processor.std))
        for number, tile in enumerate(tiles):
            top, left = (place * step + step - side for place in divmod(number, across))
            found = drawn[top : top + side, left : left + side].transpose(2, 0, 1) / 255
            assert np.abs(found - (tile.numpy() * std + mean)).max() < 0.003
    words = ["preview", str(digits_dir), "--model", str(model), "--seq-length", "512", "--samples", "2"]
    assert run([*words, "--set", "data.hd_num=6", "--out", str(tmp_path / "page.html")]) == 0
    assert f"tiles of {side} x {side}" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["stats", "--model", "MODEL"], "no data: name a folder"),
        (["check", "/no/where"], "/no/where does not exist"),
        (["preview", "DIR", "--model", "MODEL", "--out", "MANIFEST"], "lies in the folder"),
        (["stats", "DIR", "--model", "MODEL", "--out", "CONFIG"], "lies in the folder"),
        (["stats", "DIR", "--model", "MODEL", "--config", "YAML", "--out", "YAML"], "is the file that --config names"),
        (["check", "FILE"], "is neither a shard folder"),
        (["check", "DIR", "--part", "val"], "it goes with --format"),
        (["stats", "DIR", "--model", "MODEL", "--set", "training.seed=1"], "only settings of the data section"),
        (["stats", "DIR", "--model", "MODEL", "--set", "data.sliding=1"], "unknown config key 'data.sliding'"),
        (["preview", "DIR", "--model", "MODEL", "--out", "/no/where.html"], "cannot be written"),
        (["preview", "DIR", "--model", "MODEL", "--out", "x.html", "--samples", "0"], "--samples must be at least 1"),
        (["check", ""], "PATH '' is empty"),
        (["stats", "DIR", "--model", ""], "--model '' is empty"),
        (["build", "--format", "llava", "--input", "", "--out", "x"], "--input '' is empty: name a path"),
        (["build", "--format", "llava", "--input", "x", "--out", ""], "--out '' is empty"),
        (["build", "--format", "llava", "--input", "x", "--out", "x", "--image-root", ""], "--image-root '' is empty"),
    ],
)
def test_mistakes(digits_dir, idefics2_dir, tmp_path, capsys, words, message):
    (tmp_path / "run.yaml").write_text("data:\n  seq_length: 64\n")
    places = {"DIR": digits_dir, "MODEL": idefics2_dir, "FILE": __file__, "YAML": tmp_path / "run.yaml"}
    places |= {"MANIFEST": digits_dir / "manifest.json", "CONFIG": idefics2_dir / "config.json"}
    before = [places[name].read_bytes() for name in ("MANIFEST", "CONFIG", "YAML")]
    assert main(["data", *(str(places.get(word, word)) for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert before == [places[name].read_bytes() for name in ("MANIFEST", "CONFIG", "YAML")]
