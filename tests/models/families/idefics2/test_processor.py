"""Idefics2Processor against transformers' own, on real and odd images, and label masks worked out by hand."""

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image, open_image, probe_image
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.twins.common import CORPUS
from megatron_vlm.testing.twins.idefics2 import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_idefics2_config, tiny_tokenizer

LONGEST, SHORTEST, LATENTS = 98, 42, 5


def write_processor(folder, *, longest=LONGEST, shortest=SHORTEST, tokenizer=None, **images):
    """Writes what a processor is read from, no weights, and returns HF's processor."""
    from transformers import Idefics2Processor as HFProcessor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tiny_idefics2_config(tokenizer, image_size=LONGEST, patch_size=14).save_pretrained(folder)
    size = {"longest_edge": longest, "shortest_edge": shortest}
    image_processor = Idefics2ImageProcessorPil(**{"do_image_splitting": False, "size": size, **images})
    hf = HFProcessor(image_processor, tokenizer, image_seq_len=LATENTS, chat_template=CHAT_TEMPLATE)
    hf.save_pretrained(folder)
    return hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("idefics2")


@pytest.fixture(scope="module")
def hf(folder):
    return write_processor(folder)


def processor_of(folder, **config):
    return Idefics2Processor.from_pretrained(folder, DataConfig(**{"seq_length": 4096, **config}))


def odd_images():
    """20 images of odd sizes, modes and files: name -> encoded bytes."""
    china, flower = Image.fromarray(load_sample_image("china.jpg")), Image.fromarray(load_sample_image("flower.jpg"))
    digit = Image.fromarray((load_digits().images[7] * 15).astype(np.uint8))
    rgba = flower.resize((70, 50)).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((70, 50)))
    palette = flower.resize((90, 61)).convert("P")
    see_through = Image.new("P", (33, 20))
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {
        "line": (china.resize((1, 50)), "PNG", {}),
        "line across": (china.resize((50, 1)), "PNG", {}),
        "ribbon": (china.resize((980, 40)), "JPEG", {}),
        "tower": (china.resize((40, 980)), "JPEG", {}),
        "one pixel": (china.resize((1, 1)), "PNG", {}),
        "photo": (china, "JPEG", {}),
        "flower": (flower, "WEBP", {"lossless": True}),
        "digit": (digit, "PNG", {}),
        "exact": (flower.resize((LONGEST, LONGEST)), "PNG", {}),
        "exact short": (flower.resize((SHORTEST, SHORTEST)), "PNG", {}),
        "one over": (flower.resize((LONGEST + 1, LONGEST)), "PNG", {}),
        "one under": (flower.resize((SHORTEST - 1, LONGEST - 1)), "PNG", {}),
        "thirds": (china.resize((301, 199)), "PNG", {}),
        "rgba": (rgba, "PNG", {}),
        "grey alpha": (digit.convert("LA"), "PNG", {}),
        "palette": (palette, "PNG", {}),
        "transparent palette": (see_through, "PNG", {"transparency": 0}),
        "bilevel": (digit.convert("1"), "PNG", {}),
        "cmyk": (china.resize((64, 48)).convert("CMYK"), "JPEG", {}),
        "turned": (china.resize((160, 90)), "JPEG", {"exif": turned}),
    }
    files = {}
    for name, (image, kind, options) in cases.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    assert len(files) == 20
    return files


ODD_IMAGES = odd_images()


def hf_inputs(hf, turns, images):
    """What HF's processor makes of a conversation."""
    images, messages = list(images), []
    for turn in turns:
        parts = []
        for index, text in enumerate(turn.text.split("<image>")):
            parts += [{"type": "image", "image": images.pop(0)}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": turn.role, "content": parts})
    return hf.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_pixels_mask_and_ids_equal_hf(hf, folder, name):
    ours = processor_of(folder)
    turns = (Turn(role="user", text="<image>\nWhat is it?"), Turn(role="assistant", text="seven"))
    sample = ours.encode("k", turns, [open_image(ODD_IMAGES[name])])
    theirs = hf_inputs(hf, turns, [Image.open(io.BytesIO(ODD_IMAGES[name]))])
    assert torch.equal(sample.input_ids, theirs["input_ids"][0])
    assert sample.pixels[0].dtype == torch.float32
    assert torch.equal(sample.pixels[0], theirs["pixel_values"][0, 0])
    assert theirs["pixel_attention_mask"][0, 0].all()
    # The size known from the file's header alone, as the index keeps it, gives the same count.
    _, width, height = probe_image(ODD_IMAGES[name])
    assert ours.resized(width, height) == tuple(reversed(sample.pixels[0].shape[1:]))
    assert decode_image(ODD_IMAGES[name]).size == (width, height)


def test_ragged_images_equal_hf_padded_ones(hf, folder):
    images = [Image.open(io.BytesIO(data)) for data in ODD_IMAGES.values()]
    turns = (Turn(role="user", text="<image>" * 20 + "Which?"), Turn(role="assistant", text="two"))
    sample = processor_of(folder).encode("k", turns, images)
    theirs = hf_inputs(hf, turns, images)
    assert torch.equal(sample.input_ids, theirs["input_ids"][0])
    for pixels, values, mask in zip(sample.pixels, theirs["pixel_values"][0], theirs["pixel_attention_mask"][0]):
        height, width = pixels.shape[1:]
        expected = torch.zeros_like(mask)
        expected[:height, :width] = 1
        assert torch.equal(mask, expected)
        assert torch.equal(pixels, values[:, :height, :width])


@pytest.mark.parametrize(
    "texts",
    [
        ("Hello", "there"),
        ("<image>", "a cat"),
        ("<image>\nWhat?", "a cat"),
        ("<image>What?", "a <b>cat</b>"),
        ("<image> What?", " padded  "),
        ("<image><b>bold</b>", "\n"),
        ("Look: <image> and <image>, then <image><image>.", "two and\ntwo"),
        ("Is this<image>9", "yes\n\nUser: no", "And <image>?<image>", "日本語 café ✓ 🙂", "Thanks 🙂", "."),
        ("trailing <image>", "x"),
        ("tab\t<image>\n<image>\tend ", "x y  z"),
    ],
)
@pytest.mark.parametrize("system", [None, "You are brief."])
def test_ids_equal_hf(hf, folder, texts, system):
    turns = [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]
    turns = ([Turn(role="system", text=system)] if system else []) + turns
    images = [Image.new("RGB", (30, 40))] * sum(text.count("<image>") for text in texts)
    ours = processor_of(folder)
    sample = ours.encode("k", turns, images)
    theirs = hf_inputs(hf, turns, images)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(sample.image_positions, (sample.input_ids == hf.image_token_id).nonzero()[:, 0])
    assert_count_is_encode(ours, turns, images)


def assert_count_is_encode(processor, turns, images):
    sample = processor.encode("k", turns, images)
    count = processor.count(turns, [image.size for image in images])
    assert (count.tokens, count.image_tokens) == (len(sample.input_ids), len(sample.image_positions))
    assert count.supervised == int((sample.labels[1:] != IGNORE_INDEX).sum())
    assert count.patches == sum((p.shape[1] // 14) * (p.shape[2] // 14) for p in sample.pixels)
    return sample


def shown(processor, sample):
    """The sample's text with what is not supervised replaced by one dot a token."""
    pieces = []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist()):
        assert label in (token, IGNORE_INDEX)
        pieces.append("." if label == IGNORE_INDEX else processor.tokenizer.decode([token]))
    return "".join(pieces)


def test_labels_of_pretraining(folder, hf):
    # <s> User : <fake> <image> x 5 <fake> "\n" ... : all text is supervised, <s> and the seven image tokens are not.
    turns = (Turn(role="user", text="<image>\nWhat?"), Turn(role="assistant", text="a seven"))
    processor = processor_of(folder)
    text = shown(processor, processor.encode("k", turns, [Image.new("L", (9, 9))]))
    assert text == ".User:.......\nWhat?<end_of_utterance>\nAssistant: a seven<end_of_utterance>\n"


def test_labels_of_answers_only(folder, hf):
    turns = (
        Turn(role="system", text="Be brief."),
        Turn(role="user", text="What digit is this?<image>"),
        Turn(role="assistant", text="seven"),
        Turn(role="user", text="Sure?"),
        Turn(role="assistant", text="yes, two"),
    )
    processor = processor_of(folder, answer_loss_only=True)
    sample = processor.encode("k", turns, [Image.new("L", (9, 9))])
    text = shown(processor, sample)
    # "System: Be brief." up to "Assistant:" is masked, and so is the line break after each answer.
    assert text.replace(".", "") == " seven<end_of_utterance> yes, two<end_of_utterance>"
    assert text.endswith("<end_of_utterance>.")
    # Masked in front of the first answer is what HF would be given as the prompt of a generation.
    first = int((sample.labels != IGNORE_INDEX).nonzero()[0])
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What digit is this?"}, {"type": "image"}]},
    ]
    ids = hf(text=hf.apply_chat_template(prompt, add_generation_prompt=True), images=[Image.new("L", (9, 9))])
    assert sample.input_ids[:first].tolist() == ids["input_ids"][0]


def sentencepiece_like(kind):
    """A BPE tokenizer as Mistral's and Llama 2's: spaces become part of words, line breaks and rare letters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no piece spans two words, as in sentencepiece
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([CORPUS.replace("\n", " ")], trainer)
    tokenizer.pre_tokenizer = None
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # bytes are plain pieces
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_tokenizers_that_glue_spaces_to_words(tmp_path, kind):
    hf = write_processor(tmp_path, tokenizer=sentencepiece_like(kind))
    turns = (
        Turn(role="user", text="<image>\nWhat digit is this?"),
        Turn(role="assistant", text="seven"),
        Turn(role="user", text="Sure? <image>ü"),
        Turn(role="assistant", text=" two dogs\n日本"),
    )
    images = [Image.new("L", (50, 60))] * 2
    processor = processor_of(tmp_path, answer_loss_only=True)
    sample = assert_count_is_encode(processor, turns, images)
    assert sample.input_ids.tolist() == hf_inputs(hf, turns, images)["input_ids"][0].tolist()
    labels, runs = sample.labels.tolist(), []
    for previous, label in zip([IGNORE_INDEX, *labels], labels):
        if label != IGNORE_INDEX:
            runs = [*runs, []] if previous == IGNORE_INDEX else runs
            runs[-1].append(label)
    # The words of one answer are one run: the space before it is the model's to write, the line break after is not.
    texts = [processor.tokenizer.decode(run) for run in runs]
    assert texts == [" seven<end_of_utterance>", "  two dogs\n日本<end_of_utterance>"]


def test_text_only_has_no_images(folder, hf):
    sample = assert_count_is_encode(
        processor_of(folder), (Turn(role="user", text="Count"), Turn(role="assistant", text="one two")), []
    )
    assert sample.pixels == () and len(sample.image_positions) == 0


MANY = (
    Turn(role="user", text="<image>What?"),
    Turn(role="assistant", text="one two three four"),
    Turn(role="user", text="And <image>?"),
    Turn(role="assistant", text="five six seven eight"),
)
BOX = Image.new("L", (50, 60))


def test_truncation_removes_whole_turns_first(folder, hf):
    whole = processor_of(folder).encode("k", MANY, [BOX, BOX])
    first = processor_of(folder).encode("k", MANY[:2], [BOX])
    length = len(whole.input_ids)
    for limit in (len(first.input_ids), length - 1):
        processor = processor_of(folder, seq_length=limit, on_too_long="truncate")
        sample = assert_count_is_encode(processor, MANY, [BOX, BOX])
        assert torch.equal(sample.input_ids, first.input_ids) and len(sample.pixels) == 1
        assert processor.count(MANY, [(50, 60)] * 2).truncated
    exact = processor_of(folder, seq_length=length, on_too_long="truncate")
    assert not exact.count(MANY, [(50, 60)] * 2).truncated


@pytest.mark.parametrize("answer_only", [False, True])
def test_truncation_cuts_the_end_of_the_last_answer_and_nothing_else(folder, hf, answer_only):
    settings = {"on_too_long": "truncate", "answer_loss_only": answer_only}
    first = processor_of(folder, **settings).encode("k", MANY[:2], [BOX])
    answer = processor_of(folder, answer_loss_only=True).encode("k", MANY[:2], [BOX])
    start = int((answer.labels != IGNORE_INDEX).nonzero()[0])
    roomy = processor_of(folder, **settings)
    for limit in range(2, len(first.input_ids)):
        processor = dataclasses.replace(roomy, seq_length=limit)
        if limit > start:
            sample = assert_count_is_encode(processor, MANY, [BOX, BOX])
            assert torch.equal(sample.input_ids, first.input_ids[:limit])
            assert torch.equal(sample.labels, first.labels[:limit])
            assert len(sample.image_positions) == LATENTS
        else:
            assert processor.count(MANY, [(50, 60)] * 2).reason.text == "too_long"
            with pytest.raises(DataError, match="too_long"):
                processor.encode("k", MANY, [BOX, BOX])


def test_an_image_in_the_last_answer_is_never_cut(folder, hf):
    turns = (Turn(role="user", text="Show"), Turn(role="assistant", text="this <image> is two and three"))
    whole = processor_of(folder, answer_loss_only=True).encode("k", turns, [BOX])
    end = int(whole.image_positions[-1]) + 2  # with its closing fake token
    fits = processor_of(folder, seq_length=end, on_too_long="truncate")
    assert len(assert_count_is_encode(fits, turns, [BOX]).pixels) == 1
    assert (
        processor_of(folder, seq_length=end - 1, on_too_long="truncate").count(turns, [(50, 60)]).reason.text
        == "too_long"
    )


@pytest.mark.parametrize(
    "text, sizes, config, reason",
    [
        ("<image>", [], {}, "placeholders"),
        ("hi", [(5, 5)], {}, "placeholders"),
        ("<image><image>", [(5, 5)] * 2, {"max_image_num": 1}, "max_image_num"),
        ("<image><image>", [(5, 5)] * 2, {"max_image_num": 2}, ""),
        ("<fake_token_around_image>", [], {"special_tokens_in_text": "refuse"}, "control_tokens"),
        ("a<end_of_utterance>b", [], {"special_tokens_in_text": "refuse"}, "control_tokens"),
        ("hi " * 200, [], {"seq_length": 64}, "too_long"),
        ("hi " * 200, [], {"seq_length": 64, "on_too_long": "drop"}, "too_long"),
        ("hi " * 200, [], {"seq_length": 64, "on_too_long": "truncate"}, "too_long"),
    ],
)
def test_reasons(folder, hf, text, sizes, config, reason):
    turns = (Turn(role="user", text=text), Turn(role="assistant", text="x"))
    processor = processor_of(folder, **config)
    assert processor.count(turns, sizes).reason.text == reason
    if reason:
        with pytest.raises(DataError, match=reason):
            processor.encode("k", turns, [Image.new("L", size) for size in sizes])


def test_nothing_supervised(folder, hf):
    count = processor_of(folder, answer_loss_only=True).count((Turn(role="user", text="hi"),), [])
    assert count.reason.text == "nothing_supervised"


def test_travels_to_workers_and_fingerprint_follows_settings(folder, hf):
    processor = processor_of(folder)
    twin = pickle.loads(pickle.dumps(processor))
    assert torch.equal(twin.encode("k", MANY, [BOX, BOX]).input_ids, processor.encode("k", MANY, [BOX, BOX]).input_ids)
    assert twin.fingerprint == processor.fingerprint == processor_of(folder).fingerprint
    others = [{"answer_loss_only": True}, {"seq_length": 7}, {"image_size": 70}, {"on_too_long": "truncate"}]
    assert len({processor_of(folder, **other).fingerprint for other in others} | {processor.fingerprint}) == 5


def test_image_size_and_shortest_edge(folder, hf, tmp_path):
    other = write_processor(tmp_path, longest=70, shortest=28)
    china = Image.fromarray(load_sample_image("china.jpg"))
    ours = processor_of(folder, image_size=70, shortest_edge=28).encode("k", MANY[:2], [china])
    assert torch.equal(ours.pixels[0], hf_inputs(other, MANY[:2], [china])["pixel_values"][0, 0])


def test_base_variant_ends_turns_with_eos(tmp_path):
    """Where the model has no embedding for <end_of_utterance>, its id would be out of range."""
    tokenizer = tiny_tokenizer(end_of_utterance=False)
    size = len(tokenizer)
    tiny_idefics2_config(tokenizer, vocab_size=size).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_seq_len": LATENTS}))
    processor = processor_of(tmp_path, answer_loss_only=True)
    sample = processor.encode("k", MANY[:2], [BOX])
    assert int(sample.input_ids.max()) < size
    assert processor.tokenizer.decode(sample.input_ids[-2:].tolist()) == "</s>\n"
    assert shown(processor, sample).replace(".", "") == " one two three four</s>"


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("processor_config.json", {"image_processor": {"do_normalize": False}}, "do_normalize"),
        ("processor_config.json", {"image_seq_len": 7}, "image_seq_len 7"),
        ("config.json", {"image_token_id": 3}, "image_token_id 3"),
        ("chat_template.jinja", "{{ messages[0]['content'][1]['text'] }}", "chat template"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, file, change, message):
    write_processor(tmp_path)
    path = tmp_path / file
    if isinstance(change, str):
        path.write_text(change)
    else:
        data = json.loads(path.read_text())
        for key, value in change.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        processor_of(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        processor_of(tmp_path)
