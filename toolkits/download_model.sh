#!/bin/sh
# Downloads a model of the Hugging Face hub to a folder. Run it again after an interruption: it goes on where it stopped, and
# what is there already is not fetched again.
#   sh toolkits/download_model.sh REPO DIR [--revision R] [--include PATTERN ...] [--exclude PATTERN ...]
#   sh toolkits/download_model.sh OpenGVLab/InternVL3-8B models/InternVL3-8B
# HF_TOKEN, HF_ENDPOINT and the library's other variables hold. Torch's .bin files are left out where safetensors are offered.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
[ ! -x "$here/.venv/bin/python" ] || PATH="$here/.venv/bin:$PATH"
command -v python >/dev/null 2>&1 || { echo "download_model: no python; make the environment first: sh toolkits/setup_env.sh" >&2; exit 1; }

exec python - "$@" <<'PY'
import argparse
import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path

parser = argparse.ArgumentParser(prog="download_model.sh")
parser.add_argument("repo", metavar="REPO", help="owner/name on the hub")
parser.add_argument("directory", metavar="DIR", help="where its files go")
parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: main)")
parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only these files")
parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="not these")
args = parser.parse_args()
args.directory = os.path.expanduser(os.path.expandvars(args.directory))

from huggingface_hub import HfApi, snapshot_download

try:
    names = HfApi().list_repo_files(args.repo, revision=args.revision)
    exclude = list(args.exclude)
    if any(name.endswith(".safetensors") for name in names):
        exclude += [name for name in names if fnmatch(name, "*.bin") or name.endswith((".bin.index.json", ".pth"))]
    snapshot_download(
        args.repo, revision=args.revision, local_dir=args.directory, allow_patterns=args.include, ignore_patterns=exclude
    )
except Exception as error:  # of the network, the hub or the disk: all of them say what happened
    sys.exit(f"download_model: {args.repo}: {type(error).__name__}: {error}\nrun the same command again to go on from here")

folder, missing = Path(args.directory), []
for index in folder.glob("*.index.json"):
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing += sorted(shard for shard in shards if not (folder / shard).is_file())
if missing and not args.include:
    sys.exit(f"download_model: the index names files that the hub does not have: {', '.join(missing)}")
print(f"{args.repo} -> {folder}")
PY
