"""Pages: hostile texts stay texts, nothing is fetched, small pictures are shown large."""

import base64
import io
import re

from PIL import Image

from megatron_vlm.pages import escape, page, picture, table

EVIL = "\"'><script>alert(1)</script>\ud800"


def test_hostile_texts_stay_texts():
    text = page(EVIL, table([EVIL], [[EVIL, 3]]) + picture(Image.new("RGB", (4, 4)), EVIL), renew_seconds=5)
    assert "<script" not in text and text.count(escape(EVIL)) == 4 and "default-src 'none'" in text
    assert 'http-equiv="refresh" content="5"' in text and "refresh" not in page("a", "")
    text.encode()


def test_pictures():
    for size, shown in (((28, 20), (168, 120)), ((300, 10), (300, 10)), ((640, 320), (320, 160))):
        html = picture(Image.new("RGB", size, "red"))
        assert tuple(map(int, re.findall(r'(?:width|height)="(\d+)"', html))) == shown
        data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
        assert Image.open(io.BytesIO(data)).size == (
            size if max(size) <= 320 else shown
        )  # small ones are enlarged by the browser
