"""Sample answers during training, and `generate` on a checkpoint: equal to transformers', at every place they are written."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.data.formats.records import OWN_VIDEO
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.testing import commands
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.runs import train
from megatron_vlm.training.answering.generate import GenerateConfig, run_generate
from megatron_vlm.training.answering.prompts import EvaluateConfig, Prompt
from tests.data.formats.make import write_tar

NEW = 8


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def hf_answers(directory, prompts):
    """transformers' greedy answers to (text, image file or None), through its own processor."""
    from transformers import AutoModelForImageTextToText, Idefics2Processor

    processor = Idefics2Processor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager")
    answers = []
    for text, image in prompts:
        before, mark, after = text.rpartition("<image>")
        content = [{"type": "text", "text": before}] * bool(before) + [{"type": "image"}] * bool(mark)
        content += [{"type": "text", "text": after}]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=asked, images=[Image.open(image)] if image else None, return_tensors="pt")
        stop = processor.tokenizer.convert_tokens_to_ids(["<end_of_utterance>", "</s>"])
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=0)
        answers.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def test_answers_of_records_and_prompts_equal_transformers(twin, picture, tmp_path):
    """Records on 2 x 2 ranks, tensor and data parallel; and one prompt from the command line of one process."""
    asked = [
        ("<image>\nWhat digit is this?", picture),
        ("How many cats are there?", None),
        ("Describe <image> now", picture),
    ]
    records = [
        {
            "id": f"r{number}",
            **({"image": picture.name} if image else {}),
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": f"answer {number}"}],
        }
        for number, (text, image) in enumerate(asked)
    ]
    path, out = tmp_path / "val.json", tmp_path / "answers.jsonl"
    path.write_text(json.dumps(records))
    config = GenerateConfig.from_dict(
        {
            "load": str(twin),
            "input": [str(path)],
            "image_root": str(picture.parent),
            "out": str(out),
            "device": "cpu",
            "sampling": {"max_new_tokens": NEW, "batch_size": 1},
            "parallel": {"tensor_model_parallel_size": 2},
        }
    )
    assert run_distributed(run_generate, config, tp=2, dp=2) == [3] * 4
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = hf_answers(twin, asked)
    assert lines == [
        {"key": f"r{number}", "prompt": text, "reference": f"answer {number}", "answer": answer}
        for number, ((text, _), answer) in enumerate(zip(asked, expected))
    ]
    members = [("a.png", picture.read_bytes())]  # the same question as a tar's sample, without a label of its own
    members.append(("a.json", json.dumps({"conversations": records[0]["conversations"]}).encode()))
    tar = write_tar(tmp_path / "val.tar", members)
    said = commands.run(
        [
            "generate",
            "--load",
            str(twin),
            "--device",
            "cpu",
            "--format",
            "webdataset",
            "--input",
            str(tar),
            "--out",
            str(out),
        ]
        + ["--max-new-tokens", str(NEW)]
    )
    assert said.returncode == 0, said.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == [lines[0] | {"key": "a"}]
    asked_for = ["--prompt", "What digit is this?", "--image", str(picture), "--max-new-tokens", str(NEW)]
    said = commands.run(["generate", "--load", str(twin), "--device", "cpu", *asked_for])
    assert said.returncode == 0, said.stderr
    assert said.stdout.rstrip("\n") == expected[0]


def test_training_shows_answers(twin, picture, command, tmp_path):
    """Before the first step, at the interval and at the end, in every layout alike; a resumed run repeats none."""
    prompts = [{"text": "What digit is this?", "images": [str(picture)]}, "How many cats are there?"]
    settings = [f"evaluate.prompts={json.dumps(prompts)}", "evaluate.interval=2", f"evaluate.max_new_tokens={NEW}"]

    def run(out, *more, world=1):
        argv = [*command(out, f"--save {tmp_path / out}", *more), *settings]
        assert run_distributed(train, argv, dp=world) == [(0, "")] * world
        return [json.loads(line) for line in (tmp_path / out / "samples.jsonl").read_text().splitlines()]

    alone = run("a", "--train-iters 3")
    assert [line["iteration"] for line in alone] == [0, 0, 2, 2, 3, 3]
    assert [line["answer"] for line in alone[:2]] == hf_answers(
        twin, [("<image>\nWhat digit is this?", picture), ("How many cats are there?", None)]
    )
    assert alone[0]["images"] == [str(picture)]
    assert alone[0]["answer"] != alone[4]["answer"]  # lr 1e-3 on random weights moves the likeliest tokens
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 3"
    assert run("b", layout, world=4) == alone
    assert run("c", "--context-parallel-size 2 --train-iters 3", world=2) == alone
    assert run("d", "--data-parallel-sharding parameters --train-iters 3", world=2) == alone
    assert run("a", f"--train-iters 4 --load {tmp_path / 'a'}")[:4] == alone[:4]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "one of --prompt"),
        ({"prompt": {"text": "a"}, "input": ["x.json"]}, "one of --prompt"),
        ({"prompt": {"text": "a"}, "out": "x"}, "--out goes with --input"),
        ({"prompt": {"text": "a"}, "sampling": {"top_p": 0.5}}, "no effect at temperature 0"),
        ({"prompt": {"text": "a"}, "sampling": {"max_new_tokens": 0}}, "max_new_tokens must be at least 1"),
        ({"prompt": {"text": "a"}, "sampling": {"temperature": float("nan")}}, "temperature must be a number"),
        ({"prompt": {"text": "a"}, "sampling": {"temperature": float("inf")}}, "temperature must be a number"),
        ({"prompt": {"text": "a"}, "sampling": {"temperature": -1.0}}, "temperature must be a number, 0 or above"),
        ({"prompt": {"text": "a"}, "precision": "fp16", "device": "cpu"}, "fp16 does not run on the CPU"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        GenerateConfig.from_dict({"load": "x", **settings})


def test_answers_never_replace_what_is_asked_nor_end_in_a_traceback(twin, tmp_path):
    asked = tmp_path / "asked.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    asked.write_text(json.dumps([{"conversations": turns}]))
    before = asked.read_bytes()
    other = tmp_path / "link.json"
    other.symlink_to(asked)

    def run(out, *given):
        config = {"load": str(twin), "input": list(given), "out": str(out), "device": "cpu"}
        config = GenerateConfig.from_dict(config | {"sampling": {"max_new_tokens": 1}})
        with pytest.raises(RankError) as error:
            run_distributed(run_generate, config, tp=1, timeout=60)
        assert asked.read_bytes() == before
        return str(error.value)

    for out, given in ((asked, asked), (other, asked), (asked, tmp_path / "ask*.json")):
        said = run(out, str(given))
        assert f"--out {out} is the input {asked}" in said and "name another file" in said
    assert f"cannot write {tmp_path / 'nowhere' / 'x.jsonl'}: No such file" in run(
        tmp_path / "nowhere" / "x.jsonl", str(asked)
    )
    assert "cannot write /dev/full: No space left on device" in run("/dev/full", str(asked))


def test_mistakes_of_the_command_line_are_named(twin, tmp_path, capsys):
    def said(*words):
        assert main(["generate", "--load", str(twin), *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "--image goes with --prompt TEXT, which is not given: add the question" in said("--image", "x.png")
    assert "--system goes with --prompt TEXT, which is not given: leave it out" in said("--system", "a", "--input", "b")
    for flag in ("--load", "--base", "--image", "--input", "--image-root", "--out"):
        assert f"{flag} '' is empty" in said("--prompt", "a", flag, "")


def test_no_answers_go_into_a_model(twin, tmp_path):
    config = (twin / "config.json").read_bytes()
    asked = tmp_path / "asked.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    asked.write_text(json.dumps([{"conversations": turns}]))
    inside = GenerateConfig(load=str(twin), input=(str(asked),), out=twin / "config.json", device="cpu")
    new = inside.replace(out=twin / "new.jsonl")
    other = inside.replace(load=str(tmp_path / "none"), base=str(twin))
    for each in (inside, new, other):
        with pytest.raises(RankError) as error:
            run_distributed(run_generate, each, tp=1, timeout=60)
        assert f"--out {each.out} lies in the folder {twin}" in str(error.value)
    assert (twin / "config.json").read_bytes() == config and not (twin / "new.jsonl").exists()


def test_prompts_that_cannot_be(twin, picture):
    def asked(words, **prompt):
        with pytest.raises(RankError) as error:
            run_distributed(
                run_generate, GenerateConfig(load=str(twin), prompt=Prompt(**prompt), device="cpu"), tp=1, timeout=60
            )
        assert words in str(error.value)

    asked("cannot read nowhere.png", text="a", images=("nowhere.png",))
    asked("2 <image> placeholders for 1 images", text="<image><image>", images=(str(picture),))
    asked("beyond the model's 1024 positions", text="cats " * 1000)
    with pytest.raises(ConfigError, match=r"evaluate\.interval has no effect"):
        EvaluateConfig(interval=3)
    with pytest.raises(DataError, match=r"cannot read image nowhere\.png"):
        from megatron_vlm.training.answering.prompts import encode_prompt

        encode_prompt(SimpleNamespace(video=OWN_VIDEO), Prompt(text="a", images=("nowhere.png",)))
