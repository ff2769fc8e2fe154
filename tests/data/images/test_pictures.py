"""Images are refused by their header before pixels are decoded, and broken pixels are named."""

import io
import struct
import weakref
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import pictures
from megatron_vlm.data.images.pictures import (
    StoredImages,
    decode_image,
    normalise_table,
    open_image,
    pad_to_square,
    probe_image,
)
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError, Reason

CHINA = Image.fromarray(load_sample_image("china.jpg"))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG of a few bytes that claims any size."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + ihdr
        + struct.pack(">I", zlib.crc32(ihdr))
        + b"\0\0\0\x0aIDAT"
        + bytes(14)
    )


@pytest.mark.parametrize(
    "kind, extension", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]
)
def test_formats(kind, extension):
    data = encoded(CHINA.resize((30, 20)), kind)
    assert probe_image(data) == (extension, 30, 20)
    assert decode_image(data).mode == "RGB"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a readable"),
        (b"not an image", "not a readable"),
        (b"%PDF-1.4", "not a readable"),
        (encoded(CHINA.resize((30, 20)), "TIFF"), "not a readable"),
        (png_header(100_000, 2), "limits are"),
        (png_header(10_000, 10_000), "limits are"),
        (png_header(65_000, 65_000), "refused"),
        (png_header(2000, 5), "200 times"),
        (encoded(CHINA, "JPEG")[:4000], "decoded"),
        (encoded(CHINA, "PNG")[:4000], "decoded"),
        (encoded(CHINA.convert("I;16"), "PNG"), "8 bits"),
        (encoded(CHINA.resize((9, 9)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9))]), "animated"),
    ],
)
@pytest.mark.parametrize("read", [decode_image, probe_image])
def test_refused_by_name(data, message, read):
    with pytest.raises(DataError, match=message) as caught:
        read(data, "image cat.png")
    assert "image cat.png" in str(caught.value)


def test_header_limits_come_before_decoding():
    with pytest.raises(DataError):
        open_image(png_header(16_000, 16_000))  # 768 MB of pixels that are not there


def test_exif_turns_the_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(CHINA.resize((60, 20)), "JPEG", exif=exif)
    assert probe_image(data) == ("jpg", 20, 60)
    assert decode_image(data).size == (20, 60)


def test_normalise_table_is_the_plain_formula():
    table = normalise_table(1 / 255, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    expected = (np.arange(256) / 255 - np.array([[0.5], [0.4], [0.3]])) / np.array([[0.5], [0.2], [0.1]])
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=1e-6)


def test_a_padded_image_by_hand():
    padded = np.asarray(pad_to_square(Image.new("RGB", (4, 2), (1, 2, 3)), (122, 116, 104)))
    assert padded.shape == (4, 4, 3)
    assert [tuple(row[0]) for row in padded] == [(122, 116, 104), (1, 2, 3), (1, 2, 3), (122, 116, 104)]
    tall = np.asarray(pad_to_square(Image.new("RGB", (1, 4), (1, 2, 3)), (122, 116, 104)))
    assert [tuple(pixel) for pixel in tall[0]] == [(122, 116, 104), (1, 2, 3), (122, 116, 104), (122, 116, 104)]


@pytest.mark.parametrize("kind, extension", [("AVIF", "avif"), ("HEIF", "heic")])
def test_pictures_of_phones_and_browsers(kind, extension):
    """AVIF is Pillow's own, HEIC comes with the extra ``heif``."""
    image = CHINA.resize((64, 40))
    data = encoded(image, kind, quality=95)
    assert probe_image(data) == (extension, 64, 40)
    difference = np.asarray(decode_image(data), dtype=int) - np.asarray(image, dtype=int)
    assert abs(difference).mean() < 6
    with pytest.raises(DataError, match=r"cannot be decoded|not a readable"):
        decode_image(data[: len(data) // 2])


def test_what_is_no_picture_is_called_by_its_name(monkeypatch):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    with pytest.raises(
        DataError, match=r"a.png is a Git LFS pointer, not the file itself: run `git lfs pull`"
    ) as caught:
        open_image(pointer, "a.png")
    assert caught.value.reason is Reason.UNREADABLE_IMAGE
    heic = encoded(CHINA.resize((64, 40)), "HEIF")
    monkeypatch.setattr("megatron_vlm.data.images.pictures._KNOWN", ("PNG", "JPEG"))
    with pytest.raises(DataError, match=r"a HEIC picture, which needs pillow-heif: pip install 'megatron_vlm\[heif\]'"):
        open_image(heic)
    with pytest.raises(DataError, match="not a readable PNG or JPEG image"):
        open_image(b"what")


def test_images_of_a_sample_are_decoded_one_at_a_time(make_processor, monkeypatch):
    """A sample of a thousand frames would fill the memory of a worker."""
    seen: list[weakref.ref] = []

    def decoded(data, name):
        assert sum(image() is not None for image in seen) < 2, "images are held while the next is decoded"
        image = decode_image(data, name)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr(pictures, "decode_image", decoded)
    file = encoded(CHINA.resize((20, 10)), "PNG")
    processor = make_processor(DataConfig(seq_length=100))
    turns = [Turn(role="user", text="<image>" * 5), Turn(role="assistant", text="ok")]
    sample = processor.encode("a", turns, StoredImages([file] * 5, list("abcde"), [(20, 10)] * 5))
    assert len(sample.pixels) == len(seen) == 5
    with pytest.raises(DataError, match=r"image b is \(20, 10\), its index says \(9, 9\): build the folder again"):
        StoredImages([file] * 2, list("ab"), [(20, 10), (9, 9)])[1]


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_at_a_fraction_where_they_are_resized_to_less(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    CHINA.save(buffer, "JPEG", quality=90, exif=exif)
    file, upright = buffer.getvalue(), CHINA.size if orientation == 1 else CHINA.size[::-1]
    plain = StoredImages([file], ["a"], [upright])[0]
    made = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (made.append(self.size), load(self))[1])

    def scaled():
        return StoredImages([file], ["a"], [upright], scaled=True)[0]

    small = (upright[0] // 5, upright[1] // 5)
    image = scaled()
    assert image.size == upright and not made  # nothing is decoded to know it
    ours, exact = (np.asarray(x.resize(small, Image.Resampling.BICUBIC)).astype(int) for x in (image, plain))
    assert made[0] == (CHINA.width // 4, -(-CHINA.height // 4)) and ours.shape == exact.shape
    assert 0 < np.abs(ours - exact).mean() < 3  # of 255: the same picture, other pixels
    large = (upright[0] * 3 // 4, upright[1])  # more than a half: all of it is needed
    assert scaled().resize(large).tobytes() == plain.resize(large).tobytes()
    for use in (np.asarray, lambda x: x.crop((3, 4, 90, 80)), lambda x: x.transpose(Image.Transpose.TRANSPOSE)):
        assert (np.asarray(use(scaled())) == np.asarray(use(plain))).all()
    square = pad_to_square(scaled(), (1, 2, 3)), pad_to_square(plain, (1, 2, 3))
    assert square[0].tobytes() == square[1].tobytes()
    png = encoded(CHINA.resize((40, 20)), "PNG")
    assert not isinstance(StoredImages([png], ["a"], [(40, 20)], scaled=True)[0], pictures._Scaled)
    with pytest.raises(DataError, match="image a cannot be decoded"):
        StoredImages([file[:9000]], ["a"], [upright], scaled=True)[0].resize(small)
    with pytest.raises(DataError, match="its index says"):
        StoredImages([file], ["a"], [(9, 9)], scaled=True)[0]
