"""What a run is asked while it trains: ``evaluate.prompts``, whose answers are shown, and ``evaluate.file``, whose are scored.

Asking(config, processor) --ask(model, iteration, metrics)--> samples.jsonl, metrics.jsonl, TensorBoard, the log; scores
"""

from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.built import Model
from megatron_vlm.models.generation import SamplingConfig
from megatron_vlm.training.answering.answers import answer, check_length
from megatron_vlm.training.answering.held_out import score
from megatron_vlm.training.answering.job import Job
from megatron_vlm.training.answering.prompts import EvaluateConfig, encode_prompt
from megatron_vlm.training.answering.questions import questions
from megatron_vlm.training.metrics.logger import Metrics


class Asking:
    """The questions of a run.

    Args:
        config: section ``evaluate``.
        processor: of the model.
        positions: most tokens of a prompt and its answer.

    Raises:
        ConfigError, DataError: a question that cannot be asked; of a file, what shows without its images.
    """

    def __init__(self, config: EvaluateConfig, processor: Processor, positions: int):
        self._config, self._processor, self._positions = config, processor, positions
        self._sampling = SamplingConfig(max_new_tokens=config.max_new_tokens)
        self._prompts = [encode_prompt(processor, prompt) for prompt in config.questions]
        for number, sample in enumerate(self._prompts):
            check_length(sample, positions, self._sampling, f"evaluate.prompts[{number}]")
        self._asked = (
            list(questions(config.format, config.file, config.image_root, config.limit)) if config.file else []
        )
        if config.file and not self._asked:
            raise ConfigError(f"evaluate.file {', '.join(config.file)}: there is no record")

    def __bool__(self) -> bool:
        return bool(self._prompts or self._asked)

    def ask(self, model: Model, iteration: int, metrics: Metrics | None) -> dict[str, float]:
        """Asks everything and reports where ``metrics`` is given; returns the scores. A collective of the whole job.

        Raises:
            DataError: on every rank: a question of the file that cannot be asked.
        """
        if self._prompts:
            texts = answer(model, self._processor, self._prompts, self._sampling)
            if metrics is not None:
                metrics.answers(iteration, self._config.questions, texts)
        if not self._asked:
            return {}
        job = Job(
            model=model, processor=self._processor, positions=self._positions, folders=(), sampling=self._sampling
        )
        texts = [text for batch in job.ask(self._asked) for _, text in batch]
        scores = score(self._asked, texts, self._config.metrics)["all"]
        if metrics is not None:
            metrics.scores(iteration, scores)
        return {name: found.value for name, found in scores.items()}
