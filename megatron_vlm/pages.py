"""Self-contained HTML pages, of which nothing may run or reach out, whatever their texts, names and pictures are.

page(title, body) = policy + style + body;  escape(text);  picture(image, caption);  table(head, rows)
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from megatron_vlm.errors import printable

_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)
# Whoever reads Chinese, Japanese or Korean has one of these fonts.
_FONTS = (
    'system-ui,-apple-system,"Segoe UI","Noto Sans","PingFang SC","Microsoft YaHei","Noto Sans CJK SC","Source Han Sans SC",'
    '"WenQuanYi Micro Hei",sans-serif'
)
_STYLE = f"""
body{{font:15px/1.5 {_FONTS};margin:2em auto;max-width:72em;padding:0 1em;color:#222;background:#fafafa}}
h1{{font-size:1.4em}}h2{{font-size:1.1em;margin:2em 0 .4em}}h3{{font-size:1em;margin:0 0 .4em}}
.card{{background:#fff;border:1px solid #ddd;border-left:6px solid;border-radius:4px;padding:.8em 1em;margin:.8em 0}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6em;border-radius:4px}}
.images{{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-end;margin:.6em 0}}
figure{{margin:0}}figcaption{{font-size:12px;color:#666;overflow-wrap:anywhere}}
img{{border:1px solid #888;display:block;image-rendering:pixelated}}
img.large{{image-rendering:auto}}img.own{{border:2px dashed #aaa}}
table{{border-collapse:collapse;margin:.6em 0}}td,th{{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}}
td{{overflow-wrap:anywhere}}th{{color:#555;font-weight:600}}
.counts{{color:#555}}.bad{{color:#b00020}}
"""
_LARGEST, _SMALLEST = 320, 160  # pixels of a picture's longer edge on the page


def escape(text: object) -> str:
    """Text as it may stand anywhere in a page, attributes included."""
    return html.escape(printable(str(text)))


def page(title: str, body: str, *, style: str = "", renew_seconds: int | None = None) -> str:
    """Returns the page.

    Args:
        title, body: the title is escaped here, the body is HTML.
        style: further rules of CSS.
        renew_seconds: the browser reads the file again so often; None: never.
    """
    renew = f'<meta http-equiv="refresh" content="{renew_seconds}">' if renew_seconds else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_POLICY}{renew}'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style><body>{body}</body></html>\n"
    )


def picture(image: Image.Image, caption: str = "", kind: str = "") -> str:
    """A figure: large images shrunk, small ones shown larger, pixel by pixel; ``kind`` is its class."""
    small = image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")
    if max(image.size) > _LARGEST:
        small = small.copy()
        small.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    small.save(file, "PNG")
    times = max(1, -(-_SMALLEST // max(small.size)))
    kind = f"{kind} large".strip() if max(image.size) > _LARGEST else kind
    return (
        f'<figure><img class="{kind}" alt="" width="{small.width * times}" height="{small.height * times}" '
        f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain values, escaped here; an empty ``head`` leaves that line out."""
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f"<table>{top}{lines}</table>"
