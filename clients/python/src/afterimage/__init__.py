"""Stores images for an Afterimage server: straight in its Redis, or over HTTP.

    images = Images(redis.Redis())
    url = images.put("hero_abc123", png, ttl=7200)    # /images/hero_abc123?v=…

A refusal is an `ImageError`. An unreachable store is an error of the Redis client, or an `OSError` over HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from datetime import timedelta
from typing import Any, Callable, Coroutine, TypeVar, cast

from ._core import Core, Image, RedisClient
from ._error import ImageError

__all__ = ["AsyncImages", "ImageError", "Images", "RedisClient"]

T = TypeVar("T")


class Images(Core):
    """Images in a store. Threads may share it."""

    def put(self, image_id: str, image: Image, ttl: float | timedelta = 7200) -> str:
        """Stores an image for `ttl` seconds, rounded up to whole ones, and returns its versioned address."""
        return self._now(self._put(image_id, image, ttl))

    def delete(self, image_id: str) -> bool:
        """Removes an image. Returns False if there was none."""
        return self._now(self._delete(image_id))

    def etag(self, image_id: str) -> str | None:
        """Returns the ETag with its quotes. `None` if there is no image: one that has expired is no error."""
        return self._now(self._etag(image_id))

    def url(self, image_id: str) -> str | None:
        """Returns the versioned address. `None` if there is no image."""
        return self._now(self._url(image_id))

    def _now(self, operation: Coroutine[Any, Any, T]) -> T:
        """Runs an operation that never waits: to its end, at once."""
        try:
            operation.send(None)
        except StopIteration as end:
            return cast(T, end.value)
        raise AssertionError("an operation of Images waited")


class AsyncImages(Core):
    """`Images` with `await`. HTTP, a Redis client that isn't async, and the work on megabytes run in threads."""

    async def put(self, image_id: str, image: Image, ttl: float | timedelta = 7200) -> str:
        """Stores an image for `ttl` seconds, rounded up to whole ones, and returns its versioned address."""
        return await self._put(image_id, image, ttl)

    async def delete(self, image_id: str) -> bool:
        """Removes an image. Returns False if there was none."""
        return await self._delete(image_id)

    async def etag(self, image_id: str) -> str | None:
        """Returns the ETag with its quotes. `None` if there is no image: one that has expired is no error."""
        return await self._etag(image_id)

    async def url(self, image_id: str) -> str | None:
        """Returns the versioned address. `None` if there is no image."""
        return await self._url(image_id)

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)

    async def _ask(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        call = functools.partial(command, *arguments, **options)
        answer = call() if self._is_async else await asyncio.to_thread(call)
        return await answer if inspect.isawaitable(answer) else answer
