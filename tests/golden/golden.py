"""The golden record: what no change of structure may change, made at any commit and compared with another one.

    python tests/golden/golden.py record OUT.json [--root CHECKOUT] [--only PART ...]
    python tests/golden/golden.py compare BEFORE.json AFTER.json         exit 0 when equal, else 1 and the differences

parts:
  help        help texts of all commands
  recipes     every packaged recipe, resolved
  data        bytes of a data folder, the order of a mixture, how it is packed, token ids and labels
  conversion  bytes of hf2mg at tp 2 x pp 2 and of mg2hf, for every family
  training    every family at tp 1, tp 2 with sequence parallel and pp 2, with LoRA, with LoRA on NF4: losses and gradient norms
              of 5 updates, and the weights or the adapter exported at the end

``--root`` records a checkout of another commit with this script: it names the package's functions alone, and finds the file that
each stands in today. Floating point differs between processors: records are compared on one machine, none is kept.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAMILIES = ("idefics2", "idefics2_llama3", "internvl3", "llava_internlm2", "internlm2", "xcomposer2")
COMMANDS = (
    "", "launch", "train", "generate", "convert", "convert hf2mg", "convert mg2hf", "convert merge", "convert pth2hf",
    "convert verify", "data", "data build", "data check", "data stats", "data preview",
    "recipe", "recipe list", "recipe show", "recipe copy",
)  # fmt: skip
LORA = "peft.target_modules=all-linear peft.r=4"
LAYOUTS: dict[str, tuple[dict[str, int], str]] = {
    "tp1": ({}, ""),
    "tp2 sequence parallel": ({"tp": 2}, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": ({"pp": 2}, "--pipeline-model-parallel-size 2"),
    "lora": ({}, LORA),
    "nf4": ({}, f"{LORA} peft.quantize=nf4"),
}
UPDATES = 5


def find(name: str, outside: tuple[str, ...] = ()) -> Any:
    """The function or class of the package that is defined under ``name``, in whichever file (but not below ``outside``)."""
    root = Path(importlib.import_module("megatron_vlm").__file__ or "").parent
    pattern = re.compile(rf"^(?:def|class) {name}\b", re.M)
    files = [path for path in sorted(root.rglob("*.py")) if pattern.search(path.read_text(encoding="utf-8"))]
    files = [path for path in files if not set(outside) & set(path.relative_to(root).parts)]
    if len(files) != 1:
        raise SystemExit(f"golden: {name} is defined in {len(files)} files of {root}: {[str(f) for f in files]}")
    parts = files[0].relative_to(root.parent).with_suffix("").parts
    return getattr(importlib.import_module(".".join(parts).removesuffix(".__init__")), name)


def command(*argv: str) -> tuple[int, str]:
    """Exit code and output of ``megatron-vlm argv``, in this process."""
    main, out = importlib.import_module("megatron_vlm.cli.main").main, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(list(argv))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue()


def must(*argv: str) -> str:
    """The output of a command that has to succeed."""
    code, out = command(*argv)
    if code:
        raise SystemExit(f"golden: megatron-vlm {' '.join(argv)} ended with {code}:\n{out}")
    return out


def digests(folder: Path, hidden: dict[str, str]) -> dict[str, str]:
    """Digest of every file below ``folder``; in text files, the places of this run (values of ``hidden``) are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".txt"):
                for place, name in hidden.items():
                    data = data.replace(place.encode(), name.encode())
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()[:24]
    return found


def write_model(family: str, folder: Path) -> Path:
    """The tiny twin of a family."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if family == "idefics2_llama3":
            find("write_tiny_idefics2")(folder, text="llama", layers=4)
        elif family == "idefics2":
            find("write_tiny_idefics2")(folder, layers=4)
        else:
            find(f"write_tiny_{family}")(folder)
    return folder


# ---- the parts: each yields (what, value) ----


def help_part(work: Path) -> Iterator[tuple[str, Any]]:
    """Help texts; width of the terminal fixed."""
    os.environ["COLUMNS"] = "120"
    for words in COMMANDS:
        yield words or "megatron-vlm", command(*words.split(), "--help")[1]


def recipes_part(work: Path) -> Iterator[tuple[str, Any]]:
    """The resolved config of each recipe, and its text."""
    resolve = find("resolve", outside=("data", "models"))
    for name in [line.split()[0] for line in must("recipe", "list").splitlines()]:
        yield f"{name} text", must("recipe", "show", name)
        argv = f"--config {name} --load MODEL --data-path DATA --save SAVE --dry-run --device cpu --world-size 8"
        config, notes = resolve([*argv.split(), "--global-batch-size", "128"])
        yield name, [config.to_dict(), list(notes)]


def data_part(work: Path) -> Iterator[tuple[str, Any]]:
    """Two sources of 40 and 23 samples in shares of 2 to 1, packed in rows of 160 tokens, over one and a half epochs."""
    write_shards, rows = find("write_shards"), find("RowLoader")
    one, two = write_shards(work / "one", 40, seed=1), write_shards(work / "two", 23, seed=2)
    hidden = {str(work): "WORK"}
    yield "folder", digests(one, hidden)
    model = write_model("idefics2", work / "hf")
    config = find("DataConfig").from_dict(
        {
            "train": [{"path": str(one), "weight": 2.0}, {"path": str(two), "weight": 1.0}],
            "seq_length": 160, "shortest_edge": 24, "num_workers": 0, "packing": True, "slice_size": 4,
        }
    )  # fmt: skip
    processor = find_family("idefics2").processor(model, config)
    loader = rows(
        config, processor, paths=config.train, seed=7, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    try:
        for step in range(12):
            made = loader.next_step()
            yield (
                f"step {step}",
                [
                    [row.keys, row.input_ids.tolist(), row.labels.tolist(), row.cu_seqlens.tolist(), len(row.pixels)]
                    for row in made.rows
                ],
            )
            yield f"state {step}", made.state.to_dict()
    finally:
        loader.close()


def find_family(name: str) -> Any:
    """FamilySpec of a family."""
    root = Path(importlib.import_module("megatron_vlm").__file__ or "").parent
    place = "megatron_vlm.registry" if (root / "registry.py").exists() else "megatron_vlm.models.registry"
    return importlib.import_module(place).get(name)


def conversion_part(work: Path) -> Iterator[tuple[str, Any]]:
    """Both directions; mg2hf from tp 2 x pp 2."""
    hidden = {str(work): "WORK"}
    for family in FAMILIES:
        model = write_model(family, work / family)
        size = ["--family", family, "--hf", str(model), "--make-vocab-size-divisible-by", "8"]
        must("convert", "hf2mg", *size, "--out", str(work / f"{family}-mg"), "--tp", "2", "--pp", "2")
        yield f"{family} hf2mg", digests(work / f"{family}-mg", hidden)
        must("convert", "mg2hf", "--load", str(work / f"{family}-mg"), "--out", str(work / f"{family}-back"))
        yield f"{family} mg2hf", digests(work / f"{family}-back", hidden)


def training_part(work: Path) -> Iterator[tuple[str, Any]]:
    """Every family in every layout."""
    run, train = find("run_distributed"), find("train")
    images = find("write_shards")(work / "images", 24, seed=3)
    text = write_text_shards(work / "text")
    for family in FAMILIES:
        model = write_model(family, work / family)
        for layout, (ranks, flags) in LAYOUTS.items():
            out = work / f"{family}-{layout}".replace(" ", "-")
            argv = (
                f"--load {model} --data-path {text if family == 'internlm2' else images} --seq-length 1024 --micro-batch-size 2 "
                f"--global-batch-size 4 --lr 1e-3 --lr-decay-iters 10 --num-workers 0 --device cpu --no-tensorboard "
                f"--log-interval 1 --output-dir {out} --save {out} --make-vocab-size-divisible-by 8 "
                f"--train-iters {UPDATES} {flags}"
            )
            results = run(train, argv.split(), timeout=300, **ranks)
            if any(result != (0, "") for result in results):
                raise SystemExit(f"golden: {family} {layout}: {results}")
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            yield (
                f"{family} {layout} updates",
                [[repr(line[key]) for key in ("loss", "grad_norm")] for line in lines if "loss" in line],
            )
            adapts = ["--adapter-only"] if "peft" in flags else []
            must("convert", "mg2hf", "--load", str(out), "--out", str(out / "export"), *adapts)
            yield f"{family} {layout} weights", weights(out / "export")


def weights(folder: Path) -> dict[str, str]:
    """Digest of every exported tensor."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            raw = tensor.contiguous().flatten().view(-1).numpy().tobytes()
            found[name] = f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()[:16]}"
    return found


def write_text_shards(folder: Path) -> Path:
    """24 conversations without images."""
    folder.mkdir(parents=True)
    records = []
    for i in range(24):
        turns = [("human", f"What is {i}?"), ("gpt", " ".join(["one two"] * (1 + i % 5)))]
        records.append({"id": str(i), "conversations": [{"from": who, "value": text} for who, text in turns]})
    (folder / "records.json").write_text(json.dumps(records))
    must("data", "build", "--format", "llava", "--input", str(folder / "records.json"), "--out", str(folder / "shards"))
    return folder / "shards"


PARTS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "help": help_part, "recipes": recipes_part, "data": data_part, "conversion": conversion_part, "training": training_part,
}  # fmt: skip


def record(only: list[str]) -> dict[str, Any]:
    """Makes the record: "part: what" -> value."""
    made: dict[str, Any] = {}
    for part in only:
        with tempfile.TemporaryDirectory() as folder:
            for what, value in PARTS[part](Path(folder)):
                made[f"{part}: {what}"] = json.loads(json.dumps(value, default=str).replace(folder, "WORK"))
                print(f"{part}: {what}", flush=True)
    return made


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each difference."""
    lines = [f"only in one record: {what}" for what in sorted(before.keys() ^ after.keys())]
    for what in before.keys() & after.keys():
        lines += [f"{what}{place}" for place in _differences(before[what], after[what], "")]
    return sorted(lines)


def _differences(a: Any, b: Any, place: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key, "(absent)"), b.get(key, "(absent)"), f"{place}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b)):
            yield from _differences(x, y, f"{place}[{number}]")
    elif isinstance(a, str) and isinstance(b, str) and "\n" in a + b and a != b:
        old, new = a.splitlines(), b.splitlines()
        yield from (f"{place} - {line}" for line in old if line not in new)
        yield from (f"{place} + {line}" for line in new if line not in old)
        if sorted(old) == sorted(new):
            yield f"{place}: the same lines in another order"
    elif a != b:
        yield f"{place}: {str(a)[:120]} -> {str(b)[:120]}"


def main() -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record")
    making.add_argument("out", type=Path)
    making.add_argument(
        "--root", type=Path, default=Path(__file__).parents[2], help="checkout to record (default: this one)"
    )
    making.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(args.root.resolve()))
        sys.path.insert(0, str(args.root.resolve()))
        args.out.write_text(json.dumps(record(args.only), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (args.before, args.after))
    lines = compare(before, after)
    print("\n".join(lines) if lines else f"equal: {len(before)} entries")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
