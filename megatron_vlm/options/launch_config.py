"""LaunchConfig: what `megatron-vlm launch` is told beside the run itself: raw data in, processes, what is left behind.

flags, YAML section ``launch`` --options/request.py--> Request(run settings, LaunchConfig, ...)
"""

import os
from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config import Config, PathText
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Config):
    """Settings of one start; the model is ``checkpoint.load`` of the run, shards that exist already ``data.train``.

    Attributes:
        train_json, val_json: json or jsonl files of conversations.
        data_path, eval_data_path: the same, or a list file of InternLM-XComposer2 (``.txt``), or folders of shards.
        meta_path: InternVL's meta.json.
        image_root: folder that relative image paths start from; None: the folder of the file that names them.
        data_format: how the files are to be read (as in ``data build --format``); None: told by their content.
        missing_placeholder: records with images and no place for them: ``refuse``, or ``prepend`` the images to the first
            question; None: as the format's own program does (InternVL prepends).
        min_num_frame, max_num_frame, video_sampling, video_fps: frames taken of a video, as ``--video-frames``,
            ``--video-sampling`` and ``--video-fps`` of ``data build``; None: as the model's files say.
        given_num: the numbers of a list file are thousands of samples; False: they are shares of each file. None: thousands.
        llm, vision, projector: parts to make the model of, instead of ``checkpoint.load``: HF directories or hub ids of a
            language model and a tower, and a trained connector (a folder, a whole model, a .pth, or the checkpoint of a first
            stage).
        output_dir: everything the run leaves; None: ``logging.output_dir``, ``checkpoint.save``, or ``runs/<name>``.
        overwrite_output_dir: start anew although ``output_dir`` holds checkpoints; False: go on from them.
        save_merged_model: write ``merged_model/`` (base and adapter in one) at the end.
        export_each_epoch: write what the end writes after each epoch too, under ``epoch_N/``.
        per_device_train_batch_size: items that a replica takes at a time; None: chosen by memory.
        batch_size: samples of an item, as in InternLM-XComposer2's scripts.
        gradient_accumulation_steps: times that a replica does so before an update; None: from the global batch.
        num_processes: ranks on this machine; None: one for each visible GPU, or one on the CPU.
        single_process: run in this process, whatever GPUs there are.
        cuda_visible_devices: GPUs to use, as that variable is written.
        master_port: port of the processes' rendezvous; 0: any free one; a busy one is replaced with a warning.
        cache_dir: where models named by hub id are downloaded to; None: the hub library's own cache.
        shard_cache: where built shards are kept; None: ``~/.cache/megatron_vlm/shards``.
        memory_gib: memory of a GPU to plan for; None: as found.
        strict_sharding: share and offload as DeepSpeed's or FSDP's options say, although the run may fit, and be faster, without.
        no_launch: check, print the plan and stop.
    """

    train_json: tuple[PathText, ...] = ()
    val_json: tuple[PathText, ...] = ()
    data_path: tuple[PathText, ...] = ()
    eval_data_path: tuple[PathText, ...] = ()
    meta_path: PathText | None = None
    image_root: PathText | None = None
    data_format: Literal["llava", "xcomposer", "internvl", "openai", "webdataset", "parquet"] | None = None
    missing_placeholder: Literal["refuse", "prepend"] | None = None
    min_num_frame: int | None = None
    max_num_frame: int | None = None
    video_sampling: Literal["middles", "ends", "pairs"] | None = None
    video_fps: float | None = None
    given_num: bool | None = None
    llm: PathText | None = None
    vision: PathText | None = None
    projector: PathText | None = None
    output_dir: PathText | None = None
    overwrite_output_dir: bool = False
    save_merged_model: bool = False
    export_each_epoch: bool = False
    per_device_train_batch_size: int | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    num_processes: int | None = None
    single_process: bool = False
    cuda_visible_devices: str | None = None
    master_port: int = 29501
    cache_dir: PathText | None = None
    shard_cache: PathText | None = None
    memory_gib: float | None = None
    strict_sharding: bool = False
    no_launch: bool = False

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "batch_size", "gradient_accumulation_steps", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"launch.{name} must be at least 1, got {value}")
        if (self.llm is None) != (self.vision is None) or (self.projector is not None and self.llm is None):
            parts = ", ".join(f"--{name}" for name in ("llm", "vision", "projector") if getattr(self, name) is not None)
            raise ConfigError(f"a model of parts takes --llm and --vision, and may take --projector; given: {parts}")
        if not 0 <= self.master_port < 65536:
            raise ConfigError(f"launch.master_port must lie between 0 (any free one) and 65535, got {self.master_port}")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError(f"launch.memory_gib must be above 0, got {self.memory_gib}")
        if self.single_process and (self.num_processes or 1) > 1:
            raise ConfigError(
                f"launch.single_process runs one process, but launch.num_processes is {self.num_processes}: leave one out"
            )
        for names in (("train_json", "data_path", "meta_path"), ("val_json", "eval_data_path")):
            given = [f"launch.{name} {getattr(self, name)!r}" for name in names if getattr(self, name)]
            if len(given) > 1:
                raise ConfigError(f"the data is named more than once: {' and '.join(given)}; give one of them")

        both = {os.path.realpath(path) for path in self.train_inputs} & {os.path.realpath(p) for p in self.valid_inputs}
        if both:
            raise ConfigError(
                f"{sorted(both)[0]} is named to train on and as held-out data: an evaluation on it says nothing; name other data "
                "(--val_json, --eval_data_path), or leave it out"
            )

    @property
    def train_inputs(self) -> tuple[str, ...]:
        """Raw files or folders of shards to train on."""
        return self.train_json or self.data_path or ((self.meta_path,) if self.meta_path else ())

    @property
    def valid_inputs(self) -> tuple[str, ...]:
        """Raw files or folders of shards to evaluate on."""
        return self.val_json or self.eval_data_path
