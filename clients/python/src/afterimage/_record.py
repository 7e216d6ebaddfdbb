"""The record of an image in Redis, as docs/record.md describes it."""

from __future__ import annotations

import base64
import hashlib
import re
import time

from ._error import ImageError

# The types that are served, by the server's signatures (src/picture/sniff.rs). In this order: AVIF and HEIC share a header, in
# which the first brand of a codec decides. A repetition matches in one way only, so hostile text costs one pass.
_SIGNATURES = [
    ("image/png", rb"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", rb"\xff\xd8\xff"),
    ("image/gif", rb"GIF8[79]a"),
    ("image/webp", rb"RIFF.{4}WEBPVP8"),
    ("image/jxl", rb"\xff\n|\0\0\0\x0cJXL \r\n\x87\n"),
    ("image/avif", rb".{4}ftyp(?:(?!he[iv][cxms]).{4}){0,60}?avi[fs]"),
    ("image/heic", rb".{4}ftyp(?:.{4}){0,60}?he[iv][cxms]"),
    ("image/tiff", rb"II[*+]\0|MM\0[*+]"),
    ("image/bmp", rb"BM.{12}[\x0c\x10(48@l|]\0\0\0"),
    ("image/vnd.microsoft.icon", rb"\0\0\x01\0(?!\0\0).{5}\0"),
    (
        "image/svg+xml",
        rb"(?:\xef\xbb\xbf)?(?:[ \t\n\f\r]|<\?(?:(?!\?>).)*\?>|<!--(?:(?!-->).)*-->"
        rb"|<!(?i:doctype)[^>\[]*(?:\[[^\]]*\][^>]*)?>)*<(?:svg:)?svg[ \t\n\f\r/>]",
    ),
]


def check_id(image_id: str) -> None:
    """Refuses an id that the server would refuse."""
    wrong_end = image_id.endswith((".webp", ".avif", ".jpg", ".png"))
    if wrong_end or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:~-]{0,127}", image_id):
        must = "the id must be 1 to 128 of `A-Z a-z 0-9 . _ : ~ -`, begin with a letter, a digit or `_`, and not end in"
        raise ImageError(400, "bad-id", f"{must} .webp, .avif, .jpg or .png: {image_id[:150]!r}")


def encode(image: memoryview, max_value: int) -> tuple[bytes, str]:
    """Returns the record that the server itself would write, and its ETag. Refuses an image that it couldn't serve."""
    types = (name for name, signature in _SIGNATURES if re.match(signature, image, re.DOTALL))
    if (media_type := next(types, None)) is None:
        raise ImageError(400, "not-an-image", "the bytes must be an image of a type that Afterimage serves")
    head = f'{{"mime_type":"{media_type}","created_at":{int(time.time())},"base64_data":"'
    value = b"".join((head.encode(), base64.b64encode(image), b'"}'))
    if len(value) > max_value:
        detail = f"the image makes a record of {len(value)} bytes, the limit is {max_value} ([records] max_value)"
        raise ImageError(413, "body-too-large", detail)
    return value, etag(value)


def etag(value: bytes | str) -> str:
    """Returns the ETag of a record. A client with `decode_responses` has the record as text."""
    data = value.encode() if isinstance(value, str) else value
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
