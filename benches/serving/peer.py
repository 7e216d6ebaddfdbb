"""Images out of Redis, as a backend in Python serves them: PEER is naive or cached.

Values are text, as they are in most backends (decode_responses), and so are decoded and encoded again for the MD5.
"""

import base64
import hashlib
import json
import os
from functools import lru_cache

import redis
from fastapi import FastAPI, Request, Response

store = redis.Redis(host="127.0.0.1", port=int(os.environ["REDIS_PORT"]), decode_responses=True)
app = FastAPI(openapi_url=None)


async def naive(image_id: str) -> Response:
    """Everything for every request."""
    value = store.get(f"image:{image_id}")
    if value is None:
        return Response(status_code=404)
    record = json.loads(value)
    return Response(base64.b64decode(record["base64_data"]), media_type=record["mime_type"])


@lru_cache(maxsize=50)
def decoded(key: str, version: str) -> tuple[bytes, str]:
    """Once for each version. The cache goes by its arguments, so the value is fetched again."""
    record = json.loads(store.get(key))
    return base64.b64decode(record["base64_data"]), record["mime_type"]


async def cached(image_id: str, request: Request) -> Response:
    """The value is fetched and hashed for every request, and decoded for the first."""
    key = f"image:{image_id}"
    value = store.get(key)
    if value is None:
        return Response(status_code=404)
    version = hashlib.md5(value.encode()).hexdigest()
    headers = {"ETag": f'"{version}"', "Cache-Control": "public, max-age=3600, immutable"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    body, media_type = decoded(key, version)
    return Response(body, media_type=media_type, headers=headers)


app.get("/images/{image_id}")({"naive": naive, "cached": cached}[os.environ["PEER"]])
