"""Turns -> token ids with an exact loss mask, shared by the families.

    pieces (text, supervised) --joined--> one string --tokenised whole--> ids, mask by character offsets  (encode_pieces)
    pieces (text or ids, supervised) --each tokenised on its own--> ids, mask by piece                   (encode_separately)

A string tokenised as a whole, as HF does, has HF's ids; a token is supervised if it starts in a supervised piece. Recipes
that join the ids of separately tokenised pieces get the ids of those.
"""

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.sample import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.text import literal
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
        text: of it.
        answer: it is the assistant's own.
        loss: false: no loss is taken on it, whatever the settings.
        ids: stand for what is not text.
    """

    text: str = ""
    answer: bool = False
    loss: bool = True
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised prompt.

    Attributes:
        ids: int64 [L].
        supervised: bool [L].
        answer_start: index of the first token of the last answer (L if there is none).
        truncated: the too-long policy shortened it.
        num_turns: turns that are left.
    """

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    answer_start: int
    num_turns: int
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Supervised tokens; the first token is never predicted."""
        return int(self.supervised[1:].sum())


class FastTokenizer:
    """A ``tokenizers.Tokenizer`` held as its JSON text, so that it travels to worker processes."""

    def __init__(self, text: str):
        self.text = text
        self._tokenizer: Any = None
        self._literal: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "_tokenizer": None, "_literal": None}

    def steered_by(self, tokens: Sequence[str]) -> "FastTokenizer":
        """Returns the same one, ``tokens`` among its special tokens whatever its files say of them."""
        data = json.loads(self.text)
        for token in data["added_tokens"]:
            token["special"] = token["special"] or token["content"] in tokens
        return FastTokenizer(json.dumps(data, ensure_ascii=False))

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """Tokens that steer a model, which no text of a record may write; see ``literal.specials_of``."""
        added = self._load().get_added_tokens_decoder()
        return literal.specials_of(token.content for _, token in sorted(added.items()) if token.special)

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text alone: no BOS or EOS is added. What ``literal.hidden`` hid in it is text."""
        if literal.hides(text):
            return self._renamed().encode(literal.shown(text, self._steering), add_special_tokens=False).ids
        return self._load().encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name, or None."""
        return self._load().token_to_id(token)

    def encode(self, parts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Tokenises parts as one string; what ``literal.hidden`` hid in them is text.

        Returns:
            ids (int64 [L]), the character that each token starts at (int64 [L]; -1: added, as BOS is), and the number of
            characters of each part.
        """
        if any(literal.hides(part) for part in parts):
            parts = [literal.shown(part, self._steering) for part in parts]
            encoding = self._renamed().encode("".join(parts))
        else:
            encoding = self._load().encode("".join(parts))
        ids = np.array(encoding.ids, dtype=np.int64)
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(ids))
        starts[np.array(encoding.special_tokens_mask, dtype=bool)] = -1
        return ids, starts, [len(part) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens shown."""
        return self._load().decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _steering(self) -> tuple[str, ...]:
        """What a text that hides something may write: the special tokens, and the placeholder where it is a token."""
        return (*self.specials, *((IMAGE_PLACEHOLDER,) if self.token_id(IMAGE_PLACEHOLDER) is not None else ()))

    def _renamed(self) -> Any:
        """The tokenizer under which a special token's own text is text; see ``literal.renamed``."""
        if self._literal is None:
            from tokenizers import Tokenizer

            try:
                self._literal = Tokenizer.from_str(literal.renamed(self.text, self._steering))
            except Exception as error:  # tokenizers has no narrower class
                raise ConfigError(
                    f"a special token of tokenizer_config.json or tokenizer.json is also a piece of plain text, so that no text "
                    f"could hold it ({error}); its special tokens: {', '.join(self.specials)}"
                ) from error
        return self._literal

    def _load(self) -> Any:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.text)
        return self._tokenizer


def plain_tokenizer(backend: Any) -> FastTokenizer:
    """Takes over a ``tokenizers.Tokenizer`` without its truncation and padding settings."""
    settings = json.loads(backend.to_str())
    settings["truncation"] = settings["padding"] = None
    return FastTokenizer(json.dumps(settings, ensure_ascii=False))


def encode_pieces(
    tokenizer: FastTokenizer, pieces: Sequence[Piece], num_turns: int, *, answer_only: bool, never: Sequence[int]
) -> Tokens:
    """Tokenises pieces as one string.

    Args:
        tokenizer: of the model.
        pieces: in order; what begins an answer is no answer, and neither is the first.
        num_turns: turns that they render.
        answer_only: supervise answers alone; else everything.
        never: ids that no loss is taken on (BOS, image tokens).
    """
    ids, starts, lengths = tokenizer.encode([piece.text for piece in pieces])
    bounds = np.cumsum([0, *lengths])
    owner = np.searchsorted(bounds[1:], starts, side="right")
    # The last one of these: a token of no width at the very end.
    answers = np.array([*(piece.answer for piece in pieces), False])
    loss = np.array([*(piece.loss and (piece.answer or not answer_only) for piece in pieces), not answer_only])
    added, place = starts < 0, np.minimum(owner, len(pieces))
    in_answer = answers[place] & ~added
    supervised = loss[place] & ~added & ~np.isin(ids, np.array(never, dtype=np.int64))
    ends = [i for i, piece in enumerate(pieces) if piece.answer]
    first = max((i for i in ends if not pieces[i - 1].answer), default=len(pieces))  # an answer may be several pieces
    answer_start = int(np.argmax((owner == first) & ~added)) if in_answer.any() else len(ids)
    return Tokens(ids=ids, supervised=supervised, answer_start=answer_start, num_turns=num_turns)


def encode_separately(
    tokenizer: FastTokenizer, pieces: Sequence[Piece], num_turns: int, *, answer_only: bool, never: Sequence[int]
) -> Tokens:
    """Tokenises each piece on its own, as recipes do that join token ids; arguments as of ``encode_pieces``.

    BOS, EOS and image tokens come as pieces with ``ids``.
    """
    parts = [tokenizer.ids(piece.text) if piece.ids is None else list(piece.ids) for piece in pieces]
    ids = np.array([i for part in parts for i in part], dtype=np.int64)
    lengths = [len(part) for part in parts]
    loss = np.repeat([piece.loss and (piece.answer or not answer_only) for piece in pieces], lengths).astype(bool)
    supervised = loss & ~np.isin(ids, list(never))
    last = max((i for i, piece in enumerate(pieces) if piece.answer), default=len(pieces))
    return Tokens(ids=ids, supervised=supervised, answer_start=sum(lengths[:last]), num_turns=num_turns)


def fit(
    encode: Callable[[Sequence[Turn]], Tokens],
    turns: Sequence[Turn],
    limit: int,
    *,
    truncate: bool,
    keep: Sequence[int],
) -> Tokens | None:
    """Tokenises a conversation within ``limit`` tokens.

    A longer one loses whole exchanges (a user turn and its answer, with their images) from the end until it fits. If even
    the first is too long, the end of its answer is cut, without an end token that would teach the model to stop there.

    Args:
        encode: tokenises a conversation.
        turns: the whole conversation.
        limit: most tokens.
        truncate: shorten; else a longer conversation does not fit.
        keep: ids that are never cut off (image tokens).

    Returns:
        The tokens, or None if nothing that fits is left.
    """
    tokens = encode(turns)
    if len(tokens.ids) <= limit:
        return tokens
    if not truncate:
        return None
    ends = [i + 1 for i, turn in enumerate(turns) if turn.role == "assistant"] or [len(turns)]
    encoded = {len(turns): tokens}

    def too_long(end: int) -> bool:
        encoded[end] = encoded.get(end) or encode(turns[:end])
        return len(encoded[end].ids) > limit

    if whole := bisect_left(ends, True, key=too_long):  # exchanges that fit; a long conversation has hundreds
        return dataclasses.replace(encoded[ends[whole - 1]], truncated=True)
    tokens = encoded[ends[0]]
    if limit <= tokens.answer_start or np.isin(tokens.ids[limit:], np.array(keep, dtype=np.int64)).any():
        return None
    return dataclasses.replace(tokens, ids=tokens.ids[:limit], supervised=tokens.supervised[:limit], truncated=True)
