"""Makes an Idefics2 model out of parts, tensor by tensor: nothing is read until a converter asks for it.

    assemble:               language model + SigLIP + fresh connector + 3 added tokens --> HFModel
    add_end_of_utterance:   Idefics2 without <end_of_utterance> + 1 token       --> HFModel

Both write the non-weight files (config, generation config, tokenizer, processor, chat template) to a folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError, ConversionError, nearest
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.assembling import (
    NewRows,
    add_connector,
    copy_licences,
    drawn,
    extend_vocabulary,
    extended_rows,
)
from megatron_vlm.models.families.internlm2.llama import llama_config, llama_tensors
from megatron_vlm.models.processing.processor_files import add_stops, load_tokenizer
from megatron_vlm.weights.mapping import DerivedTensors, HFModel, TensorInfo, TensorStore

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Of HuggingFaceM4/idefics2-8b, processor_config.json."""
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "internlm2")
_EMBEDDING, _HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"
_POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>")
"""Tokens of Llama vocabularies that may stand for padding: no text holds them. EOS must not: it is supervised."""


@dataclass(frozen=True, kw_only=True)
class AssembleOptions(Config):
    """How new parts are made.

    Attributes:
        seed: of everything drawn; each tensor has its own stream, so the order of reading does not matter.
        image_size: side of the vision position table in pixels; another than the tower's own interpolates the table
            (bicubic). None keeps the tower's.
        new_rows: rows of added tokens: ``mean`` of the existing ones, or ``normal``: N(0, 0.02).
        latents: of the perceiver: ``ones`` as in HF, or ``normal``: N(0, 0.02), which tells them apart from the first
            step on.
        perceiver: values of HF's perceiver_config, such as ``resampler_n_latents``.
    """

    seed: int = 0
    image_size: int | None = None
    new_rows: NewRows = "mean"
    latents: Literal["ones", "normal"] = "ones"
    perceiver: dict[str, int] | None = None


def assemble(
    llm: HFModel, vision: HFModel, files: Path, settings: dict[str, Any], projector: HFModel | None = None
) -> HFModel:
    """Joins a language model and a SigLIP tower by a connector, which is fresh unless it is given.

    Args:
        llm: a model of Llama's shape, or InternLM2ForCausalLM, which becomes one.
        vision: SiglipVisionModel, or a whole SiglipModel, of which the text tower is left out.
        files: empty folder that takes the non-weight files.
        settings: of AssembleOptions: how the new parts are made. They have the dtype of the LLM's embedding.
        projector: the connector alone (``model.connector. ...``), or an Idefics2 that has it.

    Raises:
        ConversionError: a part is of another architecture, or has tensors missing, unknown or of a wrong shape.
    """
    options = AssembleOptions.from_dict(settings)
    if llm.config.get("model_type") not in _DECODERS:
        found = llm.config.get("model_type")
        raise ConversionError(f"--llm {llm.directory} has model_type {found!r}, not one of {', '.join(_DECODERS)}")
    language, language_infos = llama_tensors(llm)
    tokenizer = _tokenizer(llm.directory)
    known = len(tokenizer)
    _add_tokens(tokenizer, [FAKE, IMAGE, END_OF_UTTERANCE])
    pad = _reserve_pad(tokenizer)
    config = _config(llm, vision, tokenizer, options)
    if "model.embed_tokens.weight" not in language_infos:
        raise ConversionError(f"--llm {llm.directory} has no model.embed_tokens.weight")
    dtype = language_infos["model.embed_tokens.weight"].dtype
    config.dtype = dtype
    _write_files(files, llm, config, tokenizer, pad)

    infos: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    expected = _expected_shapes(config)
    stored = DerivedTensors(language_infos, language, (llm.tensors,))
    names = _source_names(HFModel(directory=llm.directory, config=llm.config, tensors=stored), vision, expected)
    new_ids = list(range(known, len(tokenizer)))
    connector = {name: shape for name, shape in expected.items() if name not in names}
    draw = partial(_fresh, config=config, options=options)
    add_connector((readers, infos), connector, dtype, draw, projector)
    for name, (store, source) in names.items():
        shape = expected[name]
        infos[name] = TensorInfo(dtype=store.infos[source].dtype, shape=shape)
        readers[name] = partial(store.read, source)
        if name in (_EMBEDDING, _HEAD):
            readers[name] = extended_rows(readers[name], name, shape[0], new_ids, options.new_rows, options.seed)
        elif name == _POSITIONS:
            readers[name] = _resized(readers[name], shape)
        elif store.infos[source].shape != shape:
            raise ConversionError(
                f"{source} has shape {list(store.infos[source].shape)}, the config gives {list(shape)}"
            )
    stores = [part.tensors for part in (llm, vision, projector) if part is not None]
    tensors = DerivedTensors(infos, readers, stores)
    return HFModel(directory=files, config=_read_json(files / "config.json"), tensors=tensors)


def add_end_of_utterance(model: HFModel, files: Path, settings: dict[str, Any]) -> HFModel:
    """Gives a base Idefics2 the token that ends a turn: tokenizer, config, and one row of embedding and head.

    A model that has the token is returned as it is. ``files`` already holds a copy of the model's non-weight files,
    and ``settings`` are those of AssembleOptions.

    Raises:
        ConversionError: the folder has no tokenizer.
    """
    options = AssembleOptions.from_dict(settings)
    tokenizer = _tokenizer(files)
    vocab_size = model.tensors.infos[_EMBEDDING].shape[0]
    token_id = tokenizer.get_vocab().get(END_OF_UTTERANCE)
    if token_id is not None and token_id < vocab_size:
        get_logger(__name__).info("%s has %s already: nothing is added", model.directory, END_OF_UTTERANCE)
        return model
    _add_tokens(tokenizer, [END_OF_UTTERANCE])
    token_id = tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)
    for stale in ("special_tokens_map.json", "added_tokens.json"):  # tokenizer.json holds them
        (files / stale).unlink(missing_ok=True)
    tokenizer.save_pretrained(files)
    templates = [*files.glob("chat_template.*"), *([files] if tokenizer.chat_template else [])]
    if not templates and "chat_template" not in _read_json(files / "processor_config.json"):
        (files / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    add_stops(files, [token_id])
    rows = max(vocab_size, token_id + 1)
    config = {**model.config, "text_config": {**model.config["text_config"], "vocab_size": rows}}
    _write_json(files / "config.json", config)
    infos = dict(model.tensors.infos)
    readers: dict[str, Callable[[], Tensor]] = {name: partial(model.tensors.read, name) for name in infos}
    tied = bool(config.get("tie_word_embeddings"))
    extend_vocabulary(
        (readers, infos), (_EMBEDDING, _HEAD), rows, [token_id], options.new_rows, options.seed, tied=tied
    )
    return HFModel(directory=files, config=config, tensors=DerivedTensors(infos, readers, (model.tensors,)))


def _add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(token, normalized=False, special=True) for token in tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": added}, replace_extra_special_tokens=False)


def _reserve_pad(tokenizer: Any) -> int:
    """Id for padding: the tokenizer's own unless that is EOS, else a reserved token, else a new ``<pad>``."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in _PAD_CANDIDATES if token in vocabulary), "<pad>")
        if tokenizer.pad_token not in vocabulary:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer.pad_token_id


def _config(llm: HFModel, vision: HFModel, tokenizer: Any, options: AssembleOptions) -> Any:
    from transformers import AutoConfig, Idefics2Config, LlamaConfig, SiglipVisionConfig
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig

    model_type = vision.config.get("model_type")
    if model_type not in ("siglip", "siglip_vision_model"):
        raise ConversionError(f"--vision {vision.directory} has model_type {model_type!r}, not a SigLIP one")
    tower = SiglipVisionConfig.from_dict(
        vision.config.get("vision_config", {}) if model_type == "siglip" else vision.config
    )
    own = llm.config.get("model_type") != "internlm2"
    text = (AutoConfig.from_pretrained(llm.directory) if own else LlamaConfig(**llama_config(llm.config))).to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version"):  # said once, for the whole
        text.pop(key, None)
    text["vocab_size"] = max(text["vocab_size"], len(tokenizer))
    text["pad_token_id"] = tokenizer.pad_token_id
    image_size = options.image_size or tower.image_size
    if image_size < tower.patch_size:
        raise ConfigError(f"--image-size {image_size} is smaller than a patch of {tower.patch_size}")
    known = set(Idefics2PerceiverConfig().to_dict())
    for key in options.perceiver or {}:
        if key not in known:
            raise ConfigError(f"unknown perceiver option {key!r}{nearest(key, known)}")
    return Idefics2Config(
        text_config=text,
        vision_config={
            key: getattr(tower, key)
            for key in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
                "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
            )
        } | {"image_size": image_size},
        perceiver_config={"hidden_size": text["hidden_size"], **(options.perceiver or {})},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        architectures=["Idefics2ForConditionalGeneration"],
    )  # fmt: skip


def _write_files(files: Path, llm: HFModel, config: Any, tokenizer: Any, pad: int) -> None:
    from transformers import GenerationConfig, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    config.save_pretrained(files)
    side = config.vision_config.image_size
    images = Idefics2ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": side, "shortest_edge": min(378, side)}
    )
    latents = config.perceiver_config.resampler_n_latents
    Idefics2Processor(images, tokenizer, image_seq_len=latents, chat_template=CHAT_TEMPLATE).save_pretrained(files)
    generation = _read_json(llm.directory / "generation_config.json")
    generation.pop("_from_model_config", None)  # it is written out, not derived
    end_of_utterance, fake, image = tokenizer.convert_tokens_to_ids([END_OF_UTTERANCE, FAKE, IMAGE])
    generation |= {
        "eos_token_id": generation.get("eos_token_id", llm.config.get("eos_token_id")),
        "bos_token_id": generation.get("bos_token_id", llm.config.get("bos_token_id")),
        "pad_token_id": pad,
        "bad_words_ids": [[fake], [image]],
    }
    GenerationConfig(**generation).save_pretrained(files)
    add_stops(files, [end_of_utterance])
    copy_licences(llm.directory, files)


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """HF names and shapes of the whole model, from its modules on the meta device."""
    from transformers import Idefics2ForConditionalGeneration

    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(config)
    shapes = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }  # a tied head is not repeated
    return {name: shapes[name] for name in sorted(shapes)}


def _source_names(
    llm: HFModel, vision: HFModel, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[TensorStore, str]]:
    """HF name of the whole -> (part, its name there), for everything but the connector."""
    found: dict[str, tuple[TensorStore, str]] = {}
    unknown = []
    for name in llm.tensors.infos:
        target = "model.text_model." + name.removeprefix("model.") if name.startswith("model.") else name
        if target in expected:
            found[target] = (llm.tensors, name)
        elif name != _HEAD and not name.endswith("rotary_emb.inv_freq"):  # a tied head may be stored all the same
            unknown.append(name)
    for name in vision.tensors.infos:
        target = "model.vision_model." + name.removeprefix("vision_model.")
        if target in expected:
            found[target] = (vision.tensors, name)
        elif (
            not name.startswith(("text_model.", "vision_model.head.", "head.", "logit_")) and "position_ids" not in name
        ):
            unknown.append(name)
    missing = [name for name in expected if name not in found and not name.startswith("model.connector.")]
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise ConversionError(
                f"{len(names)} tensors {problem} in --llm {llm.directory} and --vision {vision.directory}: "
                + ", ".join(names[:20])
                + more
            )
    return found


def _fresh(name: str, info: TensorInfo, config: Any, options: AssembleOptions) -> Tensor:
    """A tensor of the connector as HF initialises it: norms and latents ones, linears N(0, initializer_range)."""
    latents = name.endswith("latents")
    if latents and options.latents == "ones":
        return torch.ones(info.shape, dtype=info.dtype)
    return drawn(name, info, options.seed, 0.02 if latents else config.perceiver_config.initializer_range)


def _resized(read: Callable[[], Tensor], shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Reads a position table [side * side, H] at another side, by bicubic interpolation."""

    def read_resized() -> Tensor:
        table = read()
        if tuple(table.shape) == shape:
            return table
        old, new = round(table.shape[0] ** 0.5), round(shape[0] ** 0.5)
        if old * old != table.shape[0] or table.shape[1] != shape[1]:
            raise ConversionError(f"position table {list(table.shape)} does not become {list(shape)}")
        grid = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(shape).to(table.dtype)

    return read_resized


def _tokenizer(directory: Path) -> Any:
    try:
        return load_tokenizer(directory)
    except ConfigError as error:
        raise ConversionError(f"{directory} has no tokenizer that tokens could be added to: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, ConversionError) if path.exists() else {}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
