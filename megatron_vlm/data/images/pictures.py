"""Images: opened by header with limits checked before any pixel is decoded; decoded upright, as 8-bit RGB; resized, normalised.

Cutting them into tiles: ``tiling.py``.
"""

import contextlib
import io
import math
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from megatron_vlm.data.file_kinds import what_it_is
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import describe, open_regular

EXTENSIONS = {
    "PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "AVIF": "avif", "HEIF": "heic",
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")  # an MPO file (phones) opens as JPEG, its first frame
MAX_BYTES = 64 * 2**20
MAX_SIDE = 16_384
MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
JPEG_QUALITIES = (75, 100)
_UPRIGHT_SWAPS = (5, 6, 7, 8)  # values of the EXIF orientation that turn an image by 90 degrees
_ORIENTATION = 0x0112
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_unreadable = partial(DataError, reason=Reason.UNREADABLE_IMAGE)
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, OverflowError)
Image.init()  # plugins are listed once, not in the first worker's first image
with contextlib.suppress(ImportError):  # the extra `heif`; AVIF is Pillow's own
    import pillow_heif

    pillow_heif.register_heif_opener()
_KNOWN = tuple(name for name in FORMATS if name in Image.OPEN)


def read_image_file(path: str | Path) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        DataError: unreadable, not a regular file (a device or pipe is never waited for), or beyond the limit of bytes.
    """
    try:
        with open_regular(path, DataError) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise _unreadable(f"image {describe(path)} has {size} bytes, the limit is {MAX_BYTES}")
            return file.read(MAX_BYTES + 1)
    except DataError as error:
        if error.reason is Reason.UNREADABLE_IMAGE:
            raise
        message = error.message.replace("cannot read", "cannot read image", 1)
        raise DataError(message, reason=Reason.MISSING_IMAGE) from error
    except OSError as error:
        message = f"cannot read image {describe(path)}: {error.strerror}"
        raise DataError(message, reason=Reason.MISSING_IMAGE) from error


def open_image(data: bytes, name: str = "image") -> Image.Image:
    """Opens an encoded image without decoding it.

    Raises:
        DataError: not a readable picture of one of FORMATS, animated, 16-bit, or beyond a limit (numbers shown).
    """
    if len(data) > MAX_BYTES:
        raise _unreadable(f"{name} has {len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=_KNOWN)
    except Image.DecompressionBombError as error:
        raise _unreadable(f"{name} is refused: {error}") from error
    except _DECODE_ERRORS as error:
        raise _unreadable(f"{name} is {_not_an_image(data)}") from error
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _unreadable(f"{name} is {width} x {height}, the limits are {MAX_SIDE} a side and {MAX_PIXELS} pixels")
    if not width or not height or max(width, height) > MAX_ASPECT * min(width, height):
        raise _unreadable(f"{name} is {width} x {height}, the longer side may be {MAX_ASPECT} times the shorter one")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _unreadable(f"{name} is animated: give single frames")
    if image.mode.startswith(("I", "F")):
        raise _unreadable(f"{name} has pixels of mode {image.mode}: convert it to 8 bits a channel")
    return image


def _not_an_image(data: bytes) -> str:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _HEIF_BRANDS and "HEIF" not in _KNOWN:
        return "a HEIC picture, which needs pillow-heif: pip install 'megatron_vlm[heif]', or convert it"
    if brand == b"avif" and "AVIF" not in _KNOWN:
        return "an AVIF picture, which this build of Pillow does not read: install Pillow's wheel, or convert it"
    return what_it_is(data) or f"not a readable {', '.join(_KNOWN[:-1])} or {_KNOWN[-1]} image"


def decode_image(data: bytes, name: str = "image", least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image upright, as RGB.

    Args:
        data, name: of the file.
        least: (width, height) that are enough: of a JPEG only a half, a quarter or an eighth of the pixels of a side are made
            where that is no less. None: all.

    Raises:
        DataError: as ``open_image``, or broken pixel data.
    """
    image = open_image(data, name)
    try:
        if least is not None:
            image.draft(None, least[::-1] if _turned(image) else least)
        return upright_rgb(image)
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _unreadable(f"{name} cannot be decoded: {error}") from error


class _Scaled(Image.Image):
    """A JPEG of its full size to whoever asks, whose pixels are made when needed; for ``resize``, as many as that needs."""

    def __init__(self, data: bytes, name: str, size: tuple[int, int]):
        super().__init__()
        self._size, self._mode, self._file = size, "RGB", (data, name)

    def resize(self, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        return decode_image(*self._file, least=tuple(size)).resize(size, *args, **kwargs)

    def load(self) -> Any:
        if self._im is None:
            self.im = decode_image(*self._file).im
        return super().load()


class StoredImages(Sequence[Image.Image]):
    """The images of a sample, each decoded when it is asked for: those of a long one fill no memory all at once.

    Args:
        files, names: encoded, and what each is called.
        sizes: [(width, height)] of each upright, as its index says.
        scaled: JPEGs are decoded at a fraction of their sides where they are resized to less (``data.jpeg_scaled_decoding``).

    Indexing raises DataError as ``decode_image``, or where an image has another size.
    """

    def __init__(
        self, files: Sequence[bytes], names: Sequence[str], sizes: Sequence[tuple[int, int]], *, scaled: bool = False
    ):
        self.files, self.names, self.sizes, self.scaled = files, names, sizes, scaled

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: Any) -> Any:
        name, file = f"image {self.names[number]}", self.files[number]
        if self.scaled and file[:2] == b"\xff\xd8":
            image: Image.Image = _Scaled(file, name, _upright_size(open_image(file, name)))
        else:
            image = decode_image(file, name)
        if image.size != tuple(self.sizes[number]):
            raise _unreadable(f"{name} is {image.size}, its index says {self.sizes[number]}: build the folder again")
        return image


def _turned(image: Image.Image) -> bool:
    """Upright, its width is its height."""
    return image.getexif().get(_ORIENTATION) in _UPRIGHT_SWAPS


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size[::-1] if _turned(image) else image.size


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF orientation says and converts it to RGB, as transformers' processors do.

    Their ``load_image`` drops an alpha channel without blending; a transparent colour (of a palette, say) outlives it and
    is then blended with white by ``convert_to_rgb``.
    """
    image.load()
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)  # without an orientation this would copy every pixel
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image


def probe_image(data: bytes, name: str = "image") -> tuple[str, int, int]:
    """Checks that an image decodes, at the lowest cost, and returns (file extension, width, height) of it upright.

    Raises:
        DataError: as ``decode_image``.
    """
    image = open_image(data, name)
    width, height = image.size
    extension = EXTENSIONS[image.format or "PNG"]
    try:
        image.draft(None, (1, 1))  # a JPEG's whole stream is still read, but only an eighth of its pixels are made
        image.load()
        turned = _turned(image)
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _unreadable(f"{name} cannot be decoded: {error}") from error
    return (extension, height, width) if turned else (extension, width, height)


def normalise_table(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Returns float32 [C, 256]: what rescaling and normalising makes of each 8-bit value.

    The operations and their dtypes are those of transformers' ``rescale`` (float64, then float32) and ``normalize``
    (float32), so looking a value up gives their result bit for bit.
    """
    rescaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * rescale).astype(np.float32)
    means, stds = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    return (rescaled[None] - means[:, None]) / stds[:, None]


def normalise(images: Sequence[Image.Image], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Looks the values of RGB images of one width up in a ``normalise_table``.

    Returns:
        float32 [3, sum of heights, width], one image below the other.
    """
    pixels = np.empty((3, sum(image.height for image in images), images[0].width), dtype=np.float32)
    top = 0
    for image in images:
        values = np.asarray(image)
        for channel, row in enumerate(table):
            out = pixels[channel, top : top + image.height]
            np.take(row, values[:, :, channel], out=out, mode="clip")  # clip: without a buffer for ``out``
        top += image.height
    return pixels


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centres an image on a square of its longer side."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_and_crop(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Resizes the shorter edge to ``side``, rounded down as transformers does, and cuts out the middle."""
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.resize(size, resample=resample).crop((left, top, left + side, top + side))


def size_within(width: int, height: int, longest: int, shortest: int) -> tuple[int, int]:
    """Width and height after resizing between two edges, rounded as transformers' ``get_resize_output_image_size`` does."""
    aspect_ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect_ratio)
    elif height > width and height > longest:
        width, height = int(longest * aspect_ratio), longest
    return max(width, shortest), max(height, shortest)


def size_of_longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height with the longer edge at ``longest``, the other one even, as transformers' Idefics3 resizes."""
    aspect_ratio = width / height
    if width >= height:
        height = int(longest / aspect_ratio)
        return longest, max(1, height + height % 2)
    width = int(longest * aspect_ratio)
    return max(1, width + width % 2), longest


def size_of_blocks(width: int, height: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Columns and rows of blocks of ``unit`` x ``unit`` pixels that an image is resized to: near its own size, its area between
    ``least`` and ``most`` pixels. Source: transformers 5.23, models/qwen2_vl/image_processing_qwen2_vl.py, ``smart_resize``.
    """
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > most:
        shrink = math.sqrt((height * width) / most)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * columns * unit**2 < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
    return columns, rows


def quarters(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Returns the boxes (left, top, right, bottom) of the four quarters of an image, row by row."""
    x, y = width // 2, height // 2
    return [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]


def degrade(image: Image.Image, draw: random.Random) -> Image.Image:
    """The image after JPEG compression of a random quality."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=draw.randint(*JPEG_QUALITIES))
    return Image.open(buffer).convert("RGB")
