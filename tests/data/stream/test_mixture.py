"""Mixtures: counts per epoch exact for every source, every window in proportion, repeats spread, nothing drawn by chance."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.mixture import Mixture, MixtureSource, exactly, resolve
from megatron_vlm.errors import ConfigError, DataError

SIZES = (1, 2, 97, 128, 1000, 3001)


def sources_of(*numbers):
    """(samples, per_epoch) pairs, laid end to end."""
    first, sources = 0, []
    for index, (samples, per_epoch) in enumerate(numbers):
        sources.append(MixtureSource(name=f"s{index}", first=first, samples=samples, per_epoch=per_epoch))
        first += samples
    return sources


def epoch_of(mixture, epoch):
    return np.concatenate([mixture.ids(epoch, window) for window in range(mixture.num_windows)])


@pytest.mark.parametrize("window", [1, 30, 4096])
@pytest.mark.parametrize("slices", [(1, 64), (7, 3), (128, 64)])
@pytest.mark.parametrize("size", SIZES)
def test_one_source_is_a_bijection(size, slices, window):
    window = max(window, size // 20)
    mixture = Mixture(sources_of((size, size)), seed=4, window=window, slice_size=slices[0], window_slices=slices[1])
    epochs = [epoch_of(mixture, epoch) for epoch in (0, 1, 6)]
    assert all(np.array_equal(np.sort(ids), np.arange(size)) for ids in epochs)
    assert size < 50 or len({ids.tobytes() for ids in epochs}) == 3


def test_a_million():
    """What one source of 1e6 and a mixture around it read in an epoch."""
    n = 1_000_000
    assert np.array_equal(np.sort(epoch_of(Mixture(sources_of((n, n)), seed=1, window=65_536), 3)), np.arange(n))
    mixture = Mixture(sources_of((1000, 2500), (n, n // 2), (3, 7)), seed=1, window=65_536)
    used = sum(np.bincount(epoch_of(mixture, epoch), minlength=n + 1003) for epoch in (0, 1))
    assert (used[:1000] == 5).all() and (used[1000 : 1000 + n] == 1).all() and sorted(used[-3:]) == [4, 5, 5]


MIX = ((1000, 300), (50, 125), (3, 7), (2000, 2000), (128, 0), (700, 1))


@pytest.mark.parametrize("window", [64, 500, 5000])
def test_counts_per_epoch_are_exact_and_uses_even(window):
    mixture = Mixture(sources_of(*MIX), seed=9, window=window, slice_size=16, window_slices=4)
    used = np.zeros(sum(samples for samples, _ in MIX), dtype=int)
    for epoch in range(7):
        ids = epoch_of(mixture, epoch)
        for source in mixture.sources:
            mine = ids[(ids >= source.first) & (ids < source.first + source.samples)]
            assert len(mine) == source.per_epoch
        used += np.bincount(ids, minlength=len(used))
        for source in mixture.sources:  # a sample never falls more than one use behind another, over any epochs
            times = used[source.first : source.first + source.samples]
            assert times.max() - times.min() <= 1
            assert times.sum() == (epoch + 1) * source.per_epoch


def test_every_window_holds_each_source_in_its_share():
    mixture = Mixture(sources_of((900, 450), (10_000, 10_000), (100, 1000), (77, 3)), seed=2, window=512)
    for window in range(mixture.num_windows):
        ids = mixture.ids(5, window)
        assert abs(len(ids) - mixture.num_positions(1) / mixture.num_windows) <= len(mixture.sources)
        for source in mixture.sources:
            mine = int(((ids >= source.first) & (ids < source.first + source.samples)).sum())
            assert abs(mine - source.per_epoch / mixture.num_windows) < 1


def test_batches_mix_sources_as_chance_would():
    """Chi-square of source against batch within windows; and what goes first is no source's privilege."""
    mixture = Mixture(sources_of((4000, 8000), (20_000, 10_000), (9000, 6000)), seed=3, window=4096)
    table, expected, lead = [], [], []
    for epoch in range(3):
        for window in range(mixture.num_windows):
            ids = mixture.ids(epoch, window)
            which = np.searchsorted([4000, 24_000], ids, side="right")
            lead.append(which[0])
            parts = np.split(which[: len(ids) // 256 * 256], len(ids) // 256)
            table += [np.bincount(part, minlength=3) for part in parts]
            expected += [np.bincount(which, minlength=3) * 256 / len(ids)] * len(parts)
    table, expected = np.array(table), np.array(expected)
    chi2 = ((table - expected) ** 2 / expected).sum()
    # Without replacement inside a window the law is a little narrower than chi-square: p leans to 1, never to 0.
    assert stats.chi2.sf(chi2, table.shape[0] * 2) > 1e-3
    assert len(set(lead)) == 3


def test_repeats_of_a_sample_lie_far_apart():
    mixture = Mixture(sources_of((1000, 3000), (3000, 3000)), seed=3, window=500, slice_size=1)
    ids = epoch_of(mixture, 0)
    for first in range(0, 1000, 37):
        places = np.flatnonzero(ids == first)
        assert len(places) == 3 and len({place // 2000 for place in places}) == 3


def test_a_source_depends_on_its_own_seed_and_epoch():
    def sequence(mixture, epoch):
        ids = epoch_of(mixture, epoch)
        return ids[ids < 1000].tolist(), (ids[ids >= 1000] - 1000).tolist()

    mixture = Mixture(sources_of((1000, 1000), (1000, 1000)), seed=1, window=100, slice_size=1)
    first, second = sequence(mixture, 0)
    assert first != second and sequence(mixture, 1)[0] != first
    other = Mixture(sources_of((1000, 1000), (1000, 1000)), seed=2, window=100, slice_size=1)
    assert sequence(other, 0)[0] != first


def count(ids, source):
    return int(((ids >= source.first) & (ids < source.first + source.samples)).sum())


def test_broken_shares_are_carried_over():
    """0.3 of 31 samples are 9.3 an epoch: 93 in ten epochs, where rounding anew each time makes 90."""
    folders = [[("a", 0, 31, Fraction(31))], [("b", 31, 20, Fraction(20))]]
    settings = [SourceConfig(path="a", repeat=0.3), SourceConfig(path="b", repeat=0.02)]
    mixture = Mixture(resolve(folders, settings), seed=5, window=4)
    epochs = [epoch_of(mixture, epoch) for epoch in range(100)]
    for number, source in enumerate(mixture.sources):
        taken = np.cumsum([count(ids, source) for ids in epochs])
        exact = [float(source.per_epoch * (epoch + 1)) for epoch in range(100)]
        assert np.abs(taken - exact).max() < 1
        assert [taken[epoch] for epoch in (9, 49, 99)] == [round(exact[epoch]) for epoch in (9, 49, 99)]
        assert [mixture.taken(number, epoch + 1) for epoch in range(100)] == taken.tolist()
        used = np.bincount(np.concatenate(epochs), minlength=51)[source.first : source.first + source.samples]
        assert used.max() - used.min() <= 1
    assert mixture.num_positions(10) == sum(map(len, epochs[:10])) == 97


@pytest.mark.parametrize(
    "weights", [(3, 7), (0.25, 0.75), (1, 1), (0.01, 1), (0.1, 0.7, 0.2), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
)
@pytest.mark.parametrize("total", [31, 117, 4096])
def test_weights_are_exact_over_epochs(weights, total):
    """Each source keeps its share to within a sample at any time; epochs of two sources are of one size."""
    sizes = [total - 7 * (len(weights) - 1)] + [7] * (len(weights) - 1) if total == 117 else None
    sizes = sizes or [total // len(weights)] * (len(weights) - 1) + [total - total // len(weights) * (len(weights) - 1)]
    starts = np.cumsum([0, *sizes]).tolist()
    folders = [[(str(i), starts[i], size, Fraction(size))] for i, size in enumerate(sizes)]
    mixture = Mixture(
        resolve(folders, [SourceConfig(path=str(i), weight=w) for i, w in enumerate(weights)]), seed=1, window=16
    )
    shares = [total * exactly(weight) / sum(map(exactly, weights)) for weight in weights]
    assert [source.per_epoch for source in mixture.sources] == shares
    for epoch in range(0, 60, 1 if total < 4096 else 11):
        for window in range(mixture.num_windows):
            time = epoch + Fraction(window, mixture.num_windows)
            taken = [mixture.taken(number, epoch, window) for number in range(len(weights))]
            assert all(abs(number - share * time) < 1 for number, share in zip(taken, shares))
            assert all(
                number <= after
                for number, after in zip(taken, (mixture.taken(i, epoch + 1) for i in range(len(taken))))
            )
        off = abs(mixture.num_positions(epoch) - total * epoch)
        assert off == 0 if len(weights) == 2 else off < len(weights)
    period = math.lcm(*(share.denominator for share in shares))
    assert [mixture.taken(number, period) for number in range(len(weights))] == [share * period for share in shares]


def test_a_source_that_is_never_read():
    """Weight 0.005 of 31 samples, repeat 0.02 of 11: read in the epoch where their share is a sample, refused before."""
    folders = [[("a", 0, 20, Fraction(20))], [("b", 20, 11, Fraction(11))]]
    for settings, share in (({"weight": 1}, {"weight": 0.005}), r"0\.1542"), (({}, {"repeat": 0.02}), r"0\.22"):
        configs = [SourceConfig(path=name, **setting) for name, setting in zip("ab", settings)]
        mixture = Mixture(resolve(folders, configs), seed=1, window=64)
        with pytest.raises(
            ConfigError, match=rf"1 epoch\) never reads.*\n  b: 11 samples, share {share} .* in epoch \d"
        ) as error:
            mixture.require_all(1)
        first = int(str(error.value).rsplit(" ", 1)[1])
        assert [mixture.taken(1, epoch) for epoch in (first - 1, first)] == [0, 1]
        with pytest.raises(ConfigError, match=f"{first - 1} epoch"):
            mixture.require_all(first - 1)
        mixture.require_all(first)


A, B = [("a.json", 0, 600, 600), ("b.json", 600, 400, 400)], [("c.json", 1000, 500, 500)]
LISTED = [("a.json", 0, 800, 500), ("b.json", 800, 100, 1500), ("c.json", 900, 300, 250)]  # k = 0.5, 1.5, 0.25


@pytest.mark.parametrize(
    "folders, settings, expected",
    [
        ([A, B], [{}, {}], [("0", 1000, 1000), ("1", 500, 500)]),
        ([A, B], [{"repeat": 2}, {}], [("0:a.json", 600, 1200), ("0:b.json", 400, 800), ("1", 500, 500)]),
        ([A, B], [{"repeat": 0.5}, {"per_epoch": 123}], [("0:a.json", 600, 300), ("0:b.json", 400, 200), ("1", 500, 123)]),
        ([A, B], [{"weight": 1}, {"weight": 3}], [("0:a.json", 600, 225), ("0:b.json", 400, 150), ("1", 500, 1125)]),
        ([LISTED], [{}], [("0:a.json", 800, 500), ("0:b.json", 100, 1500), ("0:c.json", 300, 250)]),
        ([LISTED], [{"repeat": 2}], [("0:a.json", 800, 1000), ("0:b.json", 100, 3000), ("0:c.json", 300, 500)]),
        ([B, [("c.json", 1500, 500, 500)]], [{"path": "0"}, {"path": "0"}], [("0", 500, 500), ("0 (2)", 500, 500)]),
        ([B], [{"repeat": 1.0005}], [("0", 500, Fraction("500.25"))]),
    ],
)  # fmt: skip
def test_what_an_epoch_reads(folders, settings, expected):
    settings = [SourceConfig(**{"path": str(i), **setting}) for i, setting in enumerate(settings)]
    sources = resolve(folders, settings)
    assert [(s.name, s.samples, s.per_epoch) for s in sources] == expected
    start = folders[0][0][1]
    assert [s.first for s in sources] == np.cumsum([start] + [s.samples for s in sources])[:-1].tolist()


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match=r"weight to 0 and none to 1"):
        resolve([A, B], [SourceConfig(path="0", weight=1), SourceConfig(path="1")])
    with pytest.raises(ConfigError, match="0:b has 5 samples and a share of 0"):
        resolve([[("a", 0, 9, 9), ("b", 9, 5, 0)]], [SourceConfig(path="0")])
    with pytest.raises(ConfigError, match="one of weight, repeat"):
        SourceConfig(path="x", weight=1, repeat=2)
    for value in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="repeat must be above 0"):
            SourceConfig(path="x", repeat=value)


def test_config_takes_paths_and_mappings():
    config = DataConfig.from_dict({"seq_length": 8, "train": ["a", {"path": "b", "repeat": "1.5"}, {"path": "c"}]})
    assert config.train == ("a", SourceConfig(path="b", repeat=1.5), SourceConfig(path="c"))
    assert DataConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"unknown config key 'data.train\[0\].wieght' \(did you mean 'weight'"):
        DataConfig.from_dict({"seq_length": 8, "train": [{"path": "b", "wieght": 1}]}, "data")


def test_sources_of_a_manifest(tmp_path, digits_dir):
    """Repeats and quotas that ``data build`` writes; a manifest that says none is one source."""
    manifest = json.loads((digits_dir / "manifest.json").read_text())

    def dataset_of(sources):
        for path in digits_dir.glob("shard-*"):
            (tmp_path / path.name).unlink(missing_ok=True)
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "sources": sources}))
        return Dataset([digits_dir, tmp_path])

    parts = [
        {"name": "a", "first_sample": 0, "samples": 50, "repeat": 0.25, "per_epoch": None},
        {"name": "b", "first_sample": 50, "samples": 40, "repeat": None, "per_epoch": 1000},
        {"name": "c", "first_sample": 90, "samples": 7, "repeat": None, "per_epoch": None},
    ]
    whole, split = dataset_of(parts).folders
    assert [source[1:] for source in whole] == [(0, 97, 97)]
    assert split == (("a", 97, 50, 12.5), ("b", 147, 40, 1000), ("c", 187, 7, 7))
    assert [source[1:] for source in dataset_of(None).folders[1]] == [(97, 97, 97)]
    for change in ({"samples": 41}, {"first_sample": 60}, {"per_epoch": -1}, {"repeat": "x"}):
        with pytest.raises(DataError, match="not a readable manifest"):
            dataset_of(
                [parts[0], {**parts[1], **({"per_epoch": None} if "repeat" in change else {}), **change}, parts[2]]
            )
