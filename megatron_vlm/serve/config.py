"""What `chat` and `demo` serve, as the program that talks to the user tells it to the ranks. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_vlm.config import Config, PathText
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServedModel(Config):
    """One model.

    Attributes:
        load: Hugging Face model, Megatron weights, a training checkpoint or an adapter; with ``llava`` a language model.
        base: of an adapter; None: where its files say.
        llava: XTuner's folder of a projector, with adapters of the language model and of the tower or without.
        vision: the tower that goes with ``llava``; None: the one in that folder.
        llm_adapter: an adapter of the language model that goes with ``llava``; None: the one in that folder, if any.
    """

    load: PathText
    base: PathText | None = None
    llava: PathText | None = None
    vision: PathText | None = None
    llm_adapter: PathText | None = None

    def __post_init__(self) -> None:
        if self.llava is None and (self.vision is not None or self.llm_adapter is not None):
            raise ConfigError(
                "--visual-encoder goes with --llava, the folder of the projector between the two: give both"
            )
        if self.llava is not None and self.base is not None:
            raise ConfigError("--base is of an adapter alone: with --llava the language model itself is given")

    @property
    def name(self) -> str:
        """What it is called in answers side by side."""
        return self.llava or self.load


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Models and how they run.

    Attributes:
        models: one, or two that answer side by side; they share the ranks.
        tp, pp: the layout.
        precision: dtype of the weights; None: bf16 on a GPU, fp32 on the CPU.
        device: None: cuda if there is a GPU.
        verify_hashes: compare the files with the digests that were recorded of them.
        data: how images and prompts are treated, as in training (``template``, ``image_size`` and the like).
        sampling: defaults of ``models.generation.SamplingConfig`` for every question.
        stop_words: texts that end an answer, and are left out of it.
        video_frames: at most so many of a video; None: as many as the model takes.
    """

    models: tuple[ServedModel, ...]
    tp: int = 1
    pp: int = 1
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    device: Literal["cpu", "cuda"] | None = None
    verify_hashes: bool = True
    data: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    stop_words: tuple[str, ...] = ()
    video_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "video_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if "" in self.stop_words:
            raise ConfigError("--stop-words '' would end every answer before it begins: leave the empty one out")
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("fp16 does not run on the CPU: use fp32 or bf16 there")
