"""Planned rows read and encoded, in whichever process, and what happens to bad samples."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import StoredImages
from megatron_vlm.data.row import EncodedSample, Row, row_from_samples
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.counts import digest_of
from megatron_vlm.data.stream.step_plan import RowPlan
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import DataError
from megatron_vlm.line_files import LineFile
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
BAD_RATE_OVER = 10_000  # samples that the bad-sample rate is taken over at least


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What comes back for one RowPlan: the row, which samples are sound and a record of each that is not, or an error."""

    row: Row | None = None
    sound: tuple[bool, ...] = ()
    failures: tuple[dict[str, Any], ...] = ()
    error: DataError | None = None


class RowReader:
    """Reads and encodes planned rows, in whichever process.

    Args:
        dataset: the samples.
        processor: of the model.
        seed: of the run, for keyed augmentation.
        config: ``on_bad_sample``, ``jpeg_scaled_decoding``.
        multiple_of, fill_to: length of every row, see ``row_from_samples``.
    """

    def __init__(
        self, dataset: Dataset, processor: Processor, config: DataConfig, *, seed: int, multiple_of: int, fill_to: int
    ):
        self._dataset, self._processor, self._seed = dataset, processor, seed
        self._skip, self._scaled = config.on_bad_sample == "skip", config.jpeg_scaled_decoding
        self._multiple_of, self._fill_to = multiple_of, fill_to

    def __getitem__(self, plan: RowPlan) -> Fetched:
        samples, failures, sound = [], [], []
        for sample_id, tokens in zip(plan.ids, plan.tokens):
            try:
                samples.append(self.sample(sample_id, tokens, plan.epoch))
                sound.append(True)
            except DataError as error:
                if not self._skip:  # returned, not raised: torch would rebuild it from the text of a traceback
                    return Fetched(error=error)
                where = {"key": error.key, "shard": error.shard, "offset": error.offset}
                sound.append(False)
                place = {"epoch": plan.epoch, "window": plan.window, "item": plan.item}
                failures.append({"id": sample_id, **place, **where, "reason": error.message})
        row = row_from_samples(
            samples,
            filler_token_id=self._processor.filler_token_id,
            multiple_of=self._multiple_of,
            fill_to=self._fill_to,
            holes=len(failures),
        )
        row = replace(row, truncated=plan.truncated)
        return Fetched(row=row, sound=tuple(sound), failures=tuple(failures))

    def sample(self, sample_id: int, tokens: int, epoch: int) -> EncodedSample:
        """Reads and encodes one sample that its plan gives ``tokens`` tokens.

        Raises:
            DataError: it cannot be read or encoded, or has another number of tokens.
        """
        shard, row = self._dataset.locate_one(sample_id)
        path, offset = str(self._dataset.shards[shard].path), int(self._dataset.index(shard)[row]["offset"])
        sample = self._dataset.read(sample_id)
        seed = int(digest_of(f"{self._seed}/{epoch}/{sample_id}")[:15], 16)
        try:
            sizes = self._dataset.sizes_of(shard, row)
            images = StoredImages(sample.images, sample.image_names, sizes, scaled=self._scaled)
            encoded = self._processor.encode(sample.key, sample.turns, images, seed, sample.options)
            if len(encoded.input_ids) != tokens:
                raise DataError(
                    f"{len(encoded.input_ids)} tokens, its count says {tokens}: remove the token counts (.tokens.npy)"
                )
        except DataError as error:
            raise error.at(key=sample.key, shard=path, offset=offset) from error
        except Exception as error:  # a bug, not a bad sample: no policy hides it, but it gets a name
            raise RuntimeError(f"encoding sample {sample.key} of {path} failed: {error!r}") from error
        return encoded


class Quarantine:
    """Counts holes, writes ``quarantine.jsonl`` and stops a run whose data is worse than the budget."""

    def __init__(self, config: DataConfig, output_dir: str | Path | None):
        self._config = config
        self._path = Path(output_dir) / "quarantine.jsonl" if output_dir else None
        self._file = LineFile(self._path) if self._path is not None else None
        self.holes = self._samples = self._row = self._worst = 0
        self._names: list[str] = []  # the last few, for the error

    def add(self, item: Fetched) -> None:
        """Takes note of one row.

        Raises:
            DataError: more holes than ``bad_sample_rate`` or ``bad_sample_consecutive`` allow.
        """
        self._samples += len(item.sound)
        self.holes += len(item.failures)
        for sound in item.sound:
            self._row = 0 if sound else self._row + 1
            self._worst = max(self._worst, self._row)
        for failure in item.failures:
            LOGGER.warning("a sample is skipped: %s", failure)
            self._names = [*self._names[-4:], f"{failure['shard']} at {failure['offset']} ({failure['reason']})"]
            if self._file is not None:
                self._file.add(json.dumps({"time": round(time.time(), 3), **failure}))  # ranks add to the same file
        allowed = self._config.bad_sample_rate * max(self._samples, BAD_RATE_OVER)
        if self.holes > allowed or self._worst > self._config.bad_sample_consecutive:
            raise DataError(
                f"{self.holes} of {self._samples} samples could not be used, {self._worst} of them in a row: "
                f"data.bad_sample_rate {self._config.bad_sample_rate} and data.bad_sample_consecutive "
                f"{self._config.bad_sample_consecutive} allow fewer. They are listed in {self._path or 'the log'}, the last of "
                f"them {', '.join(self._names)}; 'megatron-vlm data check' names all"
            )
