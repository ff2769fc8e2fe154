"""What the processors of InternLM2 and of the LLaVA family share: conversations through a prompt template, with images or not.

turns --data.templates--> pieces --each tokenised on its own--> ids, labels
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.chat import FastTokenizer, Piece, Tokens, encode_pieces, encode_separately, fit
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import upright_rgb
from megatron_vlm.data.sentencepiece import load_tokenizer
from megatron_vlm.data.shards import num_placeholders
from megatron_vlm.data.templates import IMAGE, TEMPLATES, Template
from megatron_vlm.data.types import IGNORE_INDEX, NO_OPTIONS, EncodedSample, TokenCount, Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.log import get_logger
from megatron_vlm.models.processor_files import chat_template, generation_stops, read_json

LOGGER = get_logger(__name__)
ALIASES = {"[UNUSED_TOKEN_146]": "<|im_start|>", "[UNUSED_TOKEN_145]": "<|im_end|>"}
"""Names that InternLM2's chat models give to tokens that its base models leave unused."""
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}  # where tokenizer_config.json does not say


@dataclass(frozen=True, kw_only=True)
class TemplateProcessor:
    """Encodes conversations. Plain values only: it travels to worker processes.

    A family whose images are seen gives ``tokens_per_image``, ``patches_per_image`` and ``pixels``.

    Attributes:
        tokenizer: of the model; it adds nothing around a text.
        template: prompt format.
        bos_token_id: begins a conversation, never supervised; None: nothing does.
        eos_token_id, filler_token_id: ids of EOS and filler.
        control_tokens: no turn may hold their text.
        stop_ids: tokens that end an answer.
        image_token_id: holds the place of image features; -1: the model has no images.
        seq_length, truncate, answer_loss_only, max_image_num: see DataConfig.
    """

    tokenizer: FastTokenizer
    template: Template
    bos_token_id: int | None
    eos_token_id: int
    filler_token_id: int
    control_tokens: tuple[str, ...]
    stop_ids: tuple[int, ...]
    image_token_id: int = -1
    seq_length: int
    truncate: bool
    answer_loss_only: bool
    max_image_num: int | None

    @property
    def tokens_per_image(self) -> int:
        """Tokens that hold one image's features."""
        return 0

    @property
    def patches_per_image(self) -> int:
        """Patches that the tower sees of one image."""
        return 0

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Prepares an RGB image: float32 [3, H, W]."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tokenizer"}
        text = json.dumps([1, self.tokenizer.text, values], sort_keys=True, default=dataclasses.asdict)
        return hashlib.sha256(text.encode()).hexdigest()

    def count(
        self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]], options: Mapping[str, Any] = NO_OPTIONS
    ) -> TokenCount:
        """See data.types.Processor. Every image takes as many tokens, whatever its size; ``options`` have no effect."""
        return self._count(turns, len(image_sizes))[0]

    def encode(
        self,
        key: str,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        seed: int = 0,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> EncodedSample:
        """See data.types.Processor. There is no augmentation and no tile, so ``seed`` and ``options`` have no effect."""
        count, tokens = self._count(turns, len(images))
        if tokens is None or count.reason:
            limits = f"{count.tokens} tokens, seq_length {self.seq_length}, {len(images)} images"
            raise DataError(f"cannot be trained on: {count.reason} ({limits})", key=key)
        ids = torch.from_numpy(tokens.ids)
        labels = ids.where(torch.from_numpy(tokens.supervised), torch.tensor(IGNORE_INDEX))
        return self._sample(key, ids, labels, images)

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedSample:
        """Encodes a conversation up to where the assistant answers; every label is -100.

        Raises:
            DataError: as many images as placeholders are needed.
        """
        if num_placeholders(turns) != len(images):
            raise DataError(f"{num_placeholders(turns)} {IMAGE} placeholders for {len(images)} images")
        if images and self.image_token_id < 0:
            raise DataError("this model has no vision tower: ask it without images")
        ids = torch.from_numpy(self._tokenise(turns).ids)
        return self._sample("prompt", ids, torch.full_like(ids, IGNORE_INDEX), images)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's ids, without the tokens that end it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids]).strip()

    def _sample(
        self, key: str, ids: torch.Tensor, labels: torch.Tensor, images: Sequence[Image.Image]
    ) -> EncodedSample:
        positions = (ids == self.image_token_id).nonzero()[:, 0]
        kept = images[: len(positions) // self.tokens_per_image] if len(positions) else ()
        pixels = tuple(self.pixels(upright_rgb(image)) for image in kept)
        return EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)

    def _count(self, turns: Sequence[Turn], num_images: int) -> tuple[TokenCount, Tokens | None]:
        reason = ""
        if num_placeholders(turns) != num_images:
            reason = "placeholders"
        elif num_images and self.image_token_id < 0:
            reason = "images_for_a_text_model"
        elif self.max_image_num is not None and num_images > self.max_image_num:
            reason = "max_image_num"
        elif any(token in turn.text for turn in turns for token in self.control_tokens):
            reason = "control_tokens"
        if reason:
            return TokenCount(tokens=0, supervised=0, image_tokens=0, patches=0, reason=reason), None
        tokens = fit(self._tokenise, turns, self.seq_length, truncate=self.truncate, keep=[self.image_token_id])
        if tokens is None:
            length = len(self._tokenise(turns).ids)
            return TokenCount(tokens=length, supervised=0, image_tokens=0, patches=0, reason="too_long"), None
        image_tokens = int((tokens.ids == self.image_token_id).sum())
        count = TokenCount(
            tokens=len(tokens.ids),
            supervised=tokens.num_supervised,
            image_tokens=image_tokens,
            patches=image_tokens // max(self.tokens_per_image, 1) * self.patches_per_image,
            reason="" if tokens.num_supervised else "nothing_supervised",
            truncated=tokens.truncated,
        )
        return count, tokens

    def _tokenise(self, turns: Sequence[Turn]) -> Tokens:
        pieces = self.template.pieces([self._placed(turn) for turn in turns], self.bos_token_id, self.eos_token_id)
        never = [self.image_token_id, *([] if self.bos_token_id is None else [self.bos_token_id])]
        run = (self.image_token_id,) * self.tokens_per_image
        how = dict[str, Any](num_turns=len(turns), answer_only=self.answer_loss_only, never=never)
        if not self.template.whole:
            split = [part for piece in pieces for part in _split(piece, run)]
            return encode_separately(self.tokenizer, split, **how)
        texts = [dataclasses.replace(p, text=p.text.replace(IMAGE, IMAGE * len(run))) for p in pieces if p.ids is None]
        tokens = encode_pieces(self.tokenizer, texts, **how)
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return dataclasses.replace(
            tokens,
            ids=np.concatenate([np.array(begin, dtype=np.int64), tokens.ids]),
            supervised=np.concatenate([np.zeros(len(begin), dtype=bool), tokens.supervised]),
            answer_start=tokens.answer_start + len(begin),
        )

    def _placed(self, turn: Turn) -> Turn:
        """The single image of a user turn goes in front of its text, on a line of its own, as LLaVA's and XTuner's loaders do.

        Several keep their places: which is which would be lost.
        """
        if self.image_token_id < 0 or turn.role != "user" or turn.text.count(IMAGE) != 1:
            return turn
        return Turn(role=turn.role, text=f"{IMAGE}\n{turn.text.replace(IMAGE, '').strip()}".strip())


def prompt_settings(hf_dir: Path, config: DataConfig, family: str, vocab_size: int) -> dict[str, Any]:
    """Fields of the processor that tokenizer files and the data section decide.

    Without ``data.template`` the prompt is the one of the folder's chat template, where that is one of ours; else
    ``internlm2_chat`` where the vocabulary has its tokens, else ``vicuna``.

    Raises:
        ConfigError: no tokenizer, a template without its tokens, or tokens beyond the model's vocabulary.
    """
    config.check_template(family, *TEMPLATES)
    tokenizer = load_tokenizer(hf_dir, ALIASES)
    bos, eos, pad = special_tokens(hf_dir).values()
    eos = eos or "</s>"
    fits = all(tokenizer.token_id(token) is not None for token in TEMPLATES["internlm2_chat"].special)
    written = chat_template(hf_dir)
    own = next((name for name, form in TEMPLATES.items() if form.jinja(bos or "", eos) == written), None)
    template = TEMPLATES[config.template or own or ("internlm2_chat" if fits else "vicuna")]
    if own not in (None, template.name):
        LOGGER.warning(
            "data.template is %s, the chat template in %s is %s: whoever uses the trained model must write prompts as %s",
            template.name, hf_dir, own, template.name,
        )  # fmt: skip
    found = {token: tokenizer.token_id(token) for token in (*template.special, eos)}
    wrong = [token for token, index in found.items() if index is None or index >= vocab_size]
    if wrong:
        raise ConfigError(
            f"{hf_dir}: the vocabulary of {vocab_size} lacks {', '.join(wrong)}, which data.template {template.name} "
            f"needs: choose another of {', '.join(TEMPLATES)}"
        )
    ids = {name: tokenizer.token_id(token) for name, token in (("bos", bos), ("pad", pad)) if token}
    ends = [found[token] for token in template.special if template.answer.endswith(token)]
    control = {*template.special, eos, *([bos] if bos else [])}
    return dict(
        tokenizer=tokenizer,
        template=template,
        bos_token_id=ids.get("bos"),
        eos_token_id=found[eos],
        filler_token_id=next(i for i in (ids.get("pad"), found[eos]) if i is not None and i < vocab_size),
        control_tokens=tuple(sorted(control)),
        stop_ids=generation_stops(hf_dir, *ends, found[eos]),
        seq_length=config.seq_length,
        truncate=config.on_too_long == "truncate",
        answer_loss_only=config.answer_loss_only,
        max_image_num=config.max_image_num,
    )


def special_tokens(hf_dir: Path) -> dict[str, str | None]:
    """Returns bos_token (None where the tokenizer puts none before a text), eos_token and pad_token by name."""
    path = hf_dir / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    found = {}
    for name, default in _SPECIAL.items():
        value = settings.get(name, default)
        found[name] = value.get("content") if isinstance(value, dict) else value
    return found if settings.get("add_bos_token", True) else {**found, "bos_token": None}


def write_tokenizer(
    directory: Path, prompt: TemplateProcessor, special: Mapping[str, str | None], added: Sequence[str] = ()
) -> Any:
    """Writes a tokenizer that puts BOS before a text, its chat template and the generation config; returns the tokenizer.

    Args:
        directory: exists.
        prompt: a processor's tokenizer, template and ids.
        special: as of ``special_tokens``.
        added: special tokens to add.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    backend = Tokenizer.from_str(prompt.tokenizer.text)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    names = {name: token for name, token in special.items() if token and backend.token_to_id(token) is not None}
    bos, eos = names.get("bos_token", ""), names.get("eos_token", "</s>")
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, prompt.bos_token_id)]
        )
    if backend.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = prompt.template.jinja(bos, eos)
    tokenizer.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=prompt.bos_token_id, eos_token_id=list(prompt.stop_ids), pad_token_id=prompt.filler_token_id
    ).save_pretrained(directory)
    return tokenizer


def _split(piece: Piece, run: tuple[int, ...]) -> list[Piece]:
    """Cuts a piece at its images, each of which becomes ``run``."""
    if piece.ids is not None or not run:
        return [piece]
    parts: list[Piece] = []
    for number, text in enumerate(piece.text.split(IMAGE)):
        if number:
            parts.append(Piece(ids=run))
        if text:
            parts.append(dataclasses.replace(piece, text=text))
    return parts
