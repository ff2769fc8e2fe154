"""One iteration of a training checkpoint as a weight source."""

from pathlib import Path

from torch import Tensor

from megatron_vlm.digests import Record
from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.sources.config_sizes import check_sizes
from megatron_vlm.sources.source import WeightSource, check_entry, choose_family
from megatron_vlm.weights.hf_io import CONFIG_NAME, list_names
from megatron_vlm.weights.mapping import Split
from megatron_vlm.weights.rank_files import Kind, RankFiles


class TrainingSource(WeightSource):
    """The weights of one iteration, whatever layout it was trained in.

    Raises:
        CheckpointError: files absent or damaged.
        ConversionError: the tensors are not those of the family.
    """

    kind = "training"

    def __init__(self, directory: Path, record: Record, family: str | None = None):
        self.directory = directory
        self._record = record
        hf_config = read_json(directory / "hf" / CONFIG_NAME, ConversionError)
        super().__init__(directory / "hf", hf_config, choose_family(hf_config, directory, family))
        self._tensors = RankFiles(directory)
        self._kinds: dict[str, Kind] = {}
        try:
            self.infos = {}
            self._check_names()
            for name, entry in self.entries.items():
                info = self._tensors.info(name)
                parts = [info.of(part) for part in entry.from_full(info.meta())]
                if check_entry(entry, parts, self.mapping.vocab_size) != info:
                    raise ConversionError(
                        f"{directory}: {name} has shape {list(info.shape)}, which does not fit config.json"
                    )
                self.infos[name] = info
            check_sizes(self.config, self.infos, str(directory))
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name, self._kinds.get(name, "model"))

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        return self._tensors.read_shard(name, split, tp, tp_rank, self._kinds.get(name, "model"))

    def use_main_parameters(self) -> None:
        for name in self.infos:
            if self._tensors.has(name, "param"):
                self._kinds[name] = "param"
                self.infos[name] = self._tensors.info(name, "param")

    def folders(self) -> tuple[Path, ...]:
        return (self.directory,)

    def records(self) -> tuple[Record, ...]:
        return (self._record,)

    def close(self) -> None:
        self._tensors.close()

    def _check_names(self) -> None:
        stored = set(self._tensors.names())
        missing, extra = sorted(set(self.entries) - stored), sorted(stored - set(self.entries))
        if missing or extra:
            raise ConversionError(
                f"{self.directory} does not hold the weights of family {self.spec.name}: "
                f"missing {list_names(missing) or 'nothing'}; unexpected {list_names(extra) or 'nothing'}"
            )
