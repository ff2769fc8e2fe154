"""A SentencePiece model read as a fast tokenizer: the same ids as SentencePiece's own, on text of every kind."""

import io
import json
import random

import pytest
import sentencepiece

from megatron_vlm.data.text.sentencepiece import from_sentencepiece, load_tokenizer
from megatron_vlm.errors import ConfigError

TEXT = [
    "The code that trains also runs on one process; a run without a GPU is the dry run of a cluster job.",
    "def f(x):\n    return x  # two  spaces, a\ttab and a line break",
    "zero one two three four five six seven eight nine 0123456789 100,000.5",
    "书生·万象 你好，世界。 Größe, élan, naïve ★",
] * 3


@pytest.fixture(scope="module")
def model():
    """Bytes of a model such as InternLM2's: no space before a text, bytes for what no piece covers."""
    return trained()


def trained(**options):
    out = io.BytesIO()
    settings = dict(
        vocab_size=420, model_type="bpe", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=["[UNUSED_TOKEN_145]"], character_coverage=0.98,
        hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=out, **{**settings, **options})
    return out.getvalue()


def texts():
    draw = random.Random(0)
    for _ in range(400):
        line = draw.choice(TEXT)
        start = draw.randrange(len(line))
        piece = line[start : start + draw.randrange(50)]
        yield piece + draw.choice(["", "", "\n", "  ", "[UNUSED_TOKEN_145]\n", " 😀é", "\x00", "\u2581x"])


@pytest.mark.parametrize("prefix", [False, True])
def test_ids_are_sentencepieces(model, tmp_path, prefix):
    data = trained(add_dummy_prefix=True, user_defined_symbols=[]) if prefix else model
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = load_tokenizer(tmp_path)
    for text in texts():
        ids = theirs.encode(text)
        assert ours.ids(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_names_of_the_folder_replace_pieces(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    end, size = pieces.piece_to_id("[UNUSED_TOKEN_145]"), len(pieces)
    settings = {"added_tokens_decoder": {str(end): {"content": "<|im_end|>"}, str(size): {"content": "<extra>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ids("a<|im_end|><extra></s>") == [*pieces.encode("a"), end, size, 2]
    assert tokenizer.token_id("[UNUSED_TOKEN_145]") is None
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": size}))
    assert load_tokenizer(tmp_path, {"[UNUSED_TOKEN_145]": "<|im_end|>"}).ids("<|im_end|><extra>") == [end, size]


def test_tokenizer_json_is_taken_first_and_adds_nothing(model, tmp_path):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(from_sentencepiece_bytes(model, tmp_path).text)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    ids = load_tokenizer(tmp_path).encode("The code")[0]
    assert ids.tolist() == sentencepiece.SentencePieceProcessor(model_proto=model).encode("The code")


def from_sentencepiece_bytes(model, tmp_path):
    (tmp_path / "x.model").write_bytes(model)
    return from_sentencepiece(tmp_path / "x.model", {}, {})


def test_models_that_are_not_built(model, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    def refused(message, change):
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        change(proto)
        with pytest.raises(ConfigError, match=message):
            from_sentencepiece_bytes(proto.SerializeToString(), tmp_path)

    refused("it is not a BPE model", lambda proto: setattr(proto.trainer_spec, "model_type", 1))
    refused("removes extra spaces", lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True))
    refused("first piece is not the unknown", lambda proto: setattr(proto.pieces[0], "type", 1))
    refused("unused pieces", lambda proto: setattr(proto.pieces[300], "type", 5))
    refused("user-defined pieces with spaces", lambda proto: setattr(proto.pieces[3], "piece", "\u2581\u2581"))


def test_files_that_are_none(model, tmp_path):
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"x\.model is not a SentencePiece model"):
        from_sentencepiece_bytes(b"\xff\xff nonsense", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"9999": {"content": "<far>"}}})
    )
    with pytest.raises(ConfigError, match="the folder adds '<far>' at 9999"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
