"""Tokenizers that need no code of the model's folder: a SentencePiece file, or a ``tokenizer.json``, as a FastTokenizer.

    tokenizer.model --pieces, scores--> BPE vocabulary and merges --+--> tokenizers.Tokenizer --> FastTokenizer
    tokenizer_config.json --names of added tokens ------------------+

SentencePiece's BPE joins the neighbours whose joined piece has the best score; ``tokenizers`` joins by the order of a list
of merges. So the merges are every split of a piece into two pieces, best piece first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.data.text.chat import FastTokenizer, plain_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_bytes, read_json

_SPACE = "\u2581"  # SentencePiece writes a space so
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # SentencePiece.Type


def load_tokenizer(directory: str | Path, aliases: Mapping[str, str] | None = None) -> FastTokenizer:
    """Loads the tokenizer of an HF folder: its ``tokenizer.json``, else its ``tokenizer.model``. It adds nothing to a text.

    Args:
        directory: of the model.
        aliases: piece -> name it goes by where no token has that name yet.

    Raises:
        ConfigError: neither file is there, or one that cannot be read.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = plain_tokenizer(Tokenizer.from_file(str(directory / "tokenizer.json")))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
        # BOS and EOS are the prompt template's to place.
        return FastTokenizer(json.dumps({**json.loads(tokenizer.text), "post_processor": None}, ensure_ascii=False))
    if not (directory / "tokenizer.model").is_file():
        raise ConfigError(f"{directory} has no tokenizer: neither tokenizer.json nor tokenizer.model is there")
    return from_sentencepiece(directory / "tokenizer.model", _added_tokens(directory), aliases or {})


def from_sentencepiece(path: str | Path, added: Mapping[int, str], aliases: Mapping[str, str]) -> FastTokenizer:
    """Turns a SentencePiece BPE model into a tokenizer with the same ids.

    Control pieces (``<s>``) and user-defined ones are matched in text as whole tokens; nothing is added around a text. Where
    SentencePiece puts a space before a text (Llama), HF's rule holds: it does so after each whole token too.

    Args:
        path: ``tokenizer.model``.
        added: id -> name of a token of the folder's tokenizer_config.json; it replaces the piece of that id.
        aliases: see ``load_tokenizer``.

    Raises:
        ConfigError: not a SentencePiece BPE model, or with a feature that is not built.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    proto = _read(path)
    rules = proto.normalizer_spec
    names = [piece.piece for piece in proto.pieces]
    for index in sorted(added):
        if index > len(names):
            raise ConfigError(f"{path} has {len(names)} pieces, and the folder adds {added[index]!r} at {index}")
        names[index : index + 1] = [added[index]]
    for piece, alias in aliases.items():
        if piece in names and alias not in names:
            names[names.index(piece)] = alias
    vocab = {name: index for index, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ConfigError(f"{path}: two tokens have the same name")
    bytes_too = proto.trainer_spec.byte_fallback
    merges = _merges(vocab, proto.pieces)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=names[0], fuse_unk=True, byte_fallback=bytes_too))
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    steps += [normalizers.Prepend(_SPACE)] if rules.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    whole = [
        index
        for index, name in enumerate(names)
        if index in added or index >= len(proto.pieces) or proto.pieces[index].type in (_CONTROL, _USER_DEFINED)
    ]
    # User-defined pieces are whole in any text, but they are text: only control pieces and tokens of the folder's own steer.
    text = {i for i in whole if i not in added and i < len(proto.pieces) and proto.pieces[i].type == _USER_DEFINED}
    tokenizer.add_tokens([AddedToken(names[index], normalized=False, special=index not in text) for index in whole])
    return plain_tokenizer(tokenizer)


def _read(path: str | Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(read_bytes(path))
    except DecodeError as error:
        raise ConfigError(f"{path} is not a SentencePiece model: {error}") from error
    problem = ""
    if not proto.pieces or proto.pieces[0].type != _UNKNOWN:
        problem = "its first piece is not the unknown token"
    elif proto.trainer_spec.model_type != _BPE:
        problem = "it is not a BPE model"
    elif proto.normalizer_spec.remove_extra_whitespaces:
        problem = "it removes extra spaces"
    elif any(piece.type == _UNUSED for piece in proto.pieces):
        problem = "it has unused pieces"
    elif any(_SPACE in piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED):
        problem = "it has user-defined pieces with spaces"
    if problem:
        raise ConfigError(f"{path} cannot be read here: {problem}; save the tokenizer as tokenizer.json instead")
    return proto


def _merges(vocab: Mapping[str, int], pieces: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that join to a normal one: best score first, then the pair that is first in the vocabulary."""
    found = []
    for piece in pieces:
        text = piece.piece
        for cut in range(1, len(text)) if piece.type == _NORMAL and text in vocab else ():
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-piece.score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _added_tokens(directory: Path) -> dict[int, str]:
    """id -> name of the tokens that the folder's files name: ``added_tokens_decoder``, or older ``added_tokens.json``."""
    path = directory / "tokenizer_config.json"
    try:
        config = read_json(path) if path.is_file() else {}
        added = {int(index): token["content"] for index, token in config.get("added_tokens_decoder", {}).items()}
        older = directory / "added_tokens.json"
        if not added and older.is_file():
            added = {int(index): name for name, index in read_json(older).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the added tokens of {directory} cannot be read: {error!r}") from error
    return added
