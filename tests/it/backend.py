"""A backend that stores images as FastAPI services do, and checks with curl what is served.

Called as: backend.py REDIS_URL BASE_URL
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import redis

store = redis.from_url(sys.argv[1])
base = sys.argv[2]


def write(image_id: str, image: bytes) -> bytes:
    value = json.dumps(
        {"base64_data": base64.b64encode(image).decode(), "mime_type": "image/png"}
    ).encode()
    store.set(f"image:{image_id}", value, ex=7200)
    return value


def curl(image_id: str, *arguments: str) -> tuple[int, str, bytes]:
    with tempfile.NamedTemporaryFile() as body:
        command = ["curl", "-sS", "-o", body.name, "-w", "%{http_code} %header{etag}", *arguments]
        command.append(f"{base}/images/{image_id}")
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        status, _, etag = printed.partition(" ")
        return int(status), etag, body.read()


for size in (1_000, 1_000_000):
    first = b"\x89PNG\r\n\x1a\n" + os.urandom(size)
    etag = f'"{hashlib.md5(write("hero", first)).hexdigest()}"'
    assert curl("hero") == (200, etag, first)
    assert curl("hero", "-H", f"If-None-Match: {etag}") == (304, etag, b"")

    second = b"\x89PNG\r\n\x1a\n" + os.urandom(size)
    replaced = f'"{hashlib.md5(write("hero", second)).hexdigest()}"'
    assert replaced != etag
    assert curl("hero", "-H", f"If-None-Match: {etag}") == (200, replaced, second)
    assert curl("hero") == (200, replaced, second)

store.delete("image:hero")
assert curl("hero")[0] == 404
