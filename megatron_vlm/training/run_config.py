"""RunConfig: everything one training run is told, and the checks that span its sections.

YAML + section.key=value + flags --options/resolve.py--> RunConfig --check_world--> --check_model--> Trainer
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import check_output
from megatron_vlm.layers.attention import choose
from megatron_vlm.log import get_logger
from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.models.options import ENGINES, ModelConfig, ModelOptions
from megatron_vlm.models.rope_scaling import scaled_config
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.answering.prompts import EvaluateConfig
from megatron_vlm.training.checkpoint.best import LOSS
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.metrics.config import LoggingConfig
from megatron_vlm.training.optimizer.config import OptimizerConfig

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Length, batch, numbers and evaluation of a run.

    Attributes:
        train_iters, train_samples, train_epochs: length of the run, one of them. Samples and epochs count what the data
            order hands out.
        global_batch_size: rows of one optimizer step over all replicas; samples while ``data.packing`` is off.
        micro_batch_size: samples laid into one row while ``data.packing`` is off.
        seed: of the data order and of every generator.
        precision: dtype of weights and activations; bf16 and fp16 keep fp32 main parameters.
        device: where to run; None: cuda if there is a GPU.
        eval_interval: iterations between evaluations on ``data.valid``; None: at the end only.
        eval_epochs: epochs between them; excludes ``eval_interval``.
        eval_iters: global batches of one evaluation; None: all held-out samples.
        tf32: on GPUs, products of fp32 matrices in TF32, which keeps 10 bits of each factor. For precision fp32.
        skip_train: only evaluate on ``data.valid``.
        dry_run: print the resolved config, topology, parameters and memory of each stage, and stop.
        dry_run_world_size: number of ranks to assume then; None: WORLD_SIZE, else tp x pp.
    """

    train_iters: int | None = None
    train_samples: int | None = None
    train_epochs: float | None = None
    global_batch_size: int = 1
    micro_batch_size: int = 1
    seed: int = 1234
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda"] | None = None
    eval_interval: int | None = None
    eval_epochs: float | None = None
    eval_iters: int | None = None
    tf32: bool = False
    skip_train: bool = False
    dry_run: bool = False
    dry_run_world_size: int | None = None

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("train_iters", "train_samples", "train_epochs")}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"set one of training.{', training.'.join(lengths)}, got {given}")
        if not given and not self.skip_train and not self.dry_run:
            raise ConfigError("the run has no length: set training.train_iters, train_samples or train_epochs")
        positive = (
            "global_batch_size",
            "micro_batch_size",
            "eval_interval",
            "eval_epochs",
            "eval_iters",
            "dry_run_world_size",
            *lengths,
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"training.{name} must be above 0, got {value}")
        if self.eval_interval is not None and self.eval_epochs is not None:
            raise ConfigError("set training.eval_interval or eval_epochs, not both")
        if self.tf32 and self.precision != "fp32":
            raise ConfigError(f"training.tf32 has no effect with training.precision {self.precision}: leave it out")
        if self.seed < 0:
            raise ConfigError(f"training.seed must not be negative, got {self.seed}")

    @property
    def torch_device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """All sections of a run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        training, data = self.training, self.data
        if self.checkpoint.load is None:
            raise ConfigError(
                "checkpoint.load is not set: name a Hugging Face, Megatron or training checkpoint (--load)"
            )
        if self.peft.active and self.model.freeze:
            raise ConfigError(
                f"model.freeze_{self.model.freeze[0]} together with peft: everything but adapters and peft.modules_to_save is "
                "frozen there; leave it out"
            )
        if self.optimizer.fused and self.parallel.host_share:
            raise ConfigError("optimizer.fused has no effect on an update of the host, parallel.offload: leave one out")
        if data.packing and training.micro_batch_size != 1:
            raise ConfigError(
                f"data.packing is on, so training.micro_batch_size must be 1, got {training.micro_batch_size}: a row "
                "is filled up to data.seq_length; raise that to put more into one"
            )
        if training.precision == "fp16" and training.torch_device == "cpu":
            raise ConfigError("training.precision fp16 does not run on the CPU: use bf16 or fp32 there, fp16 on a GPU")
        if training.precision == "fp16" and self.parallel.offloads_parameters:
            raise ConfigError(
                "training.precision fp16 with parallel.offload optimizer+parameters is not built: its loss scale is for "
                "gradients on the device. Set bf16, or offload optimizer"
            )
        if training.device == "cuda" and not torch.cuda.is_available() and not training.dry_run:
            raise ConfigError("training.device is cuda, but torch sees no GPU: set training.device=cpu or leave it out")
        if training.precision == "fp32" and not self.parallel.accumulate_allreduce_grads_in_fp32:
            raise ConfigError(
                "parallel.accumulate_allreduce_grads_in_fp32 false has no effect with training.precision fp32: leave "
                "it out"
            )
        if training.precision != "fp16" and self.optimizer.loss_scale is not None:
            raise ConfigError(
                f"optimizer.loss_scale has no effect with training.precision {training.precision}: leave it out"
            )
        if training.dry_run:
            return
        if not training.skip_train and not data.train:
            raise ConfigError(
                "data.train is empty: name the folders that `megatron-vlm data build` wrote (--data-path)"
            )
        if not data.valid and (
            training.skip_train or training.eval_interval or training.eval_epochs or training.eval_iters
        ):
            raise ConfigError(
                "data.valid is empty, but training.skip_train, eval_interval, eval_epochs or eval_iters is set: name held-out "
                "folders (--valid-data-path) or leave these out"
            )

        best = self.checkpoint.keep_best
        known = [*([LOSS] if data.valid else []), *(self.evaluate.metrics if self.evaluate.file else ())]
        if best is not None and best not in known:
            raise ConfigError(
                f"checkpoint.keep_best {best} is not evaluated: it may be {' or '.join(known) or 'nothing here'}; loss needs "
                "data.valid, a metric of evaluate.metrics needs evaluate.file"
            )

    def default_notes(self, said: Mapping[str, Any]) -> list[str]:
        """Lines about defaults that nobody should train with unknowingly; ``said``: the sections as they were given."""
        if self.training.skip_train or (said.get("optimizer") or {}).get("lr") is not None:
            return []
        return [f"no learning rate is given: optimizer.lr is {self.optimizer.lr:g}, the default (--lr sets another)"]

    @property
    def output_dir(self) -> Path:
        """Where the run reports."""
        return Path(self.logging.output_dir or self.checkpoint.folder or Path("runs") / self.logging.name)

    @property
    def run_folders(self) -> tuple[Path, ...]:
        """Folders that one run at a time may write to."""
        return (self.output_dir, *([self.checkpoint.folder] if self.checkpoint.folder else []))

    def check_outputs(self, folders: Sequence[str | os.PathLike]) -> None:
        """Refuses outputs that lie in the model which the run starts from: its files are copied into every checkpoint.

        Args:
            folders: of the model. An output may hold them, as a run's folder holds the iteration that it goes on from.

        Raises:
            ConfigError: an output lies in one.
        """
        outputs = {"checkpoint.save": self.checkpoint.folder, "logging.output_dir": self.output_dir}
        for name, output in outputs.items():
            if output is not None:
                check_output(output, folders, name, around=True)

    @property
    def model_options(self) -> ModelOptions:
        """How the run's model is built."""
        return ModelOptions(
            params_dtype=self.training.precision,
            sequence_parallel=self.parallel.sequence_parallel,
            recompute_granularity=self.parallel.recompute_granularity,
            recompute_num_layers=self.parallel.recompute_num_layers,
            recompute_modules=self.parallel.recompute_modules,
            offload_activations=self.parallel.offload_activations,
            make_vocab_size_divisible_by=self.model.make_vocab_size_divisible_by,
            freeze=self.model.freeze,
            drop_path_rate=self.model.drop_path_rate,
            transformer_impl=self.model.layers_on(self.training.torch_device),
            fp8=self.model.fp8,
            vision_head_multiple=self.model.vision_head_multiple,
            build_on_cpu=self.parallel.fully_sharded,
        )

    @property
    def row_fill(self) -> int:
        """Tokens that every row is filled to: 0, or with virtual stages the longest a row can be."""
        if not self.parallel.virtual:
            return 0
        return self.data.seq_length * self.training.micro_batch_size

    @property
    def row_multiple(self) -> int:
        """Every row is filled to a multiple of this: what its tokens are split over."""
        split = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return split * self.parallel.context_parallel_size

    @property
    def num_microbatches_per_batch(self) -> int:
        """Rows of a global batch over all replicas."""
        return self.training.global_batch_size // self.training.micro_batch_size

    def check_world(self, world_size: int) -> int:
        """Checks the sizes against the number of ranks and returns the data parallel size.

        Raises:
            ConfigError: they do not fit; raised alike on every rank, before any collective.
        """
        grid, training = self.parallel.grid(world_size), self.training
        if self.model.transformer_impl in ENGINES and training.torch_device == "cpu":
            raise ConfigError(
                f"model.transformer_impl {self.model.transformer_impl} runs on a GPU alone, and this run is on the CPU: set local"
            )
        if self.model.fp8 is not None and training.precision != "bf16":
            raise ConfigError(f"model.fp8 {self.model.fp8} needs training.precision=bf16, got {training.precision}")
        dp, pp = grid.dp, grid.pp
        unit = training.micro_batch_size * dp
        if training.global_batch_size % unit:
            raise ConfigError(
                f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x data parallel size {dp} = {unit}: set it to "
                f"{-(-training.global_batch_size // unit) * unit}"
            )
        microbatches = training.global_batch_size // unit
        if self.parallel.virtual and microbatches % pp:
            raise ConfigError(
                f"virtual pipeline stages need a multiple of {pp} microbatches per rank, got {microbatches} "
                f"(global_batch_size {training.global_batch_size} / {unit}): "
                f"set training.global_batch_size to a multiple of {unit * pp}"
            )
        length = self.row_fill or (self.data.seq_length if self.data.packing else 0)
        if length % self.row_multiple:
            raise ConfigError(
                f"rows of {length} tokens do not divide over the {self.row_multiple} ranks that split them (context parallel, "
                f"and tensor parallel with sequence_parallel): set data.seq_length to a multiple of {self.row_multiple}"
            )
        return dp

    def check_device(self, device_type: str) -> None:
        """Checks the model's kernels against this process's packages and device, and has attention run on what is asked for.

        Raises:
            ConfigError: one cannot run here.
        """
        choose(self.model.attention, device_type, self.model_options.torch_dtype)
        self.model.check_device()

    def check_model(self, model_config: FamilyConfig) -> None:
        """Checks the settings against the model.

        Raises:
            ConfigError: samples could be longer than the model's positions, or a setting of a tower that a text model lacks.
        """
        text = model_config.text
        if self.data.seq_length > text.longest:
            raise ConfigError(
                f"data.seq_length {self.data.seq_length} is above the model's max_position_embeddings {text.longest}: set it to "
                f"at most {text.longest}, or stretch the positions (model.rope_scaling; --rope-scaling yarn)"
            )
        count = self.parallel.recompute_num_layers
        if count is not None and count >= (most := max(self.parallel.stage_layers(text.num_layers))):
            raise ConfigError(
                f"parallel.recompute_num_layers {count} leaves no layer of a stage of {most} out: drop it, or set it below {most}"
            )
        if has_tower(model_config):
            if (multiple := self.model.vision_head_multiple) > 1 and (
                size := model_config.vision.head_size
            ) % multiple == 0:
                raise ConfigError(
                    f"model.vision_head_multiple {multiple} has no effect on the tower's heads of {size}: leave it out"
                )
        else:
            settings = {
                **{
                    f"recompute_modules {part}": part in self.parallel.recompute_modules
                    for part in ("tower", "connector")
                },
                "freeze_vision": self.model.freeze_vision,
                "freeze_connector": self.model.freeze_connector,
                "vision_lr": self.optimizer.vision_lr,
                "connector_lr": self.optimizer.connector_lr,
                "vision_parallel": self.parallel.vision_parallel != "auto",
                "vision_head_multiple": self.model.vision_head_multiple > 1,
                "jpeg_scaled_decoding": self.data.jpeg_scaled_decoding,
            }
            for name in (name for name, given in settings.items() if given):
                raise ConfigError(f"{name} has no effect on a text model, which has no tower: leave it out")


def folders_of(config: RunConfig) -> dict[str, Path]:
    """setting -> folder that the run writes to."""
    folders = {"logging.output_dir": config.output_dir}
    if config.checkpoint.folder is not None and not config.training.skip_train:
        folders["checkpoint.staging" if config.checkpoint.url else "checkpoint.save"] = config.checkpoint.folder
    if config.logging.tensorboard and config.logging.tensorboard_dir is not None:
        folders["logging.tensorboard_dir"] = config.logging.tensorboard_dir
    return folders


def scale_rope(config: RunConfig, source: WeightSource) -> None:
    """Has the source's config say what ``model.rope_scaling`` does.

    Raises:
        ConfigError: it has no effect, or cannot be said in this model's config.json.
    """
    setting, before = config.model.rope_scaling, source.config.text
    if setting is None:
        return
    scaled = scaled_config(source.hf_config, before, setting, config.data.seq_length)
    if scaled is source.hf_config:  # says so already
        return
    source.use_config(scaled)
    text = source.config.text
    if text == before:
        raise ConfigError(
            "model.rope_scaling has no effect: this model's config.json has no place for it; leave it out"
        )
    if text.rope_scaling is not None:
        how, ends = text.rope_scaling, (before.max_position_embeddings, text.max_position_embeddings)
        log.info("RoPE is scaled: %s, factor %g; positions: %d, before %d", how.rope_type, how.factor, *reversed(ends))
