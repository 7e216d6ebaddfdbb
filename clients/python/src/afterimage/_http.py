"""Requests to the server."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit

from ._error import ImageError


class Server:
    """A server, with the right to write to it. No connection is kept, so threads may share it."""

    def __init__(self, address: str, token: str, timeout: float) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the store must be a Redis client or an address such as http://127.0.0.1:8000")
        self._connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
        self._timeout = timeout

    def request(self, method: str, target: str, body: memoryview | None = None) -> str | None:
        """Returns the ETag of the answer, empty for a DELETE; `None` if there is no such image."""
        connection = self._connection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, f"{self._path}/images/{target}", body, self._headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        status, etag = answer.status, answer.headers["ETag"] or ""
        # A redirect to the object store has the image's ETag. It isn't followed: that store has ETags of its own.
        if (status < 300 or (status == 307 and method == "HEAD")) and (etag or method == "DELETE"):
            return etag
        if status == 404 and method != "PUT":
            return None
        problem = {"type": "", "detail": answer.reason if status >= 400 else "expected an answer of Afterimage"}
        if answer.headers.get_content_type() == "application/problem+json" and text:
            problem.update(json.loads(text))
        raise ImageError(status, problem["type"].rpartition(":")[2], problem["detail"])
