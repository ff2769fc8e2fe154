"""Every command on damaged input: success, or exit 1 and the file named, or 2 for usage. No traceback, at most 10 s.

Seeded; ``MEGATRON_VLM_FUZZ_SEED=n`` draws other cases, and a failure's text has the seed of the case. Where digests protect the
input, success must mean the very output of sound input.
"""

import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import shutil
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import megatron_vlm
from megatron_vlm.cli.main import main
from megatron_vlm.testing.fuzz import ODD_VALUES, Outcome, damage, run_forked
from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

SEED = int(os.environ.get("MEGATRON_VLM_FUZZ_SEED", "0"))
SMALL = dict(text_hidden=32, ffn=48, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1, perceiver_head_dim=8)
SIZE = "--make-vocab-size-divisible-by 8"
TRAIN = (
    f"--data-path {{shards}} --output-dir {{out}} --seq-length 128 --global-batch-size 2 --num-workers 0 --device cpu "
    f"--no-tensorboard --train-iters 1 {SIZE}"
)


@dataclass(frozen=True)
class Scenario:
    """A command and the inputs that are damaged.

    Attributes:
        argv: words; ``{x}`` is input x, ``{out}`` a fresh place.
        damaged: inputs of which one file is damaged, or ``input/pattern`` of the files that may be.
        result: what the command made, comparable: digests protect these inputs, and success must give that of sound input.
        share: of the cases.
    """

    argv: str
    damaged: str
    result: Callable[[Path, str], object] | None = None
    share: float = 1.0

    @property
    def targets(self) -> list[tuple[str, str]]:
        """(input, pattern) of what may be damaged."""
        return [(name, pattern or "*") for name, _, pattern in (word.partition("/") for word in self.damaged.split())]


def tensors(out: Path, text: str) -> object:
    """Digests of the weights below ``out``."""
    files = sorted(out.rglob("*.safetensors"))
    assert files, text
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def loss(out: Path, text: str) -> object:
    """The loss of the one update."""
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def said(out: Path, text: str) -> object:
    return text


SCENARIOS = {
    "hf2mg idefics2": Scenario(f"convert hf2mg --hf {{idefics2}} --out {{out}} --tp 2 {SIZE}", "idefics2"),
    "hf2mg internvl3": Scenario(f"convert hf2mg --hf {{internvl3}} --out {{out}} {SIZE}", "internvl3"),
    "hf2mg xcomposer2": Scenario(f"convert hf2mg --hf {{xcomposer2}} --out {{out}} {SIZE}", "xcomposer2"),
    "mg2hf": Scenario("convert mg2hf --load {mg} --out {out}", "mg", result=tensors),
    "mg2hf of a checkpoint": Scenario("convert mg2hf --load {run} --out {out}", "run", result=tensors),
    "verify": Scenario("convert verify --hf {idefics2} --load {mg} --level weights", "mg", result=said, share=0.5),
    "merge": Scenario("convert merge --base {idefics2} --adapter {adapter} --out {out}", "adapter", result=tensors),
    "train": Scenario(f"train --load {{idefics2}} {TRAIN}", "idefics2", share=0.7),
    "train on weights": Scenario(f"train --load {{mg}} {TRAIN}", "mg", result=loss, share=0.7),
    "train on a checkpoint": Scenario(f"train --load {{run}} {TRAIN} --finetune", "run", result=loss, share=0.7),
    "train on data": Scenario(f"train --load {{mg}} {TRAIN}", "shards", result=loss, share=0.7),
    "train by a config": Scenario(
        "train --config {settings}/train.yaml --load {mg} --data-path {shards} --output-dir {out}",
        "settings/train.yaml",
        share=0.7,
    ),
    "generate": Scenario(
        "generate --load {mg} --prompt Hello --max-new-tokens 2 --device cpu", "mg", result=said, share=0.7
    ),
    "launch": Scenario(
        "launch --model-name-or-path {idefics2} --train-json {raw}/llava.json --image-root {raw} --output-dir {out} "
        "--deepspeed {settings}/ds.json --config {settings}/launch.yaml --shard-cache {out}/cache --device cpu --bf16 False "
        "--max-steps 1 --per-device-train-batch-size 1 --max-length 128 --report-to none --no-launch",
        "raw/llava.json settings/ds.json settings/launch.yaml raw/*.png",
    ),
    "build llava": Scenario(
        "data build --format llava --input {raw}/llava.json --image-root {raw} --out {out}", "raw/llava.json raw/*.png"
    ),
    "build openai": Scenario(
        "data build --format openai --input {raw}/openai.jsonl --image-root {raw} --out {out}",
        "raw/openai.jsonl raw/*.png",
    ),
    "build internvl": Scenario(
        "data build --format internvl --input {raw}/meta.json --out {out}", "raw/meta.json raw/internvl.jsonl"
    ),
    "build xcomposer": Scenario(
        "data build --format xcomposer --input {raw}/xcomposer.json --image-root {raw} --out {out}",
        "raw/xcomposer.json",
    ),
    "build parquet": Scenario("data build --format parquet --input {raw}/rows.parquet --out {out}", "raw/rows.parquet"),
    "build webdataset": Scenario("data build --format webdataset --input {raw}/web.tar --out {out}", "raw/web.tar"),
    "check": Scenario("data check {shards} --model {idefics2} --seq-length 128", "shards idefics2/*.json"),
    "stats": Scenario("data stats {shards} --model {idefics2} --seq-length 128 --out {out}.png", "shards"),
    "preview": Scenario(
        "data preview {shards} --model {idefics2} --seq-length 128 --out {out}.html", "shards idefics2/*.js*"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """All of the package, so that forks find it."""
    for module in pkgutil.walk_packages(megatron_vlm.__path__, "megatron_vlm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Sound inputs of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("internvl3", "xcomposer2"):
        (folder / name).mkdir()
    write_tiny_idefics2(folder / "idefics2", layers=1, **SMALL)
    write_tiny_internvl3(folder / "internvl3")
    write_tiny_xcomposer2(folder / "xcomposer2")
    write_raw(folder / "raw")
    write_settings(folder / "settings")
    write_shards(folder / "made", 12, seed=1).rename(folder / "shards")
    shutil.rmtree(folder / "made")
    must(f"convert hf2mg --hf {folder}/idefics2 --out {folder}/mg --tp 2 {SIZE}", folder)
    for name, more in (("run", ""), ("lora", "peft.target_modules=[q_proj,v_proj] peft.r=2")):
        words = TRAIN.format(shards=folder / "shards", out=folder / name)
        must(f"train --load {folder}/idefics2 {words} --save {folder}/{name} {more}", folder)
    must(f"convert mg2hf --load {folder}/lora --out {folder}/adapter --adapter-only", folder)
    for name in ("run", "lora"):
        for log in [*(folder / name).glob("*.log"), *(folder / name).glob("*.jsonl")]:
            log.unlink()
    return folder


def must(words: str, folder: Path) -> None:
    """In a fork: a process group of this process would be in the way of all later ones."""
    outcome = run_forked(lambda: main(words.split()), folder / "log", 60)
    assert outcome.code == 0, outcome.output


def write_raw(folder: Path) -> None:
    """The same few conversations in every public format."""
    import tarfile

    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    noise = np.random.default_rng(0)
    llava, openai, rows = [], [], []
    for i in range(4):
        Image.fromarray(noise.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"number {i}"}]
        llava.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
        picture = {"type": "image_url", "image_url": {"url": f"{i}.png"}}
        user = [picture, {"type": "text", "text": "What?"}]
        openai.append(
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": f"number {i}"}]}
        )
        rows.append(
            {"conversations": turns, "image": {"bytes": (folder / f"{i}.png").read_bytes(), "path": f"{i}.png"}}
        )
    (folder / "llava.json").write_text(json.dumps(llava))
    (folder / "openai.jsonl").write_text("".join(json.dumps(record) + "\n" for record in openai))
    (folder / "internvl.jsonl").write_text("".join(json.dumps(record) + "\n" for record in llava))
    meta = {
        "root": str(folder),
        "annotation": str(folder / "internvl.jsonl"),
        "repeat_time": 1,
        "length": 4,
        "data_augment": False,
    }
    (folder / "meta.json").write_text(json.dumps({"some": meta}))
    talk = [{"from": "user", "value": "<ImageHere>What?"}, {"from": "assistant", "value": "four"}]
    (folder / "xcomposer.json").write_text(json.dumps([{"id": "0", "image": ["0.png"], "conversations": talk}]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    with tarfile.open(folder / "web.tar", "w") as tar:
        for i, record in enumerate(llava):
            for name, data in (
                (f"{i}.png", (folder / f"{i}.png").read_bytes()),
                (f"{i}.json", json.dumps(record).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_settings(folder: Path) -> None:
    folder.mkdir()
    (folder / "train.yaml").write_text(
        "model:\n  make_vocab_size_divisible_by: 8\ndata:\n  seq_length: 128\n  num_workers: 0\n  packing: false\n"
        "training:\n  global_batch_size: 2\n  micro_batch_size: 1\n  train_iters: 1\n  device: cpu\n  precision: fp32\n"
        "optimizer:\n  lr: 1e-3\n  weight_decay: 0.1\nlogging:\n  tensorboard: false\n"
    )
    (folder / "launch.yaml").write_text("optimizer:\n  weight_decay: 0.1\ndata:\n  num_workers: 0\n")
    ds = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 2}},
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": False},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(ds))


class Place:
    """The inputs of a scenario, those that are damaged copied, and where results go."""

    def __init__(self, scenario: Scenario, inputs: Path, folder: Path):
        self.folder, self.out = folder, folder / "out"
        folder.mkdir(exist_ok=True)
        names = {name for _, name, _, _ in string.Formatter().parse(scenario.argv) if name} - {"out"}
        for name in names:
            if any(name == damaged for damaged, _ in scenario.targets):
                shutil.copytree(inputs / name, folder / name)
            else:
                (folder / name).symlink_to(inputs / name)
        if (folder / "raw").exists() and not (folder / "raw").is_symlink():
            meta = (folder / "raw" / "meta.json").read_text().replace(str(inputs), str(folder))
            (folder / "raw" / "meta.json").write_text(meta)
        places = {name: str(folder / name) for name in names}
        self.argv = [word.format(out=self.out, **places) for word in scenario.argv.split()]

    def run(self, seconds: float = 10) -> Outcome:
        return run_forked(lambda: main(self.argv), self.folder / "log", seconds)


@pytest.fixture(scope="module")
def sound(inputs, tmp_path_factory) -> dict[str, object]:
    """What each command gives for sound input."""
    results = {}
    for name, scenario in SCENARIOS.items():
        place = Place(scenario, inputs, tmp_path_factory.mktemp("sound"))
        outcome = place.run(seconds=60)
        assert outcome.code == 0, f"{name}: {outcome.output}"
        results[name] = result_of(scenario, place, outcome)
        print(f"{name}: {outcome.seconds:.2f} s")
    return results


def result_of(scenario: Scenario, place: Place, outcome: Outcome) -> object:
    """What the command made, without the folder's name."""
    result = scenario.result(place.out, outcome.output) if scenario.result else None
    return result.replace(str(place.folder), "") if isinstance(result, str) else result


def cases(count: int) -> Iterator[tuple[str, int]]:
    """``count`` (scenario, seed), every scenario at least once."""
    names, weights = list(SCENARIOS), [scenario.share for scenario in SCENARIOS.values()]
    drawn = names + random.Random(SEED).choices(names, weights, k=max(0, count - len(names)))
    yield from ((name, SEED * 1_000_000 + number) for number, name in enumerate(drawn[:count]))


def check(inputs: Path, sound: dict[str, object], folder: Path, count: int, seconds: float) -> None:
    faults, began, done = [], time.monotonic(), 0
    for name, seed in cases(count):
        if time.monotonic() - began > seconds:
            break
        scenario, rng = SCENARIOS[name], random.Random(seed)
        place = Place(scenario, inputs, folder / str(seed))
        target, pattern = rng.choice(scenario.targets)
        did = damage(place.folder / target, rng, pattern)
        outcome = place.run()
        # A message may name the file, its folder, or what stands for it (a sample of it).
        # ... and a setting is named by its key, whichever file or flag it comes from.
        fault = outcome.fault(
            [
                did.split(":")[0],
                str(place.folder / target),
                *(["error:", "FAILED   settings"] if target == "settings" else []),
            ]
        )
        if not fault and outcome.code == 0:
            result = result_of(scenario, place, outcome)
            fault = "" if result == sound[name] else f"accepted with changed meaning: {str(result)[:300]}"
        if fault:
            faults.append(f"--- {name}, seed {seed}: {did}\n    {fault}\n{outcome.output[-1500:]}")
        shutil.rmtree(place.folder, ignore_errors=True)
        done += 1
    (folder / "faults.txt").write_text("\n".join(faults))
    print(f"{done} cases in {time.monotonic() - began:.0f} s, {len(faults)} faults")
    assert done >= len(SCENARIOS), "too slow to see every command once"
    assert not faults, f"{len(faults)} of {done} cases:\n" + "\n".join(faults)


@pytest.mark.slow
def test_damaged_inputs(inputs, sound, tmp_path):
    """Three quarters of a minute of them."""
    check(inputs, sound, tmp_path, 400, 45)


@pytest.mark.full
def test_many_damaged_inputs(inputs, sound, tmp_path):
    check(inputs, sound, tmp_path, 2000, 3600)


PLAIN = """
    --help --load --hf --out --tp --pp --data-path --config --save --lr --train-iters --format --input --model --prompt
    --output-dir --device cpu llava x -1 0 1e99 nan / . ~ $NOPE a.b=c training.seed=x data.train=[ = -- - --no-such %s
    hf2mg mg2hf verify merge build check stats preview list show copy quickstart/train --world-size --dry-run {} []
"""
WORDS = [*PLAIN.split(), "", "\ud800", "\x00", "x" * 5000]


def test_odd_words(tmp_path, monkeypatch):
    """Commands with words in any order: usage or an error, never a traceback."""
    monkeypatch.chdir(tmp_path)
    rng, faults = random.Random(SEED), []
    for number in range(60):
        command = rng.choice(["launch", "train", "data", "generate", "convert", "recipe", "chat", ""])
        argv = [command, *rng.choices(WORDS, k=rng.randrange(6))]
        outcome = run_forked(lambda argv=argv: main(argv), tmp_path / "log")
        fault = outcome.fault([""])
        if fault:
            faults.append(f"--- {number}: {argv}\n    {fault}\n{outcome.output[-1500:]}")
    assert not faults, f"{len(faults)} cases:\n" + "\n".join(faults)


def test_the_check_can_fail(tmp_path):
    """A traceback, a hang, memory without bound and a message without the file are seen."""

    def eat() -> int:
        return len(bytearray(8 << 30))

    def loop() -> int:
        while True:
            time.sleep(1)

    assert "traceback" in run_forked(lambda: 1 // 0, tmp_path / "a").fault(["x"])
    assert "traceback" in run_forked(eat, tmp_path / "b", more_bytes=1 << 30).fault(["x"])
    assert "not done" in run_forked(loop, tmp_path / "c", seconds=0.5).fault(["x"])
    assert "without naming" in run_forked(lambda: print("error: bad") or 1, tmp_path / "d").fault(["x.json"])
    assert not run_forked(lambda: print("error: x.json is bad") or 1, tmp_path / "e").fault(["x.json"])
    assert len({json.dumps(value) for value in ODD_VALUES}) > 20
