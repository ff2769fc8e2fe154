"""Megatron weights on disk; conversion/write_megatron.py writes them, sources/megatron.py reads them.

    OUT/megatron.json                      format, family, configs, tp, pp, vocabulary, size and sha256 of each file
    OUT/mp_rank_TT_PPP/model.safetensors   shards of tensor parallel rank TT on pipeline stage PPP, under global names
    OUT/nf4_PPP/model.safetensors          linears of stage PPP in 4 bits, HF tensor by HF tensor, whole (nf4_files.py)
    OUT/hf/                                every non-weight file of the source (config, tokenizer, processor ...)

Stages: decoder layer i of L lies on stage i // (L / pp); final norm and output layer on the last; everything else
(embedding, tower, connector) on the first. The output copy of a tied embedding is not stored.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.digests import Record, check_seal
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.weights.nf4.tensor import Quantization
from megatron_vlm.weights.stages import spread

MANIFEST = "megatron.json"
FORMAT = "megatron_vlm"
FORMAT_VERSION = 1
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")
_LAST_STAGE = ("language_model.decoder.final_layernorm.", "language_model.output_layer.")


@dataclass(frozen=True, kw_only=True)
class FileEntry(Config):
    """Size in bytes and digest of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Config):
    """Content of ``megatron.json``.

    Attributes:
        num_layers: decoder layers.
        vocab_size, padded_vocab_size: true rows of the vocabulary, and rows stored over all tensor parallel ranks.
        stored_ties: HF names of tied copies that the source had stored, which an export writes again.
        model_config: the family's resolved model config, for readers; ``hf/config.json`` is what counts.
        quantization: how linears are stored in 4 bits; None: all is stored in full.
        source_files: of the HF directory it was made from, name -> size and digest; None: it was made from something else.
        files: path relative to the directory -> size and digest.
        digest: of all of this, so that a changed value is noticed.
    """

    format: str = FORMAT
    version: int = FORMAT_VERSION
    family: str
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    num_layers: int
    vocab_size: int
    padded_vocab_size: int
    make_vocab_size_divisible_by: int
    extra_vocab_size: int
    stored_ties: tuple[str, ...] = ()
    hf_config_sha256: str
    model_config: dict[str, Any]
    quantization: Quantization | None = None
    source_files: dict[str, FileEntry] | None = None
    files: dict[str, FileEntry]
    digest: str | None = None

    def record(self, directory: Path) -> Record:
        """The files that must be there."""
        files = {name: entry.to_dict() for name, entry in self.files.items()}
        return Record(folder=directory, source=MANIFEST, files=files, error=ConversionError)


def rank_file(tp_rank: int, stage: int) -> str:
    """Path of one rank's file inside the directory."""
    return f"mp_rank_{tp_rank:02d}_{stage:03d}/model.safetensors"


class Stages:
    """Which pipeline stage stores which tensor.

    Raises:
        ConfigError: more stages than decoder layers.
    """

    def __init__(self, names: Iterable[str], pp: int):
        numbers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
        self.num_layers = max(numbers, default=-1) + 1
        if not 1 <= pp <= self.num_layers:
            raise ConfigError(
                f"pipeline parallel size {pp} for {self.num_layers} decoder layers: use 1 to {self.num_layers}"
            )
        self.pp = pp
        counts = spread(self.num_layers, [0.0] * pp)
        self._of_layer = [stage for stage, count in enumerate(counts) for _ in range(count)]

    def of(self, name: str) -> int:
        """Stage of a full tensor."""
        if match := _LAYER.match(name):
            return self._of_layer[int(match[1])]
        return self.pp - 1 if name.startswith(_LAST_STAGE) else 0


def read_manifest(directory: Path) -> Manifest:
    """Reads ``megatron.json`` and checks the sizes of the files that it names.

    Raises:
        ConversionError: another format or version, or a file absent or of another size.
    """
    data = read_json(directory / MANIFEST, ConversionError)
    if (data.get("format"), data.get("version")) != (FORMAT, FORMAT_VERSION):
        raise ConversionError(
            f"{directory / MANIFEST} says format {data.get('format')!r} version {data.get('version')!r}; "
            f"this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        manifest = Manifest.from_dict(data, MANIFEST)
    except ConfigError as error:
        raise ConversionError(f"{directory / MANIFEST}: {error}") from error
    check_seal(data, directory / MANIFEST, ConversionError, required=False)
    manifest.record(directory).check_sizes()
    return manifest


def check_hf_files(record: Record) -> None:
    """Compares the files in ``hf/`` of Megatron weights or a training checkpoint with their digests: they are small.

    Raises:
        MegatronVLMError: one was changed.
    """
    record.check_digests([name for name in record.files if name.startswith("hf/")])
