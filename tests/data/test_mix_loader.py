"""A mix of formats, repeats and damage through the loader: nothing lost, nothing twice, the same for ranks and workers."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.counts import TokenCounts
from megatron_vlm.data.stream.loader import DataState, RowLoader, open_data
from megatron_vlm.errors import ConfigError

BASE = {"seq_length": 48, "on_too_long": "drop", "on_bad_sample": "skip", "bad_sample_rate": 0.01}
MODES = {
    "rows": {
        "packing": True,
        "packing_window": 40,
        "slice_size": 4,
        "window_slices": 3,
        "max_patches_per_row": 9,
        "seq_length": 96,
    },
    "samples": {},
    "by length": {"group_by": "length", "packing_window": 50},
    "by modality": {"group_by": "modality", "packing_window": 50},
}
BATCH = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_digits, digits_dir):
    """LLaVA (97, some too long), an XComposer list of three sources (25, 50 and 8 an epoch), OpenAI text (20, half)."""
    root = tmp_path_factory.mktemp("mix")
    lines = ["# how many thousands an epoch"]
    for name, number, k in (("a", 40, 0.025), ("b b", 23, 0.05), ("c", 30, 0.0075)):
        records = json.loads(make_digits(root / name, number).read_text())
        for record in records:
            record["image"] = [f"{name}/{x}" for x in np.atleast_1d(record.get("image") or [])]
            for turn in record["conversations"]:
                turn["value"] = turn["value"].replace("<image>", "<ImageHere>")
        (root / f"{name}.json").write_text(json.dumps(records))
        lines.append(f"{root / name}.json {k}")
    (root / "list.txt").write_text("\n".join(lines))
    build_shards(open_sources("xcomposer", [root / "list.txt"], root=str(root)), root / "listed", samples_per_shard=16)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "User", "content": "Two?"}]
    lines = [
        json.dumps({"messages": [*talk, {"role": "assistant", "content": "one " * (i % 5 + 1)}]}) for i in range(20)
    ]
    (root / "talk.jsonl").write_text("\n".join(lines))
    build_shards(open_sources("openai", [root / "talk.jsonl"], repeat=[0.5]), root / "talk", samples_per_shard=7)
    return [digits_dir, root / "listed", root / "talk"]


@pytest.fixture(scope="module")
def damaged(folders, make_processor):
    """Three samples are damaged after they were counted: read errors that only training finds."""
    config = DataConfig(**BASE)
    dataset = Dataset(folders)
    TokenCounts(dataset, make_processor(config))
    TokenCounts(dataset, make_processor(config.replace(answer_loss_only=True)))
    for sample_id in (97 + 3, 97 + 41, 97 + 93 + 2):
        shard, row = dataset.locate_one(sample_id)
        with dataset.shards[shard].path.open("r+b") as file:
            file.seek(int(dataset.index(shard)[row]["offset"]) + 522)
            file.write(b"#")
    dataset.close()
    return folders


@pytest.fixture
def loader_of(damaged, make_processor, tmp_path):
    made = []

    def make(mode, *, dp=1, rank=0, num_workers=0, state=None, paths=damaged, **config):
        config = DataConfig(**{**BASE, **MODES[mode], "num_workers": num_workers, **config})
        sizes = dict(global_batch_size=BATCH, micro_batch_size=1, dp_rank=rank, dp_size=dp)
        made.append(
            RowLoader(config, make_processor(config), paths=paths, seed=3, state=state, output_dir=tmp_path, **sizes)
        )
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def epoch_of(loader_of, mode, dp, num_workers, tmp_path):
    """Steps of an epoch on all ranks: ids of each step, how often each key was used, ids of holes."""
    for old in tmp_path.glob("*.jsonl"):
        old.unlink()
    loaders = [loader_of(mode, dp=dp, rank=rank, num_workers=num_workers) for rank in range(dp)]
    steps, used = [], Counter()
    for _ in range(loaders[0].steps_per_epoch()):
        ranks = [loader.next_step() for loader in loaders]
        assert len({step.sample_ids for step in ranks}) == 1 and len({str(step.state) for step in ranks}) == 1
        assert {len(step.rows) for step in ranks} == {BATCH // dp}
        steps.append(ranks[0].sample_ids)
        used.update(key for step in ranks for row in step.rows for key in row.keys)
    for loader in loaders:
        loader.close()
    path = tmp_path / "quarantine.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return steps, used, lines


DEFAULT = (("rows", 0, 2), *((mode, 0, 4) for mode in MODES))  # each is compared with one rank, no workers
CASES = [(mode, workers, dp) for mode in MODES for workers in (0, 1, 3) for dp in (1, 2, 4)]


@pytest.mark.parametrize(
    "mode, workers, dp", [pytest.param(*c, marks=() if c in DEFAULT else pytest.mark.full) for c in CASES]
)
def test_an_epoch_of_any_mix(loader_of, damaged, make_processor, mode, workers, dp, tmp_path):
    """used + excluded + holes = all, every sample as often as its source says, and the same steps for every layout."""
    steps, used, holes = epoch_of(loader_of, mode, dp, workers, tmp_path)
    assert steps == epoch_of(loader_of, mode, 1, 0, tmp_path)[0]

    config = DataConfig(**{**BASE, **MODES[mode]})
    opened = open_data(config, make_processor(config), damaged, seed=3)
    wanted = np.concatenate([opened.mixture.ids(0, w) for w in range(opened.mixture.num_windows)])
    assert [(s.samples, s.per_epoch) for s in opened.mixture.sources] == [
        (97, 97),
        (40, 25),
        (23, 50),
        (30, 8),
        (20, 10),
    ]
    for source in opened.mixture.sources:
        assert ((wanted >= source.first) & (wanted < source.first + source.samples)).sum() == source.per_epoch
    usable = opened.counts(wanted)["reason"] == 0
    assert 0 < (~usable).sum() < 40
    ids = [i for step in steps for i in step]
    epoch = ids[: int(usable.sum())]  # the last step reaches into the next epoch
    assert len(ids) - len(epoch) < BATCH if mode != "rows" else len(steps) > 1
    assert Counter(epoch) == Counter(wanted[usable].tolist())
    keys = Counter(opened.dataset.read_text(*opened.dataset.locate_one(i)).key for i in ids if i not in HOLES)
    assert used == keys
    assert sorted(line["id"] for line in holes) == sorted(i for i in ids if i in HOLES)
    for line in holes:
        assert line["shard"].endswith(".tar") and line["offset"] >= 0 and "crc32" in line["reason"]
        assert {"epoch", "window", "item"} <= set(line)


HOLES = (97 + 3, 97 + 41, 97 + 93 + 2)


@pytest.mark.parametrize("mode", MODES)
def test_resume_at_every_step(damaged, make_processor, mode):
    """Plans alone: what rows hold after a stop is shown in test_loader."""
    config = DataConfig(**{**BASE, **MODES[mode], "num_workers": 0})
    stream = open_data(config, make_processor(config), damaged, seed=3).stream

    def steps(state, dp=1, rank=0):
        return stream.steps(state, global_batch_size=BATCH, micro_batch_size=1, dp_rank=rank, dp_size=dp)

    plans, whole = steps(DataState(seed=3)), []
    while not whole or whole[-1].state.epoch < 2:
        whole.append(next(plans))
    for step, following in pairwise(whole):
        state = DataState.from_dict(json.loads(json.dumps(step.state.to_dict())))
        resumed = next(steps(state))
        assert (resumed.sample_ids, resumed.state, resumed.rows) == (
            following.sample_ids,
            following.state,
            following.rows,
        )
    state, ids = DataState(seed=3), []
    for dp in (4, 2, 4):
        ranks = [steps(state, dp, rank) for rank in range(dp)]
        for _ in range(3):
            parts = [next(plans) for plans in ranks]
            assert {part.sample_ids for part in parts} == {parts[0].sample_ids}
            assert Counter(i for part in parts for row in part.rows for i in row.ids) == Counter(parts[0].sample_ids)
            ids.append(parts[0].sample_ids)
        state = parts[0].state
    assert ids == [step.sample_ids for step in whole[:9]]


def test_groups_are_alike(damaged, make_processor):
    config = DataConfig(**BASE)
    counts = open_data(config, make_processor(config), damaged, seed=3).counts

    def spread(mode):
        config = DataConfig(**{**BASE, **MODES[mode], "packing_window": 4096})
        stream = open_data(config, make_processor(config), damaged, seed=3).stream
        plans = stream.steps(DataState(seed=3), global_batch_size=BATCH, micro_batch_size=1, dp_rank=0, dp_size=1)
        tables = [counts(np.array(next(plans).sample_ids)) for _ in range(60)]
        mixed = np.mean([len(set(table["image_tokens"] > 0)) == 2 for table in tables])
        return np.mean([np.ptp(table["tokens"].astype(int)) for table in tables]), mixed

    plain, by_length, by_modality = (spread(mode) for mode in ("samples", "by length", "by modality"))
    # An epoch has 20 batches; two of them join the end of one window and the start of the next.
    assert by_length[0] < plain[0] / 2 and by_modality[0] < plain[0] / 2
    assert by_modality[1] < 0.2 and plain[1] > 0.6


def test_rows_stay_under_their_patches(loader_of):
    """An image has 9 patches; a sample of two is excluded by the limit, and rows of 96 tokens hold no second image."""

    def most(**config):
        loader = loader_of("rows", **config)
        rows = [row for _ in range(5) for row in loader.next_step().rows]
        counts = [sum((p.shape[1] // 8) * (p.shape[2] // 8) for p in row.pixels) for row in rows]
        return max(counts), max(len(row.keys) for row in rows), loader.report()["excluded"]

    patches, samples, excluded = most()
    assert patches == 9 and samples > 1 and set(excluded) == {"too_many_patches"}
    patches, samples, excluded = most(max_patches_per_row=None)
    assert patches > 18 and not excluded


def test_weights_and_repeats_of_folders(loader_of, damaged):
    """The realised mixture is reported in samples and tokens, and is what comes."""
    paths = [SourceConfig(path=str(damaged[0]), weight=3), SourceConfig(path=str(damaged[2]), weight=1)]
    loader = loader_of("samples", paths=paths)
    mixture = loader.report()["mixture"]
    assert [source["per_epoch"] for source in mixture.values()] == [87.75, 29.25]
    ids = [i for _ in range(2 * loader.steps_per_epoch()) for i in loader.next_step().sample_ids]
    share = np.mean(np.array(ids) < 97)
    assert abs(share - mixture[str(damaged[0])]["sample_share"]) < 0.02
    assert sum(source["token_share"] for source in mixture.values()) == pytest.approx(1)
    tokens = {name: source["tokens"] / source["samples"] for name, source in mixture.items()}
    larger = tokens[str(damaged[0])] > tokens[str(damaged[2])]
    assert larger == (mixture[str(damaged[0])]["token_share"] > mixture[str(damaged[0])]["sample_share"])
    state = loader.next_step().state
    with pytest.raises(ConfigError, match="mixture changed"):
        loader_of("samples", paths=[paths[0], SourceConfig(path=str(damaged[2]), weight=2)], state=state)
    with pytest.raises(ConfigError, match="packing changed"):
        loader_of("by length", paths=paths, state=state)
