"""The corpus of malformed inputs of test_malformed: (name, input file, its bytes, what comes of it).

``OK`` says that the samples are read, any other pattern what the report says.
"""

import gzip
import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

OK = "read"
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PLAIN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
GOOD = {"image": "good.png", "conversations": TALK}
LINE = json.dumps(GOOD)


def talk(**changes):
    return json.dumps({**GOOD, **changes})


def said(*values, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


# --- files as a whole, as LLaVA json ---------------------------------------------------------------------------------
FILES = {
    "empty": (b"", r"expected '\["),
    "only_space": (b" \n\t ", r"expected '\["),
    "only_bom": (b"\xef\xbb\xbf", r"expected '\["),
    "empty_array": (b"[]", "no records"),
    "zero_bytes": (bytes(4096), r"expected '\["),
    "object": (LINE.encode(), r"expected '\["),
    "text": (b"hello", r"expected '\["),
    "utf16": (f"[{LINE}]".encode("utf-16"), "not UTF-8"),
    "utf16_without_bom": (f"[{LINE}]".encode("utf-16-le"), "bad json|expected"),
    "latin1": ('[{"a": "é"}]'.encode("latin-1"), "not UTF-8"),
    "bad_utf8_late": (f"[{LINE},".encode() + b" " * 3_000_000 + b"\xff]", "not UTF-8.*byte 3000"),
    "utf8_cut_at_the_end": (f"[{LINE}]".encode() + "é".encode()[:1], "not UTF-8"),
    "overlong_utf8": (b'[{"a": "\xc0\xaf"}]', "not UTF-8"),
    "bom": (b"\xef\xbb\xbf" + f"[{LINE}]".encode(), OK),
    "crlf": (f"[\r\n{LINE}\r\n]".encode(), OK),
    "gzip": (gzip.compress(f"[{LINE}]".encode(), mtime=0), "compressed with gzip: unpack it first"),
    "truncated_array": (f"[{LINE}".encode(), r"expected ',' or '\]'"),
    "truncated_record": (f"[{LINE}, {LINE[:50]}".encode(), "record 1.*bad json"),
    "truncated_string": (b'[{"a": "b', "bad json: Unterminated string.*line 1 column 8"),
    "truncated_escape": (b'[{"a": "\\u12"}]', "bad json"),
    "trailing_comma": (f"[{LINE},]".encode(), "expected a record"),
    "missing_comma": (f"[{LINE}\n{LINE}]".encode(), "line 2 column 1"),
    "two_arrays": (f"[{LINE}][{LINE}]".encode(), "expected the end"),
    "trailing_text": (f"[{LINE}] and".encode(), "expected the end"),
    "single_quotes": (b"[{'a': 1}]", "property name"),
    "comment": (f"[// no\n{LINE}]".encode(), "bad json"),
    "nan": (b'[{"a": NaN}]', "NaN is not a number"),
    "infinity": (b'[{"a": -Infinity}]', "-Infinity is not a number"),
    "duplicate_key": (b'[{"a": 1, "a": 2}]', "duplicate key 'a'"),
    "duplicate_key_inside": (b'[{"a": {"b": 1, "b": 2}}]', "duplicate key 'b'"),
    "deep_lists": (b"[" * 200_000, "nested too deeply"),
    "deep_objects": (b"[" + b'{"a":' * 100_000, "nested too deeply"),
    "deep_but_closed": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "huge_record": (b'[{"a": "' + b"x" * 5_000_000 + b'"}]', "the limit"),
    "huge_unclosed": (b'[{"a": "' + b"x" * 5_000_000, "the limit"),
    "huge_number": (b'[{"a": ' + b"9" * 100_000 + b"}]", "Exceeds the limit|digits"),
    "huge_exponent": (f'[{{"w": 1e400, {LINE[1:]}]'.encode(), OK),
    "many_spaces": (b"[" + b" " * 3_000_000 + LINE.encode() + b"]", OK),
    "control_character": (b'[{"a": "\x01"}]', "control character"),
    "number_record": (b"[12345]", "a record is a json object, this is int"),
    "null_record": (b"[null]", "this is NoneType"),
    "list_record": (b"[[]]", "this is list"),
    "true_record": (b"[true]", "this is bool"),
}
# --- the same as jsonl -----------------------------------------------------------------------------------------------
LINES = {
    "empty_lines": (f"\n\n{LINE}\n \n", OK),
    "no_newline": (LINE, OK),
    "bad_line": (f"{LINE}\n{{\n{LINE}\n", "record 1: bad json.*line 2 column"),
    "two_values": (f"{LINE} {LINE}\n", "text after the json value, line 1"),
    "array_line": (f"[{LINE}]\n", "this is list"),
    "bad_utf8_line": (LINE.encode() + b'\n{"a": "\xff"}\n', "not UTF-8.*line 2"),
    "long_line": (LINE + "\n" + '{"a": "' + "x" * 5_000_000 + '"}\n' + LINE, "record 1: the record has more than"),
    "zero_line": (LINE.encode() + b"\n" + bytes(100) + b"\n", "bad json.*line 2"),
    "nan_line": (f'{LINE}\n{{"a": NaN}}', "NaN"),
    "line_separator": (talk(conversations=said("<image> a\u2028b", "c\x85d")), OK),
    "deep_line": ("[" * 100_000, "nested too deeply"),
}
# --- records ---------------------------------------------------------------------------------------------------------
RECORDS = {
    "no_conversations": ('{"image": "good.png"}', "'conversations' must be"),
    "conversations_text": (talk(conversations="hi"), "'conversations' must be"),
    "conversations_empty": (talk(conversations=[]), "'conversations' must be"),
    "conversations_object": (talk(conversations={"from": "human"}), "'conversations' must be"),
    "turn_text": (talk(conversations=["hi"]), "must have the texts"),
    "turn_null": (talk(conversations=[None]), "must have the texts"),
    "value_number": (talk(conversations=[{"from": "human", "value": 3}]), "must have the texts"),
    "value_null": (talk(conversations=[{"from": "human", "value": None}]), "must have the texts"),
    "value_list": (talk(conversations=[{"from": "human", "value": ["a"]}]), "must have the texts"),
    "role_missing": (talk(conversations=[{"value": "a"}]), "must have the texts"),
    "role_number": (talk(conversations=[{"from": 1, "value": "a"}]), "unknown role 1"),
    "role_list": (talk(conversations=[{"from": [], "value": "a"}]), r"unknown role \[\]"),
    "role_unknown": (talk(conversations=[{"from": "robot", "value": "a"}]), "unknown role 'robot'"),
    "roles_swapped": (talk(conversations=said("a", "<image>", roles=("gpt", "human"))), "roles out of order"),
    "roles_twice": (talk(conversations=said("<image>", "a", roles=("human", "human"))), "roles out of order"),
    "system_late": (talk(conversations=[*TALK, {"from": "system", "value": "x"}]), "roles out of order"),
    "system_alone": (json.dumps({"conversations": [{"from": "system", "value": "x"}]}), "no user turn"),
    "no_answer": (talk(conversations=said("<image>")), "no answer"),
    "empty_answer": (talk(conversations=said("<image>", " \n")), "empty answer in turn 1"),
    "many_turns": (talk(conversations=said(*["<image>", *["x"] * 999])), OK),
    "odd_turns": (talk(conversations=said("<image>", *["x"] * 998)), "no answer"),
    "no_placeholder": (talk(conversations=PLAIN), "0 <image> placeholders for 1 images"),
    "placeholder_only": (json.dumps({"conversations": TALK}), "1 <image> placeholders for 0 images"),
    "more_placeholders": (talk(conversations=said("<image><image>", "a")), "2 <image> placeholders for 1"),
    "placeholder_in_the_answer": (talk(conversations=said("a", "<image>")), OK),
    "video_placeholder": (json.dumps({"conversations": said("<video>", "a")}), "1 <video> placeholders for 0 videos"),
    "lone_surrogate": ('{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "a"}]}',
                       "half a character"),
    "nul_in_text": (talk(conversations=said("<image>\0", "a\0b")), OK),
    "image_number": (talk(image=3), "'image' must be"),
    "image_null_list": (talk(image=[None]), "'image' must be"),
    "image_empty": (talk(image=""), "1 <image> placeholders for 0 images"),
    "image_object": (talk(image={"path": "good.png"}), OK),
    "image_other_object": (talk(image={"file": "good.png"}), "'image' must be"),
    "image_nested_list": (talk(image=[["good.png"]]), "'image' must be"),
    "image_missing": (talk(image="no.png"), "no.png: No such file"),
    "image_folder": (talk(image="."), "it is a folder, not a file"),
    "image_is_a_pipe": (talk(image="pipe"), "it is a pipe, not a file"),
    "image_is_a_device": (talk(image="/dev/zero"), "it is a device, not a file"),
    "image_with_nul": (talk(image="a\0b"), "null byte"),
    "image_name_too_long": (talk(image="x" * 5000), "too long"),
    "image_surrogate": ('{"image": "\\ud800", "conversations": ' + json.dumps(TALK) + "}", "surrogate"),
    "image_below_the_root": (talk(image="../outside/o.png"), OK),  # a user's own paths may lead anywhere
    "image_url": (talk(image="https://a.b/c.png"), "only files are read"),
    "image_pipe_url": (talk(image="pipe:touch escaped"), "No such file"),
    "image_data_uri": (talk(image="data:image/png;base64,AAAA"), "not a readable"),
    "image_bad_data_uri": (talk(image="data:image/png;base64,%%%"), "not base64"),
    "many_images": (talk(image=["no.png"] * 70_000, conversations=said("<image>" * 70_000, "a")), "No such file"),
    "id_list": (talk(id=[1]), "'id' must be a text or a number"),
    "id_object": (talk(id={}), "'id' must be a text or a number"),
    "id_null": (talk(id=None), OK),
    "id_slashes": (talk(id="../../x"), OK),
    "unknown_keys": (talk(extra={"deep": [1]}), OK),
    "video_number": (json.dumps({"video": 3, "conversations": said("<video>", "a")}), "'video' must be"),
    "video_missing": (json.dumps({"video": "no.mp4", "conversations": said("<video>", "a")}), "No such file"),
    "video_is_a_pipe": (json.dumps({"video": "pipe", "conversations": said("<video>", "a")}), "not a regular file"),
    "video_empty_folder": (json.dumps({"video": "empty", "conversations": said("<video>", "a")}), "has 0 frames"),
    "video_is_text": (json.dumps({"video": "text.mp4", "conversations": said("<video>", "a")}), "cannot be decoded"),
    "video_playlist": (json.dumps({"video": "list.m3u8", "conversations": said("<video>", "a")}), "cannot be decoded"),
    "video_is_an_image": (json.dumps({"video": "good.png", "conversations": said("<video>", "a")}), OK),
    "video_data_uri": (json.dumps({"video": "data:a;base64,AAAA", "conversations": said("<video>", "a")}), "must be"),
}  # fmt: skip


# --- images ----------------------------------------------------------------------------------------------------------
def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
PNG, JPEG, WEBP, GIF = (encoded(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(NOISE, "JPEG", exif=exif)


BOMB = zlib.compress(bytes(30_000_000))
IMAGES = {
    "none": (b"", "not a readable"),
    "zeros": (bytes(1000), "not a readable"),
    "text": (b"not an image", "not a readable"),
    "html": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable"),
    "pdf": (b"%PDF-1.4\n%%EOF", "not a readable"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable"),
    "tiff": (encoded(NOISE, "TIFF"), "not a readable"),
    "ico": (encoded(NOISE, "ICO"), "not a readable"),
    "png_signature": (PNG[:8], "not a readable"),
    "png_header": (PNG[:33], "cannot be decoded|not a readable"),
    "png_half": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png_without_its_end": (PNG[:-12], OK),
    "png_zeroed": (PNG[:200] + bytes(500) + PNG[700:], "cannot be decoded"),
    "png_checksum": (flipped(PNG, 30), "not a readable"),
    "png_size_0": (png(0, 10), "0 x 10|not a readable"),
    "png_wide": (png(100_000, 2), "the limits are"),
    "png_pixels": (png(10_000, 10_000), "the limits are"),
    "png_2_31": (png(2**31 - 1, 2**31 - 1), "refused|not a readable|limits"),
    "png_aspect": (png(2000, 5), "200 times"),
    "png_bomb": (png(7000, 7000, chunk(b"IDAT", BOMB)), "cannot be decoded"),
    "png_text_bomb": (
        png(10, 10, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        "not a readable|decoded",
    ),
    "png_profile_bomb": (png(10, 10, chunk(b"iCCP", b"a\0\0" + BOMB)), "not a readable|decoded"),
    "png_16_bits": (encoded(Image.new("I;16", (9, 9)), "PNG"), "8 bits"),
    "png_bad_depth": (png(10, 10, depth=7), "not a readable"),
    "png_animated": (encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]), "animated"),
    "png_1_bit": (encoded(NOISE.convert("1"), "PNG"), OK),
    "png_grey": (encoded(NOISE.convert("L"), "PNG"), OK),
    "png_grey_alpha": (encoded(NOISE.convert("LA"), "PNG"), OK),
    "png_palette": (encoded(NOISE.convert("P"), "PNG"), OK),
    "png_transparent": (encoded(NOISE.convert("RGBA"), "PNG"), OK),
    "png_transparent_colour": (encoded(NOISE.convert("P"), "PNG", transparency=0), OK),
    "jpeg_start": (JPEG[:2], "not a readable"),
    "jpeg_header": (JPEG[:300], "not a readable|cannot be decoded"),
    "jpeg_half": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "jpeg_trailing_rubbish": (JPEG + b"rubbish" * 100, OK),
    "jpeg_cmyk": (encoded(NOISE.convert("CMYK"), "JPEG"), OK),
    "jpeg_grey": (encoded(NOISE.convert("L"), "JPEG"), OK),
    "jpeg_progressive": (encoded(NOISE, "JPEG", progressive=True), OK),
    "jpeg_bad_exif": (encoded(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff rubbish"), f"{OK}|decoded"),
    **{f"jpeg_turned_{i}": (turned(i), OK) for i in (1, 3, 6, 8)},
    "jpeg_turned_99": (turned(99), OK),
    "jpeg_size": (JPEG.replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 65500, 65500), 1), "refused|limits"),
    "jpeg_size_0": (
        JPEG.replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 0, 0), 1),
        "0 x 0|not a readable|decoded",
    ),
    # The rest is grey, without an error in any decoder of JPEG.
    "jpeg_claims_more": (JPEG.replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 400, 400), 1), OK),
    "webp_half": (WEBP[: len(WEBP) // 2], "not a readable|decoded"),
    "webp": (WEBP, OK),
    "webp_animated": (encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]), "animated"),
    "gif": (GIF, OK),
    "gif_half": (GIF[: len(GIF) // 2], "decoded|not a readable"),
    "gif_animated": (encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)]), "animated"),
    "gif_wide": (GIF[:6] + struct.pack("<HH", 65535, 65535) + GIF[10:], "refused|limits|decoded"),
    "bmp": (encoded(NOISE, "BMP"), OK),
    "bmp_half": (encoded(NOISE, "BMP")[:2000], "decoded"),
    "bmp_wide": (
        b"BM" + bytes(8) + struct.pack("<IIIIHHIIIIII", 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "refused|limits",
    ),
    "one_pixel": (encoded(NOISE.crop((0, 0, 1, 1)), "PNG"), OK),
}


# --- tars of other tools ---------------------------------------------------------------------------------------------
def tar(*members, end=True, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **{"format": tarfile.USTAR_FORMAT, **options}) as file:
        for name, content, *fields in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for key, value in (fields[0] if fields else {}).items():
                setattr(header, key, value)
            file.addfile(header, io.BytesIO(content))
        length = file.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def rechecked(data, at=0):
    """Corrects a header's checksum after a change."""
    block = bytearray(data[at : at + 512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def resized(data, field):
    return rechecked(data[:124] + field.ljust(12, b"\0") + data[136:])


TEXT = json.dumps({"conversations": TALK}).encode()
SAMPLE = (("a.png", PNG), ("a.json", TEXT))
ONE = tar(*SAMPLE)
TARS = {
    "good": (ONE, OK),
    "empty": (b"", "no header"),
    "empty_archive": (bytes(10240), "no records|0 records"),
    "short": (ONE[:100], "no header"),
    "zeros": (bytes(512), "no records|0 records"),
    "text": (b"hello world " * 100, "damaged tar header"),
    "zip": (b"PK\x03\x04" + bytes(1000), "a zip archive: unpack"),
    "gzip": (gzip.compress(ONE * 4, mtime=0), "compressed with gzip: unpack"),
    "cut_in_a_header": (ONE[:700], "cut short"),
    "cut_in_content": (ONE[:3000], "cut short"),
    "cut_at_a_member": (tar(SAMPLE[0], end=False), "cut short"),
    "no_end_mark": (tar(*SAMPLE, end=False), "cut short"),
    "checksum": (flipped(ONE, 20), "checksum"),
    "checksum_field": (ONE[:148] + b"xxxxxx\0 " + ONE[156:], "checksum"),
    "zeroed_header": (ONE[:512] + bytes(len(ONE) - 512), "no conversation"),
    "size_letters": (resized(ONE, b"zzzzzzzzzzz"), "size reads"),
    "size_negative": (resized(ONE, b"-0000000100"), "size reads|a size of|damaged"),
    "size_huge": (resized(ONE, b"77777777777"), "cut short|beyond the limit"),
    "size_base_256": (resized(ONE, b"\x80" + bytes(10) + b"\x10"), "damaged|checksum|cut short|beyond"),
    "size_base_256_huge": (resized(ONE, b"\x80" + b"\xff" * 11), "cut short|beyond the limit"),
    "size_0": (resized(ONE, b"00000000000"), "damaged|checksum"),
    "symlink": (tar(*SAMPLE, ("b.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})), "not a regular file"),
    "hard_link": (tar(*SAMPLE, ("b.png", b"", {"type": tarfile.LNKTYPE, "linkname": "a.png"})), "not a regular file"),
    "device": (tar(*SAMPLE, ("b.png", b"", {"type": tarfile.CHRTYPE, "devmajor": 1})), "not a regular file"),
    "fifo": (tar(*SAMPLE, ("b.png", b"", {"type": tarfile.FIFOTYPE})), "not a regular file"),
    "sparse": (tar(*SAMPLE, ("b.png", b"", {"type": tarfile.GNUTYPE_SPARSE})), "not a regular file"),
    "unknown_type": (tar(*SAMPLE, ("b.png", b"", {"type": b"Z"})), "not a regular file"),
    "folder": (tar(("d", b"", {"type": tarfile.DIRTYPE}), *SAMPLE), OK),
    "traversal": (tar(("../escaped.png", PNG), ("../escaped.json", TEXT)), "leads out"),
    "traversal_inside": (tar(("a/../../escaped.png", PNG), ("a/../../escaped.json", TEXT)), "leads out"),
    "absolute": (tar(("/tmp/escaped.png", PNG), ("/tmp/escaped.json", TEXT)), "leads out"),
    "pax": (tar(("é" * 60 + ".png", PNG), ("é" * 60 + ".json", TEXT), format=tarfile.PAX_FORMAT), OK),
    "gnu_long_name": (tar(("x" * 300 + ".png", PNG), ("x" * 300 + ".json", TEXT), format=tarfile.GNU_FORMAT), OK),
    "pax_traversal": (tar(("../" * 60 + "e.png", PNG), format=tarfile.PAX_FORMAT), "leads out"),
    "pax_size": (tar(("a.png", PNG, {"pax_headers": {"size": "1"}}), SAMPLE[1], format=tarfile.PAX_FORMAT),
                 "another place|extension header|damaged|checksum"),
    "pax_rubbish": (rechecked(tar(("a", b"rubbish", {"type": b"x"}), *SAMPLE)), f"{OK}|extension header|damaged"),
    "pax_bomb": (resized(tar(("a", b"x", {"type": b"x"})) + bytes(3 * 2**20), b"%011o" % (2 * 2**20)), "beyond the limit"),
    "name_bytes": (rechecked(b"\xff\xfe.png" + ONE[6:]), "UTF-8|no conversation|placeholders"),
    "no_name": (rechecked(bytes(100) + ONE[100:]), "no conversation|placeholders"),
    "no_suffix": (tar(("a", PNG)), "no records"),
    "twice": (tar(SAMPLE[0], SAMPLE[0], SAMPLE[1]), "two members of one name"),
    "interleaved": (tar(("a.png", PNG), ("b.png", PNG), ("a.json", TEXT)), "no conversation"),
    "pickle": (tar(("a.pkl", b"cos\nsystem\n(S'touch escaped'\ntR."), ("a.txt", b"x")), "empty|OK|read"),
    "pickle_only": (tar(("a.pyd", b"cos\nsystem\n(S'touch escaped'\ntR.")), "no conversation"),
    "json_deep": (tar(("a.json", b"[" * 100_000)), "nested too deeply"),
    "json_nan": (tar(("a.json", b'{"conversations": NaN}')), "NaN"),
    "json_huge": (tar(("a.json", b'"' + b"x" * 5_000_000 + b'"')), "the limit"),
    "json_bytes": (tar(("a.json", b"\xff\xff")), "bad json"),
    "json_list": (tar(("a.json", b"[]")), "no conversation"),
    "text_bytes": (tar(("a.png", PNG), ("a.txt", b"\xff")), "not UTF-8"),
    "text_empty": (tar(("a.png", PNG), ("a.txt", b"")), "empty answer"),
    "image_bomb": (tar(("a.png", png(30_000, 30_000)), ("a.json", TEXT)), "limits|refused"),
    "image_lies": (tar(("a.png", b"<html>"), ("a.json", TEXT)), "is a web page"),
}  # fmt: skip
TARS["pickle"] = (TARS["pickle"][0], OK)  # the member is not even looked at; the text is a sample without images

CASES = [
    *((f"file/{name}", "a.json", data, bar) for name, (data, bar) in FILES.items()),
    *((f"lines/{name}", "a.jsonl", data, bar) for name, (data, bar) in LINES.items()),
    *((f"record/{name}", "a.jsonl", data, bar) for name, (data, bar) in RECORDS.items()),
    *((f"image/{name}", "a.png", data, bar) for name, (data, bar) in IMAGES.items()),
    *((f"tar/{name}", "a.tar", data, bar) for name, (data, bar) in TARS.items()),
]
