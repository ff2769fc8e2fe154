"""Small inputs of every format for the tests: pictures, records, tars."""

import io
import json
import tarfile

from PIL import Image

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset

COLOURS = ("red", "green", "blue", "navy", "olive", "teal")


def picture(number=0, size=(20, 12), kind="PNG"):
    """An encoded image; another one for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (size[0] + number, size[1]), COLOURS[number % len(COLOURS)]).save(buffer, kind)
    return buffer.getvalue()


def write_pictures(folder, number):
    """Writes ``0.png`` ... and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


def write_json(path, value):
    """Writes json, or jsonl by the name, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else json.dumps(value, indent=1))
    return path


def write_tar(path, members, **options):
    """Writes (name, content) as a tar and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT, **options}) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def records_of(format, *inputs, **settings):
    """Returns what is read: records, or DataErrors in their place."""
    return [found for source in open_sources(format, inputs, **settings) for _, _, found in read_source(source)]


def samples_of(folder):
    """Returns all samples of a built folder."""
    dataset = Dataset([folder])
    samples = [dataset.read(i) for i in range(len(dataset))]
    for i, sample in enumerate(samples):
        text = dataset.read_text(*dataset.locate_one(i))
        assert (text.key, text.turns, text.image_names) == (sample.key, sample.turns, sample.image_names)
    dataset.close()
    return samples


def built(folder, format, *inputs, sources=None, **options):
    """Builds ``folder`` and returns (manifest, samples)."""
    settings = {k: options.pop(k) for k in ("root", "prepend", "video", "repeat", "part") if k in options}
    manifest = build_shards(open_sources(format, inputs, **settings), folder, **options)
    return manifest, samples_of(folder)
