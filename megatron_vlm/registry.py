"""The model families: FamilySpec and the one table of names."""

import copy
import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.data.formats.records import OWN_VIDEO, VideoSettings
from megatron_vlm.errors import ConfigError, MegatronVLMError, nearest
from megatron_vlm.files import describe
from megatron_vlm.models.hf_config import check_numbers, check_parts

if TYPE_CHECKING:  # they load torch, which flags are read without
    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.data.types import Processor
    from megatron_vlm.models.family_config import FamilyConfig


@dataclass(frozen=True)
class Part:
    """A function of a family's module, imported when it is first asked for: looking for a family imports no model.

    Attributes:
        package: the family's, its ``__name__``.
        target: ``module:function`` in the package, or ``module:Class.method``.
    """

    package: str
    target: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.resolve()(*args, **kwargs)

    def resolve(self) -> Callable[..., Any]:
        """Imports the module and returns the function."""
        module, names = self.target.split(":")
        return operator.attrgetter(names)(importlib.import_module(f"{self.package}.{module}"))


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """Another HF naming than a family's own, for ``mg2hf --as``.

    Attributes:
        mapping: ``mapping(config) -> weights.mapping.Mapping``: the family's full tensors under those HF names;
            ``folder/name`` goes to a folder beside the others.
        files: ``files(hf_dir, hf_config, directory)`` writes every non-weight file, config.json among them; ``hf_dir`` and
            ``hf_config`` are the family's own.
        adapters: folder of the mapping's names -> folder that takes an adapter of what lies there; the naming's other folders
            are written whole beside them. None: one adapter for all.
    """

    mapping: Callable[[Any], Any]
    files: Callable[[Path, dict[str, Any], Path], None]
    adapters: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What the adapter flags of original programs mean in a family's module names.

    Attributes:
        language: linears of the language model: PEFT's list of endings, or one expression where the tower has such names too.
        vision: linears of the tower, one expression; None: there is no tower.
        whole: ``whole(hf_config) -> {"connector" | "vision" | "head": modules_to_save}`` that mean the whole part.
        frozen_beside: part -> flag of the family's original program, which froze it beside adapters whatever the flag said.
    """

    language: str | tuple[str, ...]
    vision: str | None = None
    whole: Callable[[Mapping[str, Any]], Mapping[str, tuple[str, ...]]]
    frozen_beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecipeSpec:
    """The packaged recipes whose settings hold where a command names none, and what the original program's batch was.

    Attributes:
        full, lora, qlora: names of recipes, by what trains.
        accumulation: microbatches of a rank in an update, where the original's batch grows with the ranks; None: the recipe's
            global batch.
    """

    full: str
    lora: str
    qlora: str
    accumulation: int | None = None


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Everything the house needs to know of one family.

    Attributes:
        name: as users write it (``--family``).
        model_types: HF ``model_type`` values whose directories this family reads.
        config: ``config(hf_config: dict) -> FamilyConfig`` (frozen dataclass; resolves HF's defaults).
        build: ``build(config, topology, options, *, vp_stage) -> VisionLanguageModel``; ``options`` are ModelOptions.
        processor: ``processor(hf_dir, data config) -> data.types.Processor``.
        stop_ids: ``stop_ids(hf_dir) -> ids`` that end an answer of a model with these tokenizer files.
        mapping: ``mapping(config, tp=1) -> weights.mapping.Mapping``, both directions. ``tp`` decides what runs replicated (heads
            that do not divide). The vocabulary is not padded: whoever cuts for Megatron calls ``Mapping.padded``.
        assemble: ``assemble(llm, vision, files, options, projector=None) -> HFModel`` makes one model out of two (HFModel), with
            a fresh connector or a trained one, and writes its non-weight files to the folder ``files``; ``options`` is plain
            data. None: not offered.
        towers: beginnings of ``model_type`` of the vision towers that ``assemble`` takes, ``decoders``: ``model_type`` of the
            language models, and ``connector``: what it puts between them (``mlp``, ``pixel_shuffle``, ``perceiver``).
        parts: ``parts(directory) -> {"llm", "vision", "projector": folder}`` of a folder that holds the parts to assemble, or
            None.
        add_end_of_utterance: ``(model, files, options) -> HFModel`` adds the token that ends a turn to a vocabulary without
            it; ``files`` holds a copy of the model's non-weight files. None: not offered.
        reference: ``reference(config)`` runs HF's model beside ours for ``convert verify``; None, or where it returns None: HF
            has no such model.
        exports: other HF namings that the family's weights can be written in, by name.
        drop_path: the family's tower takes ``ModelOptions.drop_path_rate``.
        adapters: what the flags of adapters mean.
        recipes: ``recipes(hf_config) -> RecipeSpec``, by the variant that the config is of.
        record_format: format of records that nothing else tells apart.
        video: ``video(hf_dir)`` says how the model's own processor takes frames of a video.
        facts: flag of the original program that says how the model is -> (keys of config.json, value without any).
    """

    name: str
    model_types: tuple[str, ...]
    config: "Callable[[dict[str, Any]], FamilyConfig]"
    build: Callable[..., Any]
    processor: "Callable[[Path, DataConfig], Processor]"
    stop_ids: Callable[[Path], tuple[int, ...]]
    mapping: Callable[..., Any]
    assemble: Callable[..., Any] | None = None
    towers: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
    connector: str = ""
    parts: Callable[[Path], dict[str, Path] | None] | None = None
    add_end_of_utterance: Callable[..., Any] | None = None
    reference: Callable[[Any], Any] | None = None
    exports: Mapping[str, ExportSpec] = field(default_factory=dict)
    drop_path: bool = False
    adapters: AdapterSpec
    recipes: Callable[[Mapping[str, Any]], RecipeSpec]
    record_format: str = "llava"
    video: "Callable[[Path], VideoSettings]" = lambda hf_dir: OWN_VIDEO
    facts: Mapping[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict)

    def read_config(self, hf_config: dict[str, Any], path: Path) -> "FamilyConfig":
        """The family's model config of a config.json.

        Args:
            hf_config: content of the file.
            path: of the file, for the error.

        Raises:
            ConfigError: a number that no model has, or a config that the family cannot read.
        """
        try:
            check_numbers(hf_config)
            # transformers' config classes change what they are given, and let null through.
            config = self.config(copy.deepcopy(hf_config))
            check_parts(config)
            return config
        except MegatronVLMError as error:
            raise ConfigError(f"{describe(path)}: {error}") from error
        except (
            Exception
        ) as error:  # transformers' classes, and arithmetic on what they let through, raise whatever comes
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{describe(path)} cannot be read as a config of family {self.name} ({type(error).__name__}: {reason}): compare "
                "it with the file that the model was published with"
            ) from error

    def open_processor(self, hf_dir: Path, data: "DataConfig") -> "Processor":
        """The processor of a model's folder.

        Args:
            hf_dir: its tokenizer and processor files.
            data: the section ``data``.

        Raises:
            ConfigError: files that cannot be read, or a setting that cannot work.
        """
        try:
            processor = self.processor(hf_dir, data)
            processor.tokenizer.ids("a")  # it is built when it is first used: here, and not in the midst of the data
            return processor
        except MegatronVLMError:
            raise
        except Exception as error:  # what tokenizer libraries, and arithmetic on settings, raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            names = (
                "tokenizer.json, tokenizer_config.json, preprocessor_config.json, processor_config.json, config.json"
            )
            raise ConfigError(
                f"tokenizer or processor of {hf_dir} cannot be used ({problem}): one of its files is damaged or of another "
                f"model; fetch them again ({names})"
            ) from error


# What adapters are set on in modules of transformers' Llama and of its CLIP and SigLIP towers.
LLAMA_LINEARS = r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
CLIP_LINEARS = r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
# What InternLM-XComposer2's finetune.py lists; these names end no module of a tower.
INTERNLM2_LINEARS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

# One line per family: name -> "module:attribute", imported when asked for.
FAMILIES = {
    "gemma3": "megatron_vlm.models.families.gemma3:SPEC",
    "idefics2": "megatron_vlm.models.families.idefics2:SPEC",
    "idefics2_llama3": "megatron_vlm.models.families.idefics2:LLAMA3_SPEC",
    "internvl3": "megatron_vlm.models.families.internvl3:SPEC",
    "internlm2": "megatron_vlm.models.families.internlm2:SPEC",
    "qwen2_5_vl": "megatron_vlm.models.families.qwen2_5_vl:SPEC",
    "qwen3_vl": "megatron_vlm.models.families.qwen3_vl:SPEC",
    "xcomposer2": "megatron_vlm.models.families.xcomposer2:SPEC",
    "smolvlm": "megatron_vlm.models.families.smolvlm:SPEC",
    "llava_internlm2": "megatron_vlm.models.families.llava_internlm2:SPEC",
    "llava_next": "megatron_vlm.models.families.llava_next:SPEC",
}


def get(name: str) -> FamilySpec:
    """Returns the family called ``name``.

    Raises:
        ConfigError: unknown name, with the known ones.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family {name!r}{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def family_of(hf_config: dict[str, Any]) -> FamilySpec:
    """Returns the family that reads an HF config: by ``model_type``, and for Idefics2 by its text model.

    Raises:
        ConfigError: no family reads this model_type.
    """
    model_type = hf_config.get("model_type")
    text = hf_config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    if model_type == "llava" and any(key.startswith("mm_") for key in hf_config):
        raise ConfigError(
            "this is a LLaVA in the layout of its original code (keys mm_*), not transformers' LlavaForConditionalGeneration: "
            "take the model in that layout (llava-hf/llava-1.5-7b-hf and the like), or convert it with transformers' "
            "convert_llava_weights_to_hf.py"
        )
    for wanted in (f"{model_type}/{text_type}", model_type):
        for name in FAMILIES:
            if wanted in get(name).model_types:
                return get(name)
    raise ConfigError(f"no model family reads model_type {model_type!r}; known families: {', '.join(FAMILIES)}")


def assembler(tower: str, decoder: str, connector: str | None = None) -> FamilySpec:
    """Returns the family that joins a tower and a decoder (their ``model_type``).

    Args:
        tower, decoder: what is joined.
        connector: by what; None: the first family that takes both.

    Raises:
        ConfigError: there is none, with those that there are.
    """
    specs = [spec for spec in map(get, FAMILIES) if spec.assemble]
    for spec in specs:
        if tower.startswith(spec.towers) and decoder in spec.decoders and connector in (None, spec.connector):
            return spec
    offered = "; ".join(f"{'|'.join(s.towers)} + {s.connector} + {'|'.join(s.decoders)}" for s in specs)
    raise ConfigError(
        f"{tower} + {connector or 'any connector'} + {decoder} is not built (for most of such transformers has no class); "
        f"what is: {offered}"
    )
