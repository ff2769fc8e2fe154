"""Which settings `data check`, `stats` and `preview` look at data with: those of the run that would train on it.

--config FILE | RECIPE | RUN'S FOLDER   its data section, and what it names: data, model, seed, batch
--model alone                           what `launch` trains that model with: its packaged recipe, packing left out
--set, --seq-length                     on top of either
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import parse_value
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.formats.records import OWN_VIDEO, VideoSettings
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.launch.build_inputs import build
from megatron_vlm.launch.inputs import Inputs, open_inputs
from megatron_vlm.options import recipes
from megatron_vlm.options.flag_values import FLAG
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.request import read_request
from megatron_vlm.registry import FamilySpec, family_of


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What is looked at, and how.

    Attributes:
        data: the data section.
        launch: how raw files are read.
        inputs: shard folders or raw files, as named.
        model: whose processor is used; None: none is named.
        seed, global_batch_size: of the run.
        said: where all this comes from, in words.
    """

    data: DataConfig
    launch: LaunchConfig
    inputs: tuple[SourceConfig | str, ...]
    model: str | None
    seed: int
    global_batch_size: int | None
    said: str

    def shards(self) -> tuple[SourceConfig | str, ...]:
        """Folders of shards: those that are named, and those that raw files are built into, as `launch` builds them."""
        if all(isinstance(item, SourceConfig) for item in self.inputs):
            return self.inputs
        found = self.raw()
        if found.sources and not found.built:
            build(found, self.data.replace(on_bad_sample="skip", max_bad_fraction=1.0))
        return tuple(found.paths)

    def raw(self) -> Inputs:
        """What the inputs are, by their content."""
        return open_inputs(
            "preview", [str(getattr(item, "path", item)) for item in self.inputs], self.launch, *self.videos()
        )

    def videos(self) -> tuple[str, VideoSettings]:
        """Format of records that do not tell theirs, and how frames of a video are taken, as the model has them."""
        if self.model is None:
            return "llava", OWN_VIDEO
        with opened_model(self.model) as (folder, _, spec):
            return spec.record_format, spec.video(folder)

    def processor(self) -> Processor | None:
        """Of the model, its files compared with the digests that were recorded of them; None without a model."""
        if self.model is None:
            return None
        with opened_model(self.model) as (folder, _, spec):
            return spec.open_processor(folder, self.data)


def settings_of(args: argparse.Namespace, *, recipe: bool = True) -> ViewSettings:
    """Reads the command line; without ``recipe`` a model alone brings no settings.

    Raises:
        ConfigError: what is wrong, by name; no data.
    """
    if wrong := [word for word in args.set if not word.startswith("data.")]:
        raise ConfigError(f"--set {wrong[0]}: only settings of the data section have a meaning here, data.KEY=VALUE")
    settings: list[tuple[str, Any]] = []
    for word in args.set:
        key, sep, value = word.partition("=")
        if not sep:
            raise ConfigError(f"--set {word}: expected data.KEY=VALUE")
        settings.append((key, parse_value(value, key)))
    named = {
        "data.seq_length": args.seq_length,
        f"{FLAG}model_name_or_path" if recipe else "checkpoint.load": args.model,
    }
    named |= {
        f"launch.{key}": getattr(args, name, None) for key, name in (("image_root",) * 2, ("data_format", "format"))
    }
    settings += [(key, value) for key, value in named.items() if value is not None]
    request = read_request(recipes.load_config(args.config) if args.config else {}, settings)
    run, model = request.run, args.model or (request.run.get("checkpoint") or {}).get("load")
    said = (
        f"Settings of {args.config}" if args.config else "Settings of no run: name --config, or --model for its recipe"
    )
    if request.defaults:
        assert model is not None
        with opened_model(model) as (_, hf_config, spec):
            run = request.complete(hf_config, spec, 1).run
            name = recipes.defaults_of(spec, hf_config, "full").name
        said = f"Settings of recipe {name}, as `launch` trains this model without a config: --config names another"
    data = {"seq_length": 4096, "num_workers": os.cpu_count() or 1, **(run.get("data") or {})}
    # What a run would refuse is looked at here: exclusions are counted, not raised.
    for key, value in (("on_too_long", "drop"), ("on_bad_sample", "skip")):
        data[key] = value if data.get(key, "raise") == "raise" else data[key]
    config = DataConfig.from_dict(data, "data")
    inputs = tuple(args.paths) or request.launch.train_inputs or config.train
    if not inputs:
        raise ConfigError("no data: name a folder, or a --config whose data.train does")
    training = run.get("training") or {}
    return ViewSettings(
        data=config,
        launch=request.launch,
        inputs=tuple(item if isinstance(item, SourceConfig) else str(item) for item in inputs),
        model=model,
        seed=int(training.get("seed") or 1234),
        global_batch_size=training.get("global_batch_size"),
        said=f"{said}. {_differences(config)}",
    )


def _differences(config: DataConfig) -> str:
    """Settings of the data section that are not the defaults."""
    plain, default = config.to_dict(), DataConfig(seq_length=config.seq_length).to_dict()
    left_out = ("train", "valid", "num_workers", "cache_dir", "seq_length")
    told = [f"{key} {value}" for key, value in plain.items() if value != default[key] and key not in left_out]
    return ", ".join([f"seq_length {config.seq_length}", *told])


@contextmanager
def opened_model(model: str) -> Iterator[tuple[Path, dict[str, Any], FamilySpec]]:
    """HF files, config.json and family of a model. A Hugging Face folder, of which no digests are recorded, needs no weights."""
    if os.path.isfile(Path(model, "config.json")):
        hf_config = read_json(Path(model, "config.json"))
        yield Path(model), hf_config, family_of(hf_config)
        return
    with open_source(model) as source:
        yield source.hf_dir, source.hf_config, source.spec
