"""FlagValues: the flags of the original programs whose meaning depends on other flags, on the model or on the number of ranks."""

from dataclasses import dataclass

from megatron_vlm.config import Config, PathText

FLAG = "--"
"""A setting whose key starts so is a field of FlagValues."""


@dataclass(frozen=True, kw_only=True)
class FlagValues(Config):
    """Flags of the original programs that are no setting by themselves, by their own names; None: not said.

    Attributes:
        model_name_or_path: the model; without a config file, settings that no flag names then come from the packaged
            recipe of its family, as they come from the original program's defaults there.
        learning_rate: of everything that trains.
        num_train_epochs, max_steps, warmup_ratio, warmup_steps, lr_scheduler_type, optim, bf16, fp16, tf32,
            gradient_checkpointing, do_train, do_eval, save_strategy, save_steps, save_total_limit, eval_strategy,
            eval_steps, report_to, group_by_length: of transformers.TrainingArguments.
        use_lora, lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_bias, load_in_4bit: of finetune.py, FT.py and PEFT.
        bnb_4bit_compute_dtype: of ms-swift and LLaMA-Factory: checked against the run's precision.
        use_llm_lora, use_backbone_lora, unfreeze_lm_head: of InternVL: ranks of adapters in the language model and the tower.
        vision_select_layer, ps_version, down_sample_ratio: of InternVL: checked against the model's config.json.
        recompute_activations, recompute_method, recompute_num_layers, recompute_modules: of Megatron.
        use_deepspeed, deepspeed: a DeepSpeed JSON.
        use_fsdp, fsdp, fsdp_policy, fsdp_wrap_cls, fsdp_config, fsdp_transformer_layer_cls_to_wrap: fully sharded data
            parallelism.
    """

    model_name_or_path: PathText | None = None
    learning_rate: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    lr_scheduler_type: str | None = None
    optim: str | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    gradient_checkpointing: bool | None = None
    do_train: bool | None = None
    do_eval: bool | None = None
    save_strategy: str | None = None
    save_steps: float | None = None
    save_total_limit: int | None = None
    eval_strategy: str | None = None
    eval_steps: float | None = None
    report_to: tuple[str, ...] = ()
    group_by_length: bool | None = None
    use_lora: bool | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_target_modules: tuple[str, ...] = ()
    lora_bias: str | None = None
    load_in_4bit: bool | None = None
    bnb_4bit_compute_dtype: str | None = None
    use_llm_lora: int | None = None
    use_backbone_lora: int | None = None
    unfreeze_lm_head: bool | None = None
    vision_select_layer: int | None = None
    ps_version: str | None = None
    down_sample_ratio: float | None = None
    recompute_activations: bool | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    use_deepspeed: bool | None = None
    deepspeed: PathText | None = None
    use_fsdp: bool | None = None
    fsdp: tuple[str, ...] = ()
    fsdp_policy: str | None = None
    fsdp_wrap_cls: str | None = None
    fsdp_config: PathText | None = None
    fsdp_transformer_layer_cls_to_wrap: str | None = None

    @property
    def adapts(self) -> bool:
        """The flags ask for adapters."""
        return bool(self.use_lora or self.use_llm_lora or self.use_backbone_lora)
