"""Real long samples without a download: documents of Python's own docstrings, and videos of scikit-learn's handwritten digits.

    docstrings of the standard library --> OUT/documents.json   LLaVA records: a long text and what it is about
    load_digits (1,797 scans)          --> OUT/videos/N.mp4 + OUT/videos.json   scans one after the other, and which they are

A video is an MP4 file where PyAV is installed (`pip install 'megatron_vlm[video]'`), else a folder of frames.
"""

import argparse
import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, FRAMES, HELD = 32, 12, 4  # pixels a side, scans of a video, frames that show each
MODULES = (
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "functools",
    "json",
    "logging",
    "random",
    "statistics",
    "threading",
)


def docstrings(module: str, length: int) -> str:
    """The docstrings of a module's classes and functions, of about ``length`` characters."""
    found, opened = [], importlib.import_module(module)
    for name, value in sorted(vars(opened).items()):
        for inner, part in ((name, value), *(sorted(vars(value).items()) if inspect.isclass(value) else ())):
            if callable(part) and (text := inspect.getdoc(part)):
                found.append(f"{name}.{inner}: {text}")
    return "\n".join(found)[:length]


def write_video(path: Path, pictures: list[Image.Image]) -> str:
    """Writes an MP4 file, or where there is no encoder a folder of frames; returns its name."""
    try:
        import av
    except ImportError:
        path.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(path / f"{number}.png")
        return path.name
    with av.open(str(path.with_suffix(".mp4")), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path.with_suffix(".mp4").name


def record(key: str, question: str, answer: str, **more: str) -> dict:
    """One LLaVA record."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": key, **more, "conversations": said}


def main() -> None:
    """Writes both."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=4500, help="of a document")
    parser.add_argument("--videos", type=int, default=40)
    args = parser.parse_args()
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    texts = {module: docstrings(module, args.characters) for module in MODULES}
    documents = [record(name, f"{text}\nWhich module is this?", name) for name, text in texts.items()]
    (args.out / "documents.json").write_text(json.dumps(documents, indent=1), encoding="utf-8")
    digits, videos = load_digits(), []
    for number in range(args.videos):
        shown = range(number * FRAMES, (number + 1) * FRAMES)
        scans = [Image.fromarray((digits.images[i] * (255 / 16)).astype("uint8")).convert("RGB") for i in shown]
        frames = [scan.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for scan in scans for _ in range(HELD)]
        name = write_video(args.out / "videos" / str(number), frames)
        said = " ".join(WORDS[digits.target[i]] for i in shown)
        videos.append(record(str(number), "<video>\nWhich digits are shown, in order?", said, video=f"videos/{name}"))
    (args.out / "videos.json").write_text(json.dumps(videos, indent=1), encoding="utf-8")
    print(
        f"{len(documents)} documents of up to {max(map(len, texts.values())):,} characters, {len(videos)} videos",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
