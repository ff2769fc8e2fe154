"""The ``data`` section of a run's configuration."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config import Config, PathText
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """A data folder and how much of it an epoch reads; at most one of the three numbers.

    Attributes:
        path: folder written by ``megatron-vlm data build``.
        weight: share of the epoch's samples, relative to the other folders' (all have one, or none has).
        repeat: times that an epoch reads each sample: 2, 0.5, 1.25 ...; None: as the folder's manifest says.
        per_epoch: samples that an epoch reads.
    """

    path: PathText
    weight: float | None = None
    repeat: float | None = None
    per_epoch: int | None = None

    def __post_init__(self) -> None:
        given = {n: v for n in ("weight", "repeat", "per_epoch") if (v := getattr(self, n)) is not None}
        if len(given) > 1:
            raise ConfigError(f"data folder {self.path}: give one of {', '.join(given)}, they say the same thing twice")
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"data folder {self.path}: {name} must be above 0, got {value}; or leave the folder out"
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What is read, how samples are encoded and laid into rows, and what happens to bad ones.

    Attributes:
        train: folders written by ``megatron-vlm data build``: paths, or ``{path, weight | repeat | per_epoch}``.
        valid: folders of held-out samples; an evaluation reads each sample once, whatever the folder's repeats.
        seq_length: most tokens of a sample, and of a packed row.
        packing: lay as many whole samples into a row of ``seq_length`` tokens as fit (``micro_batch_size`` must be 1);
            off, a row holds ``micro_batch_size`` samples end to end.
        max_patches_per_row: most image patches that the vision tower sees in a packed row, so that its memory is
            bounded; a sample with more is treated as too long (but never truncated). None: no limit.
        group_by: samples of a global batch are alike in ``length``, or in ``modality`` (with images or without) and
            then length; None: they are not grouped. For ``packing`` off.
        on_too_long: a sample of more than ``seq_length`` tokens: ``truncate`` removes whole turns from the end, then
            the end of the last answer, never image tokens; ``drop`` excludes it; ``raise`` stops before training.
        on_bad_sample: a sample that cannot be read or encoded: ``raise`` stops; ``skip`` leaves a hole without loss
            and a line in ``quarantine.jsonl``.
        answer_loss_only: take the loss on the assistant's text alone; off, on all text.
        special_tokens_in_text: a text that writes out a special token of the model (``</s>``, ``<|im_end|>``): ``text`` encodes
            it as the characters it is, never as the token; ``refuse`` excludes the sample. Placeholders of images, and marks of
            grounding as ``<box>``, keep their meaning.
        template: prompt format, where the model's family has several; None: the one that fits the model's vocabulary.
        max_image_num: samples with more images are excluded; None: no limit.
        image_size: longest edge of an image in pixels; None: as the model's processor files say.
        shortest_edge: edges shorter than this are raised to it, in pixels; None: as the model's processor files say.
        image_splitting: cut each image into sub-images as well; None: as the model's processor files say.
        dynamic_image_size: cut an image into tiles by its shape (InternVL); None: as the model's files say.
        min_dynamic_patch, max_dynamic_patch: tiles of an image, its thumbnail left out; the limit is shared by the images of a
            sample, and a data set may have its own. None: as the model's files say.
        use_thumbnail: an image of several tiles is seen as a whole, too; None: as the model's files say.
        min_pixels, max_pixels: of an image after it is resized (Qwen2.5-VL); None: as the model's files say.
        video_min_pixels, video_max_pixels: of a frame of a video after it is resized; None: as the model's files say.
        video_total_pixels: most of all frames of a video, of which each has the same share, a pair counted once; None: no limit.
        jpeg_scaled_decoding: decode a JPEG that is resized to less at a half, a quarter or an eighth of its sides, as libjpeg
            scales it: less work, and pixels that differ a little from those of the model's processor.
        hd_num: most tiles of an image (InternLM-XComposer2-4KHD, which needs it); -1 is no value, as in that recipe's scripts.
        num_workers: processes that read and encode; 0: in the training process. Never changes what is read.
        prefetch_rows: most rows each worker keeps ready; None: 4, and twice as many whenever a step waits for a row that
            workers had time for (within ``prefetch_mb``).
        prefetch_mb: most memory that rows kept ready take on a rank, in MiB; one row is always being made.
        packing_window: stream positions that one packing plan covers.
        slice_size: neighbouring samples that are read in one go; 1 shuffles fully and reads at random.
        window_slices: slices that are shuffled among each other; ``slice_size x window_slices`` is the shuffle radius.
        max_bad_fraction: largest share of samples that may be left out because they cannot be used; above it nothing starts.
            Samples that a limit of this section leaves out (length, patches, number of images) do not count.
        bad_sample_rate: most holes per sample read (counted over at least 10,000 samples) under ``skip``.
        bad_sample_consecutive: most holes in a row under ``skip``.
        allow_data_change: resume although the data, the processor or the packing differ from the checkpoint's.
        cache_dir: where token counts go if a data folder is read-only; None: ``~/.cache/megatron_vlm``.
    """

    train: tuple[SourceConfig | PathText, ...] = ()
    valid: tuple[PathText, ...] = ()
    seq_length: int
    packing: bool = False
    max_patches_per_row: int | None = None
    group_by: Literal["length", "modality"] | None = None
    on_too_long: Literal["truncate", "drop", "raise"] = "raise"
    on_bad_sample: Literal["raise", "skip"] = "raise"
    answer_loss_only: bool = False
    special_tokens_in_text: Literal["text", "refuse"] = "text"
    template: str | None = None
    max_image_num: int | None = None
    image_size: int | None = None
    shortest_edge: int | None = None
    image_splitting: bool | None = None
    dynamic_image_size: bool | None = None
    min_dynamic_patch: int | None = None
    max_dynamic_patch: int | None = None
    use_thumbnail: bool | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    video_total_pixels: int | None = None
    jpeg_scaled_decoding: bool = False
    hd_num: int | None = None
    num_workers: int = 2
    prefetch_rows: int | None = None
    prefetch_mb: int = 1024
    packing_window: int = 4096
    slice_size: int = 128
    window_slices: int = 64
    max_bad_fraction: float = 0.01
    bad_sample_rate: float = 0.001
    bad_sample_consecutive: int = 100
    allow_data_change: bool = False
    cache_dir: PathText | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("seq_length", 2),
            ("num_workers", 0),
            ("prefetch_rows", 1),
            ("prefetch_mb", 1),
            ("max_patches_per_row", 1),
            ("packing_window", 1),
            ("slice_size", 1),
            ("window_slices", 1),
            ("max_image_num", 0),
            ("image_size", 1),
            ("shortest_edge", 1),
            ("min_dynamic_patch", 1),
            ("max_dynamic_patch", 1),
            ("min_pixels", 1),
            ("max_pixels", 1),
            ("video_min_pixels", 1),
            ("video_max_pixels", 1),
            ("video_total_pixels", 1),
            ("bad_sample_consecutive", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"data.{name} must be at least {least}, got {value}")
        if self.hd_num is not None and self.hd_num < 1 and self.hd_num != -1:
            raise ConfigError(f"data.hd_num must be at least 1, or -1 for models that do not use it; got {self.hd_num}")
        if self.packing and self.group_by:
            raise ConfigError(f"data.group_by {self.group_by} has no effect with data.packing: leave one of them out")
        if self.max_patches_per_row is not None and not self.packing:
            raise ConfigError("data.max_patches_per_row has no effect without data.packing: set data.packing=true")
        for name in ("bad_sample_rate", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be between 0 and 1, got {getattr(self, name)}")

    def check_template(self, family: str, *offered: str) -> None:
        """Checks ``template`` against the formats that a family offers.

        Raises:
            ConfigError: it is none of them.
        """
        if self.template is not None and self.template not in offered:
            known = f"use one of {', '.join(offered)}" if offered else "leave it out"
            raise ConfigError(f"data.template {self.template!r} is not one of family {family}: {known}")
