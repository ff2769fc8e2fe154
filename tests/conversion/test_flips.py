"""A flipped bit is found by every reader, in Megatron weights and in adapters; what is not found changes nothing that is read."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import MegatronVLMError
from megatron_vlm.testing.fuzz import flip_bit, run_forked
from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

FLIPS = 200
SMALL = dict(
    text_hidden=32, ffn=48, layers=2, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1, perceiver_head_dim=8
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, Megatron weights of it (two of them with linears in 4 bits), an adapter, and shards."""
    root = tmp_path_factory.mktemp("flips")
    write_tiny_idefics2(root / "hf", **SMALL)
    hf2mg(root / "hf", root / "megatron", tp=2, pp=2)
    hf2mg(root / "hf", root / "nf4", quantize="nf4", dtype="fp32")
    write_adapter(root / "hf", root / "peft")
    mg2hf(root / "peft", root / "adapter", adapter_only=True, base=root / "hf")
    write_shards(root / "data", 8, seed=1)
    return root


def write_adapter(base: Path, out: Path) -> None:
    """An adapter as PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Idefics2ForConditionalGeneration

    model = Idefics2ForConditionalGeneration.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(out)


def flipped(folder: Path, copy: Path, rng: random.Random, name: str = "*") -> tuple[Path, str]:
    """A copy with one bit of one of its files flipped; every file is as likely as another, else weights take all."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = rng.choice(sorted(path for path in copy.rglob(name) if path.is_file()))
    return file, flip_bit(file, rng)


def read_all(folder: Path, base: Path | None = None) -> None:
    """What every command does that takes a folder with ``open_source``."""
    with open_source(folder, base=base) as source:
        source.check_digests()


def harmless(file: Path, good: Path) -> bool:
    """The file says the same as before: another spelling of a number in JSON."""
    try:
        return file.suffix == ".json" and json.loads(file.read_bytes()) == json.loads(good.read_bytes())
    except ValueError:
        return False


@pytest.mark.parametrize("kind", ["megatron", "nf4", "adapter"])
def test_every_flip_is_found(folders, tmp_path, kind):
    missed, rng = [], random.Random(7)
    base = folders / "hf" if kind == "adapter" else None
    read_all(folders / kind, base)
    for _ in range(FLIPS):
        file, what = flipped(folders / kind, tmp_path / "copy", rng)
        try:
            read_all(tmp_path / "copy", base)
        except MegatronVLMError as error:
            assert file.name in str(error) or "copy" in str(error), (file, what, error)
            continue
        if not harmless(file, folders / kind / file.relative_to(tmp_path / "copy")):
            missed.append((str(file), what))
    assert missed == []


def readers(folders: Path, bad: Path, out: Path) -> dict[str, list[str]]:
    """Commands that read Megatron weights or an adapter, one of a kind."""
    data = f"--data-path {folders / 'data' / 'shards'} --seq-length 96 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 "
    run = f"{data} --shortest-edge 24 --num-workers 0 --device cpu --no-tensorboard --train-iters 1 --output-dir {out / 'run'}"
    adapter = (bad / "adapter_config.json").is_file()
    load = f"--load {bad}"
    commands = {
        "train": f"train {load} {run}" + (f" peft.adapter={bad}" if adapter else ""),
        "generate": f"generate {load} --prompt Hi --max-new-tokens 1 --device cpu",
        "mg2hf": f"convert mg2hf {load} --out {out / 'hf'}" + (" --merge" if adapter else ""),
        "hf2mg": f"convert hf2mg --hf {bad} --out {out / 'mg'}",
        "verify": f"convert verify --hf {folders / 'hf'} {load} --level weights",
    }
    if adapter:
        commands["merge"] = f"convert merge --base {folders / 'hf'} --adapter {bad} --out {out / 'merged'}"
        commands["from the base"] = f"train --load {folders / 'hf'} {run} peft.adapter={bad}"
    return {name: text.split() for name, text in commands.items()}


@pytest.mark.parametrize(
    "kind, name",
    [("megatron", "model.safetensors"), ("megatron", "tokenizer.json"), ("adapter", "adapter_model.safetensors")],
)
def test_every_command_finds_it(folders, tmp_path, kind, name):
    file, what = flipped(folders / kind, tmp_path / "bad", random.Random(11), name)
    for command, argv in readers(folders, tmp_path / "bad", tmp_path / "out").items():
        outcome = run_forked(lambda argv=argv: main(argv), tmp_path / "log", seconds=60)
        assert outcome.code == 1 and "was changed: its sha256" in outcome.output, (command, what, outcome)
        assert str(file) in outcome.output and "Traceback" not in outcome.output, (command, outcome)
    assert not any((tmp_path / "out" / name).exists() for name in ("hf", "mg", "merged"))


def test_data_commands_find_it_in_the_processors_files(folders, tmp_path, capsys):
    """They read tokenizer and image settings of the model, and no weights."""
    shards = str(folders / "data" / "shards")
    views = {"check": [], "stats": [], "preview": ["--out", str(tmp_path / "page.html")]}
    for command, more in views.items():
        words = ["data", command, shards, "--seq-length", "96", *more, "--model"]
        assert main([*words, str(folders / "megatron")]) == 0
        file, what = flipped(folders / "megatron", tmp_path / "bad", random.Random(11), "tokenizer.json")
        capsys.readouterr()
        (tmp_path / "page.html").unlink(missing_ok=True)
        assert main([*words, str(tmp_path / "bad")]) == 1
        assert f"{file} was changed: its sha256" in capsys.readouterr().err, (command, what)
        assert not (tmp_path / "page.html").exists()


def test_digests_can_be_left_out(folders, tmp_path):
    shutil.copytree(folders / "megatron", tmp_path / "bad")
    path = tmp_path / "bad" / "hf" / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b"  ", b" \t", 1))
    from megatron_vlm.testing.commands import run

    commands = readers(folders, tmp_path / "bad", tmp_path / "out")
    off = {"train": "checkpoint.verify_hashes=false", "generate": "--no-verify-hashes", "mg2hf": "--no-verify-hashes"}
    for command, flag in off.items():
        done = run([*commands[command], flag])
        assert done.returncode == 0, (command, done)


def test_every_rank_learns_of_it(folders, tmp_path):
    """Two ranks share the files: the one that reads the changed file tells the other."""
    from megatron_vlm.testing.distributed import run_distributed
    from megatron_vlm.testing.runs import train

    file, _ = flipped(folders / "megatron", tmp_path / "bad", random.Random(3), "mp_rank_01_001/model.safetensors")
    argv = readers(folders, tmp_path / "bad", tmp_path / "out")["train"]
    for code, text in run_distributed(train, [*argv[1:], "--tensor-model-parallel-size", "2"], tp=2, timeout=60):
        assert code == 1 and f"{file} was changed" in text


def test_verify_compares_the_files_that_weights_were_made_from(folders, tmp_path, capsys):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    assert verify(tmp_path / "hf", folders / "megatron", level="weights").passed
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        good = (tmp_path / "hf" / name).read_bytes()
        flip_bit(tmp_path / "hf" / name, random.Random(5))
        assert not verify(tmp_path / "hf", folders / "megatron", level="weights").passed
        assert f"{name} is not the file that" in capsys.readouterr().out
        (tmp_path / "hf" / name).unlink()
        assert not verify(tmp_path / "hf", folders / "megatron", level="weights").passed
        assert f"{name} is absent" in capsys.readouterr().out
        (tmp_path / "hf" / name).write_bytes(good)
    # Other layouts and an export keep the record.
    hf2mg(folders / "megatron", tmp_path / "other", tp=1)
    assert verify(tmp_path / "hf", tmp_path / "other", level="weights").passed
    mg2hf(tmp_path / "other", tmp_path / "export", max_shard_size="50KB")
    assert verify(tmp_path / "export", folders / "megatron", level="weights").passed


def test_peft_reads_an_adapter_with_its_list(folders):
    from peft import PeftModel
    from transformers import Idefics2ForConditionalGeneration

    assert (folders / "adapter" / "megatron_vlm_files.json").is_file()
    model = PeftModel.from_pretrained(
        Idefics2ForConditionalGeneration.from_pretrained(folders / "hf"), folders / "adapter"
    )
    assert sum("lora_A" in name for name, _ in model.named_parameters()) > 0
