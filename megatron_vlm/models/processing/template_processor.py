"""What the processors of InternLM2 and of the LLaVA family share: conversations through a prompt template, with images or not.

turns --data.templates--> pieces --each tokenised on its own--> ids, labels
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces, encode_separately
from megatron_vlm.data.text.sentencepiece import load_tokenizer
from megatron_vlm.data.text.templates import IMAGE, TEMPLATES, Template
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.log import get_logger
from megatron_vlm.models.processing.chat_template import chat_template
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.processor_files import ALIASES, fast_tokenizer, generation_stops, special_tokens

LOGGER = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class TemplateProcessor(ConversationProcessor):
    """Encodes conversations. Plain values only: it travels to worker processes.

    A family whose images are seen gives ``tokens_per_image``, ``patches_per_image`` and ``pixels``; one whose images are of many
    sizes ``image_tokens``, ``patches`` and ``views`` in place of them.

    Attributes:
        template: prompt format.
        bos_token_id: begins a conversation, never supervised; None: nothing does.
        eos_token_id: id of EOS.
    """

    template: Template
    bos_token_id: int | None
    eos_token_id: int

    @property
    def tokens_per_image(self) -> int:
        """Tokens that hold one image's features."""
        return 0

    def image_tokens(self, plan: Any) -> int:
        """The same of an image of which this is the plan."""
        return self.tokens_per_image

    @property
    def patches_per_image(self) -> int:
        """Patches that the tower sees of one image."""
        return 0

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Prepares an RGB image: float32 [3, H, W]."""
        raise NotImplementedError

    def unusable(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> Reason:
        return Reason.IMAGES_FOR_A_TEXT_MODEL if sizes and self.image_token_id < 0 else Reason.NONE

    def patches(self, plan: Any) -> int:
        return self.patches_per_image

    def views(self, image: Image.Image, plan: Any, draw: Any) -> list[torch.Tensor]:
        return [self.pixels(image)]

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedSample:
        if images and self.image_token_id < 0:
            message = "this model has no vision tower: ask it without images"
            raise DataError(message, reason=Reason.IMAGES_FOR_A_TEXT_MODEL)
        return super().encode_prompt(turns, images)

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Any], prompt: bool = False) -> Tokens:
        """A template ends in the assistant's header by itself where the last turn is the user's."""
        pieces = self.template.pieces([self._placed(turn) for turn in turns], self.bos_token_id, self.eos_token_id)
        never = [self.image_token_id, *([] if self.bos_token_id is None else [self.bos_token_id])]
        counts = [self.image_tokens(plan) for plan in plans] if self.image_token_id >= 0 else []
        how = dict[str, Any](num_turns=len(turns), answer_only=self.answer_loss_only, never=never)
        if not self.template.whole:
            runs = ((self.image_token_id,) * count for count in counts)
            split = [part for piece in pieces for part in _split(piece, runs)] if counts else pieces
            return encode_separately(self.tokenizer, split, **how)
        places = (IMAGE * count for count in counts)
        texts = [
            dataclasses.replace(p, text=re.sub(IMAGE, lambda _: next(places), p.text) if counts else p.text)
            for p in pieces
            if p.ids is None
        ]
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
        return dataclasses.replace(turn, text=f"{IMAGE}\n{turn.text.replace(IMAGE, '').strip()}".strip())


def prompt_settings(hf_dir: Path, config: DataConfig, family: str, vocab_size: int) -> dict[str, Any]:
    """Fields of the processor that tokenizer files and the data section decide.

    Without ``data.template`` the prompt is the one of the folder's chat template, where that is one of ours; else
    ``internlm2_chat`` where the vocabulary has its tokens, ``vicuna`` where it has ``</s>``, else ``default``, which needs none.

    Raises:
        ConfigError: no tokenizer, a template without its tokens, or tokens beyond the model's vocabulary.
    """
    config.check_template(family, *TEMPLATES)
    tokenizer = load_tokenizer(hf_dir, ALIASES)
    bos, eos, pad = special_tokens(hf_dir).values()
    eos = eos or "</s>"
    fitting = (
        name
        for name in ("internlm2_chat", "vicuna", "default")
        if all(tokenizer.token_id(token) is not None for token in TEMPLATES[name].special)
    )
    written = chat_template(hf_dir)
    own = next((name for name, form in TEMPLATES.items() if form.jinja(bos or "", eos) == written), None)
    template = TEMPLATES[config.template or own or next(fitting)]
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
    return dict(
        tokenizer=tokenizer.steered_by([*template.special, eos, *([bos] if bos else [])]),
        template=template,
        bos_token_id=ids.get("bos"),
        eos_token_id=found[eos],
        filler_token_id=next(i for i in (ids.get("pad"), found[eos]) if i is not None and i < vocab_size),
        stop_ids=generation_stops(hf_dir, *ends, found[eos]),
        **data_fields(config),
    )


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
    from transformers import GenerationConfig

    tokenizer = fast_tokenizer(prompt.tokenizer.text, special, added)
    tokenizer.chat_template = prompt.template.jinja(tokenizer.bos_token or "", tokenizer.eos_token or "</s>")
    tokenizer.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=prompt.bos_token_id, eos_token_id=list(prompt.stop_ids), pad_token_id=prompt.filler_token_id
    ).save_pretrained(directory)
    return tokenizer


def _split(piece: Piece, runs: Iterator[tuple[int, ...]]) -> list[Piece]:
    """Cuts a piece at its images, each of which becomes the next of ``runs``."""
    if piece.ids is not None:
        return [piece]
    parts: list[Piece] = []
    for number, text in enumerate(piece.text.split(IMAGE)):
        if number:
            parts.append(Piece(ids=next(runs)))
        if text:
            parts.append(dataclasses.replace(piece, text=text))
    return parts
