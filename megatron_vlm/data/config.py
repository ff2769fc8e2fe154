"""The ``data`` section of a run's configuration."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What is read, how samples are encoded and laid into rows, and what happens to bad ones.

    Attributes:
        train: folders written by ``megatron-vlm data build``; several are read as one.
        valid: folders of held-out samples.
        seq_length: most tokens of a sample, and of a packed row.
        packing: lay as many whole samples into a row of ``seq_length`` tokens as fit (``micro_batch_size`` must be 1);
            off, a row holds ``micro_batch_size`` samples end to end.
        on_too_long: a sample of more than ``seq_length`` tokens: ``truncate`` removes whole turns from the end, then
            the end of the last answer, never image tokens; ``drop`` excludes it; ``raise`` stops before training.
        on_bad_sample: a sample that cannot be read or encoded: ``raise`` stops; ``skip`` leaves a hole without loss
            and a line in ``quarantine.jsonl``.
        answer_loss_only: take the loss on the assistant's text alone; off, on all text.
        max_image_num: samples with more images are excluded; None: no limit.
        image_size: longest edge of an image in pixels; None: as the model's processor files say.
        shortest_edge: edges shorter than this are raised to it, in pixels; None: as the model's processor files say.
        image_splitting: cut each image into sub-images as well; None: as the model's processor files say.
        num_workers: processes that read and encode; 0: in the training process. Never changes what is read.
        prefetch_rows: rows each worker keeps ready.
        packing_window: stream positions that one packing plan covers.
        slice_size: neighbouring samples that are read in one go; 1 shuffles fully and reads at random.
        window_slices: slices that are shuffled among each other; ``slice_size x window_slices`` is the shuffle radius.
        bad_sample_rate: most holes per sample read (counted over at least 10,000 samples) under ``skip``.
        bad_sample_consecutive: most holes in a row under ``skip``.
        allow_data_change: resume although the data, the processor or the packing differ from the checkpoint's.
        cache_dir: where token counts go if a data folder is read-only; None: ``~/.cache/megatron_vlm``.
    """

    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    seq_length: int
    packing: bool = False
    on_too_long: Literal["truncate", "drop", "raise"] = "raise"
    on_bad_sample: Literal["raise", "skip"] = "raise"
    answer_loss_only: bool = False
    max_image_num: int | None = None
    image_size: int | None = None
    shortest_edge: int | None = None
    image_splitting: bool | None = None
    num_workers: int = 2
    prefetch_rows: int = 4
    packing_window: int = 4096
    slice_size: int = 128
    window_slices: int = 64
    bad_sample_rate: float = 0.001
    bad_sample_consecutive: int = 100
    allow_data_change: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("seq_length", 2),
            ("num_workers", 0),
            ("prefetch_rows", 1),
            ("packing_window", 1),
            ("slice_size", 1),
            ("window_slices", 1),
            ("max_image_num", 0),
            ("image_size", 1),
            ("shortest_edge", 1),
            ("bad_sample_consecutive", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"data.{name} must be at least {least}, got {value}")
        if not 0 <= self.bad_sample_rate <= 1:
            raise ConfigError(f"data.bad_sample_rate must be between 0 and 1, got {self.bad_sample_rate}")
