"""Stores images for an Afterimage server, in its Redis or over HTTP: `Images`, and `AsyncImages` with methods to await."""

import json
import re
from asyncio import to_thread
from base64 import b64encode
from hashlib import md5
from typing import Any
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, Request


class ImageError(Exception):
    def __init__(self, status: int, type: str, detail: str) -> None:
        """A refusal by the server, with the `status`, `type` and `detail` of its problem."""
        self.status, self.type, self.detail = status, type, detail


def _record(image: bytes | bytearray | memoryview) -> bytes:
    return json.dumps({"base64_data": b64encode(image).decode()}).encode()


def _etag(value: Any) -> str | None:
    data = value.encode() if isinstance(value, str) else value    # text comes from a client with `decode_responses`
    return None if data is None else f'"{md5(data, usedforsecurity=False).hexdigest()}"'


class _Store:
    def __init__(self, store: Any, *, token: str = "", base: str = "", key_prefix: str = "image:", timeout: float = 30):
        """Takes a Redis client, or the address of a server and its token. `base` comes before each returned address."""
        self._redis, self._is_http, is_async = store, isinstance(store, str), hasattr(store, "__aenter__")
        if not (re.match("https?://[^/]", store) if self._is_http else is_async == isinstance(self, AsyncImages)):
            raise TypeError("`store` must be http://… or a client: of redis for Images, of redis.asyncio for AsyncImages")
        self._prefix = f"{store.rstrip('/')}/images/" if self._is_http else key_prefix
        self._authorization = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        self._base, self._timeout = base.rstrip("/"), timeout

    def _key(self, id: str, image: bytes | bytearray | memoryview | None = None, ttl: float = 1) -> str:
        if not re.fullmatch(r"(?!.*\.(webp|avif|jpg|png)\Z)[A-Za-z0-9_][A-Za-z0-9._:~-]{0,127}", id):
            raise ValueError(f"the id must be 1 to 128 of A-Z a-z 0-9 . _ : ~ -, by the rules of docs/record.md: {id!r}")
        if ttl <= 0 or image == b"":
            raise ValueError("`ttl` must be more than 0 seconds, and the image must have bytes")
        return self._prefix + id

    def _url(self, id: str, etag: str | None) -> str | None:
        return etag and "{}/images/{}?v={}".format(self._base, id, etag.split('"')[1])

    def _http(self, method: str, id: str, image: Any = None, ttl: int = 1) -> Any:
        """Returns the address after a PUT, the ETag after a HEAD, True after a DELETE; None if there is no such image."""
        address = self._key(id, image, ttl) + (f"?ttl={ttl}s" if method == "PUT" else "")
        headers = {"Content-Type": "application/octet-stream", **self._authorization}
        opener = OpenerDirector()    # without handlers of redirects and errors, so that each answer arrives here
        opener.add_handler(HTTPSHandler() if address.startswith("https:") else HTTPHandler())
        with opener.open(Request(address, image, headers, method=method), timeout=self._timeout) as answer:
            body = json.load(answer) if method != "HEAD" and "json" in answer.headers.get_content_type() else {}
        found = {"PUT": body.get("url"), "HEAD": answer.headers["ETag"], "DELETE": answer.status == 204}[method]
        absent = answer.status == 404 and method != "PUT"
        if not absent and (answer.status >= 400 or not found):
            raise ImageError(answer.status, body.get("type", "").rpartition(":")[2], body.get("detail", answer.reason))
        return None if absent else found


class Images(_Store):
    def put(self, id: str, image: bytes | bytearray | memoryview, ttl: int = 7200) -> str:
        """Stores an image for `ttl` seconds. Returns its versioned address."""
        if self._is_http:
            return f"{self._base}{self._http('PUT', id, image, ttl)}"
        value = _record(image)
        self._redis.set(self._key(id, image, ttl), value, ex=ttl)
        return str(self._url(id, _etag(value)))

    def delete(self, id: str) -> bool:
        """Removes an image. Returns False if there was none."""
        return bool(self._http("DELETE", id) if self._is_http else self._redis.delete(self._key(id)))

    def etag(self, id: str) -> str | None:
        """Returns the ETag with its quotes, or None if there is no image."""
        return self._http("HEAD", id) if self._is_http else _etag(self._redis.get(self._key(id)))

    def url(self, id: str) -> str | None:
        """Returns the versioned address, or None if there is no image."""
        return self._url(id, self.etag(id))


class AsyncImages(_Store):
    async def put(self, id: str, image: bytes | bytearray | memoryview, ttl: int = 7200) -> str:
        if self._is_http:
            return f"{self._base}{await to_thread(self._http, 'PUT', id, image, ttl)}"
        value = await to_thread(_record, image)
        await self._redis.set(self._key(id, image, ttl), value, ex=ttl)
        return str(self._url(id, await to_thread(_etag, value)))

    async def delete(self, id: str) -> bool:
        return bool(await (to_thread(self._http, "DELETE", id) if self._is_http else self._redis.delete(self._key(id))))

    async def etag(self, id: str) -> str | None:
        return await to_thread(self._http, "HEAD", id) if self._is_http else _etag(await self._redis.get(self._key(id)))

    async def url(self, id: str) -> str | None:
        return self._url(id, await self.etag(id))
