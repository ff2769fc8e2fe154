"""Tiny random twins of Idefics3 and SmolVLM with tokenizer and processor, and transformers' processors of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.smolvlm.reference import hf_inputs as hf_inputs
from megatron_vlm.testing.twins.common import CORPUS, noise_samples, randomise

BOS = {"Idefics3": "<|begin_of_text|>", "SmolVLM": "<|im_start|>"}
TEMPLATE = (
    "{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}"
    "{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_tokenizer(kind: str = "SmolVLM", most: int = 3):
    """Trains a byte-level BPE tokenizer with the special tokens of images of ``most`` x ``most`` tiles.

    Idefics3's puts BOS before a text, as Llama 3's does; SmolVLM's does not.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, bos = Tokenizer(models.BPE()), BOS[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", bos, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if kind == "Idefics3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)]
        )
    places = [f"<row_{row}_col_{column}>" for row in range(1, most + 1) for column in range(1, most + 1)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<end_of_utterance>", pad_token="<|im_end|>"
    )
    fast.add_special_tokens(
        {
            "additional_special_tokens": [
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
                "<global-img>",
                *places,
            ]
        }
    )
    return fast


def tiny_config(tokenizer: Any, kind: str = "SmolVLM", **options: Any):
    """Returns a tiny config; ``text`` and ``vision`` override values of those parts, ``tie`` and ``shuffle`` of the whole.

    A tile's side leaves a remainder beyond its last whole patch, as the 384 pixels of the published ones do.
    """
    import transformers

    text = dict(
        model_type="llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=38,
        patch_size=6,
    )
    tie = options.get("tie", kind == "SmolVLM")
    return getattr(transformers, f"{kind}Config")(
        text_config={**text, "tie_word_embeddings": tie, **options.get("text", {})},
        vision_config={**vision, **options.get("vision", {})},
        scale_factor=options.get("shuffle", 2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tie,
    )


def write_tiny_smolvlm(
    directory: str | Path, kind: str = "SmolVLM", *, seed: int = 0, std: float = 0.15, most: int = 3, **options: Any
):
    """Writes a checkpoint (weights, config, tokenizer, processor files) and returns the model.

    Args:
        directory: where to write.
        kind: ``SmolVLM`` or ``Idefics3``.
        seed, std: of the random weights.
        most: tiles along the longer edge of an image.
        options: as of ``tiny_config``.
    """
    import transformers

    tokenizer = tiny_tokenizer(kind, most)
    config = tiny_config(tokenizer, kind, **options)
    config._attn_implementation = "eager"
    model: Any = randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed, std).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    write_processor(directory, tokenizer, config, most)
    return model


def write_processor(directory: str | Path, tokenizer: Any, config: Any, most: int, **images: Any) -> None:
    """Writes tokenizer and processor files as the published models have them; ``images`` are settings of pixels."""
    kind = type(config).__name__.removesuffix("Config")
    side = config.vision_config.image_size
    tokenizer.save_pretrained(directory)
    settings = {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": most * side}, **images}
    image_processor(kind, **settings).save_pretrained(directory)
    tokens = (side // config.vision_config.patch_size // config.scale_factor) ** 2
    processor = {"image_seq_len": tokens, "processor_class": f"{kind}Processor"}
    (Path(directory) / "processor_config.json").write_text(json.dumps(processor))
    (Path(directory) / "chat_template.jinja").write_text(BOS[kind] + TEMPLATE)


def image_processor(kind: str, **settings: Any):
    """transformers' image processor of a kind, without torchvision."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return {"Idefics3": Idefics3ImageProcessorPil, "SmolVLM": SmolVLMImageProcessorPil}[kind](**settings)


def hf_processor(directory: str | Path, kind: str = "SmolVLM"):
    """transformers' processor of a twin; SmolVLM's without its video processor, which needs torchvision."""
    from transformers import AutoTokenizer, Idefics3Processor, SmolVLMProcessor

    class ImagesOnly(SmolVLMProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

        def apply_chat_template(self, conversation, **kwargs):
            return super(SmolVLMProcessor, self).apply_chat_template(conversation, **kwargs)  # no frames to sample

    directory = Path(directory)
    settings = json.loads((directory / "processor_config.json").read_text())
    return {"Idefics3": Idefics3Processor, "SmolVLM": ImagesOnly}[kind](
        image_processor(kind, **json.loads((directory / "preprocessor_config.json").read_text())),
        AutoTokenizer.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
        image_seq_len=settings["image_seq_len"],
    )


def make_samples(
    config: Any, specs: Sequence[tuple[int, int]], seed: int = 0, *, tile: int | None = None
) -> list[EncodedSample]:
    """Makes samples of random tokens and noise tiles.

    Args:
        config: SmolVLMModelConfig.
        specs: one (number of tiles, number of text tokens after them) per sample.
        seed: of the numbers drawn.
        tile: side of a tile in pixels; None: the tower's.
    """
    size = tile or config.vision.image_size
    tokens = (size // config.vision.patch_size // config.shuffle) ** 2
    made = [([(tokens, (config.vision.num_channels, size, size))] * tiles, num_text) for tiles, num_text in specs]
    return noise_samples(made, config.image_token_id, seed=seed)
