"""The operations, written once for `Images` and `AsyncImages`."""

from __future__ import annotations

import inspect
import math
from datetime import timedelta
from typing import Any, Callable, Optional, Protocol, Union, cast

from . import _record
from ._error import ImageError
from ._http import Server

Image = Union[bytes, bytearray, memoryview]


class RedisClient(Protocol):
    """The part of `redis.Redis` and `redis.asyncio.Redis` that is used."""

    def set(self, name: str, value: bytes, *, ex: int) -> Any: ...
    def get(self, name: str) -> Any: ...
    def delete(self, name: str, /) -> Any: ...


class Core:
    """The operations as coroutines. In `Images` they never wait."""

    def __init__(
        self,
        store: RedisClient | str,
        *,
        token: str = "",
        base: str = "",
        key_prefix: str = "image:",
        max_value: int = 32 << 20,
        timeout: float = 30,
    ) -> None:
        """Takes a client of Redis, or the address of a server.

        `token` allows writes over HTTP, and `timeout` is in seconds. `base` comes before each returned address. `key_prefix` and
        `max_value` are those of the server's `[records]`; over HTTP they don't count.
        """
        self._store = Server(store, token, timeout) if isinstance(store, str) else store
        self._base, self._key_prefix, self._max_value = base.rstrip("/"), key_prefix, max_value
        self._is_async = inspect.iscoroutinefunction(getattr(store, "execute_command", None))

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function that takes its time: a request over HTTP, or base64 and MD5 of megabytes."""
        return function(*arguments)

    async def _ask(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls a method of the Redis client."""
        answer = command(*arguments, **options)
        if inspect.isawaitable(answer):
            raise TypeError("`Images` must have a client of redis; one of redis.asyncio is for `AsyncImages`")
        return answer

    async def _put(self, image_id: str, image: Image, ttl: float | timedelta) -> str:
        _record.check_id(image_id)
        seconds = math.ceil(ttl.total_seconds() if isinstance(ttl, timedelta) else ttl)
        if seconds < 1:
            raise ImageError(400, "bad-parameter", "`ttl` must be more than 0 seconds")
        if isinstance(self._store, Server):
            etag = await self._run(self._store.request, "PUT", f"{image_id}?ttl={seconds}s", memoryview(image))
        else:
            value, etag = await self._run(_record.encode, memoryview(image), self._max_value)
            await self._ask(self._store.set, self._key_prefix + image_id, value, ex=seconds)
        return self._address(image_id, etag)

    async def _delete(self, image_id: str) -> bool:
        _record.check_id(image_id)
        if isinstance(self._store, Server):
            return await self._run(self._store.request, "DELETE", image_id) is not None
        return bool(await self._ask(self._store.delete, self._key_prefix + image_id))

    async def _etag(self, image_id: str) -> str | None:
        _record.check_id(image_id)
        if isinstance(self._store, Server):
            return cast(Optional[str], await self._run(self._store.request, "HEAD", image_id))
        value = await self._ask(self._store.get, self._key_prefix + image_id)
        return None if value is None else cast(str, await self._run(_record.etag, value))

    async def _url(self, image_id: str) -> str | None:
        etag = await self._etag(image_id)
        return None if etag is None else self._address(image_id, etag)

    def _address(self, image_id: str, etag: str) -> str:
        version = etag.removeprefix("W/").strip('"')
        return f"{self._base}/images/{image_id}?v={version}"
