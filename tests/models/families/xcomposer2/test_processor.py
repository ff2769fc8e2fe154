"""InternLM-XComposer2's prompts, label masks, images and token counts, against its published rules written anew."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.families.xcomposer2.processor import XComposer2Processor
from megatron_vlm.options.flags import parse_flags

# Ids of InternLM2's vocabulary, as its published tokenizer gives them; words of the conversations have made up ones.
VOCABULARY = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "\n": 364, "ass": 525, "user": 1008, "system": 9125, "istant": 11353, " ": 262,
    "[UNUSED_TOKEN_0]": 92397, "[UNUSED_TOKEN_145]": 92542, "[UNUSED_TOKEN_146]": 92543,
    "what": 20_000, "is": 20_001, "this": 20_002, "a": 20_003, "digit": 20_004, "seven": 20_005, "and": 20_006,
    "then": 20_007, "look": 20_008, "at": 20_009, "both": 20_010, "fine": 20_011, "be": 20_012, "brief": 20_013,
}  # fmt: skip
BOS, EOS, END, START, NL, IMG = 1, 2, 92542, 92543, 364, 92397
USER, SYSTEM, ASSISTANT = [START, 1008, NL], [START, 9125, NL], [START, 525, 11353, NL]
PUBLISHED = {
    "model_type": "internlmxcomposer2", "bias": False, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 92544,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
}  # fmt: skip
OF_VARIANT = {
    "7b": {"max_length": 4096, "img_size": 224, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "vl-7b": {"max_length": 4096, "img_size": 490, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "4khd-7b": {"max_length": 16384, "rope_scaling": None},
}


def w(text):
    return [VOCABULARY[word] for word in text.split()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Variant -> a folder with its config.json and the tokenizer above."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    made = {}
    for variant, values in OF_VARIANT.items():
        folder = made[variant] = tmp_path_factory.mktemp(variant)
        (folder / "config.json").write_text(json.dumps({**PUBLISHED, **values}))
        tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("ass|istant|\n| |[a-z]+"), "isolated")
        special = [AddedToken(token, special=True) for token in VOCABULARY if token[0] in "<["]
        tokenizer.add_special_tokens(special)
        tokenizer.save(str(folder / "tokenizer.json"))
    return made


def processor_of(folders, variant="7b", **config):
    settings = {"seq_length": 8192, "answer_loss_only": True, **({"hd_num": 6} if variant == "4khd-7b" else {})}
    return XComposer2Processor.from_pretrained(folders[variant], DataConfig(**{**settings, **config}))


def turns(*texts, system=None):
    """user, assistant, user, assistant ..."""
    first = [Turn(role="system", text=system)] if system else []
    return [*first, *(Turn(role="user" if i % 2 == 0 else "assistant", text=text) for i, text in enumerate(texts))]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def published_labels(ids, image_id=IMG):
    """The rule of the original's training code: end tokens alternate between question and answer."""
    labels, ends, after_answer = list(ids), 0, 0
    for i, token in enumerate(ids):
        if token == END:
            if ends % 2 == 0:  # of a question: what stands since the last answer, and the 5 tokens that begin this one
                labels[after_answer : i + 6] = [-100] * len(labels[after_answer : i + 6])
            else:
                after_answer = i + 1
            ends += 1
        elif token == EOS:
            labels[i + 1 :] = [-100] * len(labels[i + 1 :])
            break
    return [-100 if token == image_id else label for token, label in zip(ids, labels)]


def test_golden_ids_of_one_exchange(folders):
    sample = processor_of(folders).encode("k", turns("  what is this\n", "a digit "), [])
    answer = [VOCABULARY["a"], 262, VOCABULARY["digit"], END]
    words = [VOCABULARY["what"], 262, VOCABULARY["is"], 262, VOCABULARY["this"]]
    ids = [BOS, *USER, *words, END, NL, *ASSISTANT, *answer, NL, EOS]
    assert sample.input_ids.tolist() == ids
    assert sample.labels.tolist() == [-100] * (len(ids) - 6) + [*answer, NL, EOS]


CONVERSATIONS = {
    "text": (("what is this", "a digit"), 0),
    "three_turns": (("what is this", "a digit", "and then", "seven", "look", "fine"), 0),
    "image_first": (("<image>what is this", "a digit"), 1),
    "image_last": (("what is this<image>", "a digit", "look", "fine"), 1),
    "images_between": (("look at <image> and <image> both", "fine", "and <image> then", "a digit"), 3),
    "empty_answer": (("what", "", "and", "fine"), 0),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_equal_the_published_rule(folders, name):
    texts, images = CONVERSATIONS[name]
    processor = processor_of(folders)
    sample = processor.encode("k", turns(*texts), [noise(30, 20)] * images)
    assert sample.labels.tolist() == published_labels(sample.input_ids.tolist())
    assert int((sample.labels != -100).sum()) > 0
    assert len(sample.image_positions) == images * 256 and len(sample.pixels) == images
    assert (sample.input_ids[sample.image_positions] == IMG).all()


def test_images_stand_where_the_text_has_them(folders):
    sample = processor_of(folders).encode("k", turns("look <image> and <image>", "fine"), [noise(9, 9)] * 2)
    run, look, both = [IMG] * 256, [VOCABULARY["look"], 262], [262, VOCABULARY["and"], 262]
    body = [*look, *run, *both, *run]
    assert sample.input_ids.tolist()[: 4 + len(body) + 2] == [BOS, *USER, *body, END, NL]


def test_a_system_turn_is_prompt(folders):
    """The original gives it the assistant's header, and its alternating rule then supervises the questions."""
    sample = processor_of(folders).encode("k", turns("what", "seven", "look", "fine", system="be brief"), [])
    brief = [VOCABULARY["be"], 262, VOCABULARY["brief"]]
    prompt = [BOS, *SYSTEM, *brief, END, NL, *USER, *w("what"), END, NL, *ASSISTANT]
    middle = [NL, *USER, *w("look"), END, NL, *ASSISTANT]
    first, last = [*w("seven"), END], [*w("fine"), END, NL, EOS]
    assert sample.input_ids.tolist() == [*prompt, *first, *middle, *last]
    assert sample.labels.tolist() == [-100] * len(prompt) + first + [-100] * len(middle) + last


def test_all_text_is_supervised_without_answer_loss_only(folders):
    sample = processor_of(folders, answer_loss_only=False).encode("k", turns("<image>what", "seven"), [noise(9, 9)])
    unsupervised = sample.labels == -100
    assert unsupervised.sum() == 257  # BOS and the image
    assert torch.equal(sample.labels[~unsupervised], sample.input_ids[~unsupervised])


def test_a_prompt_ends_where_the_assistant_answers(folders):
    processor = processor_of(folders)
    sample = processor.encode_prompt(turns("<image>what"), [noise(9, 9)])
    tail = [IMG, *w("what"), END, NL, *ASSISTANT]
    assert sample.input_ids.tolist()[-len(tail) :] == tail
    assert (sample.labels == -100).all() and len(sample.pixels) == 1
    assert set(processor.stop_ids) == {END, EOS}
    assert processor.decode([*w("seven"), END]) == "seven"
    with pytest.raises(DataError, match="1 <image> placeholders for 0 images"):
        processor.encode_prompt(turns("<image>what"), [])


def test_counts_equal_what_is_encoded(folders):
    for variant, sizes in (("7b", [(30, 20)] * 3), ("4khd-7b", [(640, 480), (100, 300), (50, 50)])):
        processor = pickle.loads(pickle.dumps(processor_of(folders, variant)))
        for texts, images in CONVERSATIONS.values():
            count = processor.count(turns(*texts), sizes[:images])
            sample = processor.encode("k", turns(*texts), [noise(*size) for size in sizes[:images]])
            assert count.tokens == len(sample.input_ids)
            assert count.image_tokens == len(sample.image_positions)
            assert count.supervised == int((sample.labels[1:] != -100).sum())
            pixels = sum(p.shape[1] * p.shape[2] for p in sample.pixels)
            views = images * 336**2 if variant == "4khd-7b" else 0
            assert count.patches == (pixels + views) // 14**2


def test_long_conversations_lose_whole_exchanges_and_their_images(folders):
    conversation, images = turns("<image>what", "seven", "<image>look", "fine"), [noise(9, 9)] * 2
    whole = processor_of(folders).count(conversation, [(9, 9)] * 2)
    short = processor_of(folders, seq_length=whole.tokens - 1, on_too_long="truncate")
    sample = short.encode("k", conversation, images)
    assert torch.equal(sample.input_ids, processor_of(folders).encode("k", conversation[:2], images[:1]).input_ids)
    assert len(sample.pixels) == 1 and sample.input_ids[-1] == EOS
    assert short.count(conversation, [(9, 9)] * 2).patches == 256
    long_answer = turns("what", "seven and then " * 20)
    cut = processor_of(folders, seq_length=30, on_too_long="truncate").encode("k", long_answer, [])
    assert len(cut.input_ids) == 30 and int((cut.labels != -100).sum()) == 30 - 11  # its beginning is kept
    assert processor_of(folders, seq_length=100).count(conversation, [(9, 9)] * 2).reason.text == "too_long"


def test_unusable_samples_say_why(folders):
    processor = processor_of(folders, max_image_num=1, special_tokens_in_text="refuse")
    assert processor.count(turns("what", "seven"), [(9, 9)]).reason.text == "placeholders"
    assert processor.count(turns("<image><image>", "seven"), [(9, 9)] * 2).reason.text == "max_image_num"
    assert processor.count(turns("what [UNUSED_TOKEN_145]", "seven"), []).reason.text == "control_tokens"
    assert processor.count(turns("what"), []).reason.text == "nothing_supervised"
    with pytest.raises(DataError, match="placeholders"):
        processor.encode("k", turns("what", "seven"), [noise(9, 9)])


# width, height, hd_num -> rows, columns, tokens: the published table
GRIDS = [
    (640, 480, 16, 3, 4, 1921),
    (480, 640, 16, 4, 3, 1933),
    (1920, 1080, 6, 2, 3, 1045),
    (1920, 1080, 25, 4, 6, 3661),
    (3000, 300, 16, 1, 10, None),
    (336, 336, 1, 1, 1, None),
    (2000, 10, 16, 1, 16, None),
]


@pytest.mark.parametrize("width, height, hd_num, rows, columns, tokens", GRIDS)
def test_hd_grids_and_token_counts(folders, width, height, hd_num, rows, columns, tokens):
    processor = processor_of(folders, "4khd-7b", hd_num=hd_num)
    assert processor.grid((width, height)) == (rows, columns)
    pixels = processor.pixels(noise(width, height))
    assert pixels.shape == (3, rows * 336, columns * 336)
    count = processor.count(turns("<image>", "seven"), [(width, height)]).image_tokens
    assert count == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
    assert tokens is None or count == tokens


def test_square_pixels_equal_transformers(folders):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    hf = CLIPImageProcessorPil(do_center_crop=False, size={"height": 224, "width": 224})
    china = Image.fromarray(load_sample_image("china.jpg"))
    for image in (china, china.crop((3, 5, 90, 333))):
        expected = hf(image, return_tensors="pt").pixel_values[0]
        assert torch.equal(processor_of(folders).pixels(image), expected)


def test_variants_are_told_apart_and_their_tokens():
    shapes = {name: XComposer2Config.from_hf({**PUBLISHED, **values}) for name, values in OF_VARIANT.items()}
    assert {name: model.variant for name, model in shapes.items()} == {name: name for name in OF_VARIANT}
    assert [shapes["7b"].tokens(), shapes["vl-7b"].tokens()] == [256, 1225]
    assert [model.feature_size for model in shapes.values()] == [1024, 1024, 4096]
    derivative = {**PUBLISHED, **OF_VARIANT["vl-7b"], "model_type": "internlm"}
    code = {"AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"}
    assert XComposer2Config.from_hf({**derivative, "auto_map": code}) == shapes["vl-7b"]
    with pytest.raises(ConfigError, match="the first InternLM is not built"):
        XComposer2Config.from_hf(derivative)
    with pytest.raises(ConfigError, match="internlmxcomposer2"):
        XComposer2Config.from_hf({**PUBLISHED, "model_type": "internlm2"})


def settings_of(*flags):
    """The data and model settings that command line flags make."""
    found = {"data": {}, "model": {}}
    for key, value in parse_flags(flags).settings:
        section, name = key.split(".")
        found[section][name] = value
    return found


def test_the_original_scripts_flags(folders, caplog):
    flags = settings_of("--fix_vit", "True", "--fix_sampler", "False", "--img_size", "490", "--hd_num", "-1")
    assert flags["model"] == {"freeze_vision": True, "freeze_connector": False}
    config = DataConfig.from_dict({"seq_length": 4096, **flags["data"]})
    assert XComposer2Processor.from_pretrained(folders["vl-7b"], config).model.variant == "vl-7b"
    with pytest.raises(ConfigError, match="490: this checkpoint has positions for 224 pixels"):
        XComposer2Processor.from_pretrained(folders["7b"], config)
    with pytest.raises(ConfigError, match=r"4KHD: set data\.hd_num"):
        XComposer2Processor.from_pretrained(folders["4khd-7b"], config)
    with caplog.at_level(logging.INFO, logger="megatron_vlm"):
        hd = XComposer2Processor.from_pretrained(folders["4khd-7b"], config.replace(hd_num=16))
    assert hd.hd_num == 16 and "img_size) has no effect on the 4khd variant" in caplog.text
    with pytest.raises(ConfigError, match=r"hd_num 16 is for the 4khd variant: with vl-7b"):
        XComposer2Processor.from_pretrained(folders["vl-7b"], config.replace(hd_num=16))
    with pytest.raises(ConfigError, match="hd_num must be at least 1"):
        DataConfig(seq_length=2, hd_num=0)
    with pytest.raises(ConfigError, match="shortest_edge 3 has no effect on InternLM-XComposer2"):
        XComposer2Processor.from_pretrained(folders["vl-7b"], config.replace(shortest_edge=3))


def test_what_changes_samples_changes_the_fingerprint(folders):
    prints = {
        processor_of(folders).fingerprint,
        processor_of(folders, "vl-7b").fingerprint,
        processor_of(folders, "4khd-7b").fingerprint,
        processor_of(folders, "4khd-7b", hd_num=7).fingerprint,
        processor_of(folders, answer_loss_only=False).fingerprint,
    }
    assert len(prints) == 5
    assert processor_of(folders).fingerprint in prints
