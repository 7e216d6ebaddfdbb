"""The module against a Redis and a server on it, whose `[records] max_value` is 1 MiB.

AFTERIMAGE_TEST_REDIS, AFTERIMAGE_TEST_SERVER and AFTERIMAGE_TEST_TOKEN have their addresses and the server's token.
"""

import asyncio
import base64
import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import unittest
import urllib.error
import urllib.request
from datetime import timedelta
from importlib import metadata

import redis
import redis.asyncio

import afterimage
from afterimage import AsyncImages, ImageError, Images

REDIS = os.environ["AFTERIMAGE_TEST_REDIS"]
SERVER = os.environ["AFTERIMAGE_TEST_SERVER"]
TOKEN = os.environ["AFTERIMAGE_TEST_TOKEN"]
LIMIT = 1 << 20
PATIENCE = 20

# The first bytes of each type that is served, and of what resembles one.
IMAGES = {
    "image/png": [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"],
    "image/jpeg": [b"\xff\xd8\xff\xe0\0\x10JFIF"],
    "image/gif": [b"GIF87a\0", b"GIF89a\0"],
    "image/webp": [b"RIFF\n\0\n\0WEBPVP8 "],
    "image/avif": [b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifheic"],
    "image/heic": [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x1cftypmif1\0\0\0\0mif1heixavif"],
    "image/jxl": [b"\xff\n\0", b"\0\0\0\x0cJXL \r\n\x87\n\0"],
    "image/tiff": [b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"],
    "image/bmp": [b"BM" + bytes(12) + bytes([size, 0, 0, 0]) for size in (12, 16, 40, 52, 56, 64, 108, 124)],
    "image/vnd.microsoft.icon": [bytes([0, 0, 1, 0, 1, 0, 16, 16, 0, 0, 1, 0])],
    "image/svg+xml": [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf\n<svg>",
        b"<?xml version='1.0'?><!-- > --><!----><svg/>",
        b"<!DOCTYPE svg PUBLIC 'a' 'b'>\n<svg\n>",
        b"<!doctype svg [<!ENTITY a 'b>'>] ><svg >",
        b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'>",
    ],
}
NO_IMAGES = [
    b"",
    b"plain text",
    b"<html><svg/></html>",
    b"<svgs/>",
    b"<!-- <svg/>",
    b"<!doctype svg [ <svg>",
    b"BM" + bytes(12) + b"\x29\0\0\0",
    b"\0\0\1\0\0\0" + bytes(6),
    b"\0\0\2\0\1\0" + bytes(6),
    b"\0\0\0\x18ftypisom\0\0\0\0isommp41",
    b"\x89PNG",
    b"<!---->" * 40 + b"<p>",
]


def png(size: int = 1000) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + os.urandom(size)


def fetch(url: str) -> "tuple[int, bytes]":
    try:
        with urllib.request.urlopen(SERVER + url) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


class InThreads:
    """An `AsyncImages` as if it were an `Images`. Each call has an event loop of its own, and so a Redis client."""

    def __init__(self, store, **options):
        self.store, self.options = store, options

    def __getattr__(self, name):
        async def call(*arguments, **options):
            store = self.store() if callable(self.store) else self.store
            try:
                return await getattr(AsyncImages(store, **self.options), name)(*arguments, **options)
            finally:
                if isinstance(store, redis.asyncio.Redis):
                    await store.aclose()

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))


def each_way(test):
    """Runs a test for each way of storing, with an id of its own."""

    @functools.wraps(test)
    def run(self):
        for number, (name, images) in enumerate(self.ways.items()):
            with self.subTest(name):
                test(self, images, f"{test.__name__}_{number}")

    return run


class Stored(unittest.TestCase):
    """What counts for each way of storing."""

    @classmethod
    def setUpClass(cls):
        cls.redis = redis.from_url(REDIS)
        cls.addClassCleanup(cls.redis.close)
        http, straight = {"token": TOKEN}, {"max_value": LIMIT}
        cls.ways = {
            "Redis": Images(cls.redis, **straight),
            "Redis, text": Images(redis.from_url(REDIS, decode_responses=True), **straight),
            "HTTP": Images(SERVER, **http),
            "HTTP, slash": Images(SERVER + "/", **http),
            "Redis, async": InThreads(lambda: redis.asyncio.from_url(REDIS), **straight),
            "Redis, thread": InThreads(cls.redis, **straight),
            "HTTP, async": InThreads(SERVER, **http),
        }

    def served(self, url: str, expected: bytes) -> None:
        """The server is told of a change by Redis, which takes a moment."""
        deadline = time.monotonic() + PATIENCE
        while (answer := fetch(url)) != (200, expected) and time.monotonic() < deadline:
            time.sleep(0.005)
        self.assertEqual(answer, (200, expected))

    def refused(self, status: int, kind: str, call, *arguments, **options) -> ImageError:
        with self.assertRaises(ImageError) as caught:
            call(*arguments, **options)
        self.assertEqual((caught.exception.status, caught.exception.type), (status, kind), str(caught.exception))
        self.assertTrue(caught.exception.detail)
        return caught.exception

    @each_way
    def test_an_image_is_served_under_the_address_of_its_version(self, images, image_id):
        image = png()
        url = images.put(image_id, image)
        value = self.redis.get(f"image:{image_id}")
        self.assertEqual(url, f"/images/{image_id}?v={hashlib.md5(value).hexdigest()}")
        self.served(url, image)
        self.assertEqual(images.url(image_id), url)
        self.assertEqual(images.etag(image_id), f'"{hashlib.md5(value).hexdigest()}"')
        with urllib.request.urlopen(SERVER + url) as answer:
            self.assertEqual(answer.headers["ETag"], images.etag(image_id))
            self.assertEqual(answer.headers["Cache-Control"], "public, max-age=31536000, immutable")
            self.assertTrue(answer.headers["Last-Modified"])

    @each_way
    def test_a_replaced_image_has_another_address_and_is_served_at_once(self, images, image_id):
        first, second = png(), png()
        before = images.put(image_id, first)
        self.served(before, first)
        after = images.put(image_id, second)
        self.assertNotEqual(before, after)
        self.served(after, second)
        self.served(f"/images/{image_id}", second)
        self.assertEqual(images.url(image_id), after)

    @each_way
    def test_a_deleted_image_is_gone(self, images, image_id):
        url = images.put(image_id, png())
        self.assertEqual(fetch(url)[0], 200)
        self.assertIs(images.delete(image_id), True)
        deadline = time.monotonic() + PATIENCE
        while fetch(url)[0] != 404 and time.monotonic() < deadline:
            time.sleep(0.005)
        self.assertEqual(fetch(url)[0], 404)
        self.assertIs(images.delete(image_id), False)
        self.assertIsNone(images.url(image_id))
        self.assertIsNone(images.etag(image_id))

    @each_way
    def test_an_image_expires(self, images, image_id):
        for ttl, seconds in ((None, 7200), (60, 60), (timedelta(minutes=2), 120), (1.2, 2), (timedelta(seconds=59.2), 60)):
            start = time.monotonic()
            images.put(image_id, png(), **({"ttl": ttl} if ttl else {}))
            left = self.redis.pttl(f"image:{image_id}")
            elapsed = (time.monotonic() - start) * 1000 + 1
            self.assertTrue(seconds * 1000 - elapsed <= left <= seconds * 1000 or elapsed > seconds * 1000, (ttl, left))
        for ttl in (0, -1, timedelta(0)):
            self.refused(400, "bad-parameter", images.put, image_id, png(), ttl=ttl)

    def test_the_server_bounds_the_life(self):
        error = self.refused(400, "bad-parameter", Images(SERVER, token=TOKEN).put, "long", png(), ttl=timedelta(days=366))
        self.assertIn("max_ttl", error.detail)

    @each_way
    def test_a_bad_id_is_refused_before_anything_is_sent(self, images, image_id):
        bad = ["", "x" * 129, "a b", "a/b", "ä", "-a", ".a", "a\n", "a?v=1", "a.webp", "a.avif", "a.jpg", "a.png"]
        for wrong in bad:
            for call in (images.delete, images.url, images.etag, lambda it: images.put(it, png())):
                self.refused(400, "bad-id", call, wrong)
        for good in ("_a", "0", "A.b_c:d~e-", "a.jpeg", "x" * 128):
            self.served(images.put(good, (image := png())), image)
            self.assertTrue(images.delete(good))

    @each_way
    def test_each_type_is_told_from_the_bytes_as_the_server_tells_it(self, images, image_id):
        for media_type, samples in IMAGES.items():
            for image in samples:
                images.put(image_id, image)
                self.assertEqual(json.loads(self.redis.get(f"image:{image_id}"))["mime_type"], media_type, image)
        for image in NO_IMAGES:
            self.refused(400, "not-an-image", images.put, image_id, image)

    @each_way
    def test_an_image_that_is_too_large_is_refused(self, images, image_id):
        self.refused(413, "body-too-large", images.put, image_id, png(LIMIT))
        self.refused(413, "body-too-large", images.put, image_id, png(LIMIT * 3 // 4))
        self.assertIsNone(images.url(image_id))
        self.served(images.put(image_id, (image := png(LIMIT // 2))), image)

    @each_way
    def test_any_bytes_are_taken_and_text_is_not(self, images, image_id):
        image = png()
        for same in (bytearray(image), memoryview(image)):
            self.served(images.put(image_id, same), image)
        with self.assertRaises(TypeError):
            images.put(image_id, "text")

    @each_way
    def test_both_ways_write_the_same_record(self, images, image_id):
        image = png()
        start = int(time.time())
        images.put(image_id, image)
        value = self.redis.get(f"image:{image_id}")
        created = json.loads(value)["created_at"]
        self.assertTrue(start <= created <= time.time())
        encoded = base64.b64encode(image).decode()
        record = {"mime_type": "image/png", "created_at": created, "base64_data": encoded}
        self.assertEqual(value, json.dumps(record, separators=(",", ":")).encode())

    def test_a_base_makes_addresses_absolute(self):
        for base in ("https://images.example", "https://images.example/"):
            for store in (self.redis, SERVER):
                images = Images(store, token=TOKEN, base=base)
                url = images.put("absolute", png())
                self.assertTrue(url.startswith("https://images.example/images/absolute?v="), url)
                self.assertEqual(images.url("absolute"), url)

    def test_a_key_prefix_is_used(self):
        images = Images(self.redis, key_prefix="other:")
        images.put("prefixed", png(), ttl=60)
        self.assertEqual(self.redis.exists("other:prefixed", "image:prefixed"), 1)
        self.assertTrue(images.url("prefixed"))
        self.assertTrue(images.delete("prefixed"))

    def test_a_write_needs_the_token_and_a_read_does_not(self):
        for make in (Images, InThreads):
            error = self.refused(401, "invalid-token", make(SERVER, token="x" * 20).put, "token", png())
            self.assertIn("401", str(error))
            self.assertEqual(str(pickle.loads(pickle.dumps(error))), str(error))
            self.refused(401, "unauthorised", make(SERVER).put, "token", png())
            self.refused(401, "unauthorised", make(SERVER).delete, "token")
            url = make(SERVER, token=f"{TOKEN}\n").put("token", png())
            self.assertEqual(make(SERVER).url("token"), url)

    def test_a_broken_record_is_an_error_of_the_server(self):
        self.redis.set("image:broken", "{}", ex=60)
        self.refused(502, "", Images(SERVER).url, "broken")

    def test_many_at_a_time(self):
        async def write(store):
            images = AsyncImages(store, token=TOKEN)
            pictures = {f"many_{number}": png() for number in range(20)}
            urls = await asyncio.gather(*(images.put(*it) for it in pictures.items()))
            if isinstance(store, redis.asyncio.Redis):
                await store.aclose()
            return zip(urls, pictures.values())

        for make in (lambda: SERVER, lambda: redis.asyncio.from_url(REDIS)):

            async def all_of():
                return await write(make())

            for url, image in asyncio.run(all_of()):
                self.served(url, image)

    def test_a_client_that_blocks_does_not_hold_up_the_loop(self):
        class Slow:
            def __init__(self):
                self.released = threading.Event()

            def delete(self, name):
                return self.released.wait(PATIENCE)

        async def delete():
            slow = Slow()
            deleting = asyncio.create_task(AsyncImages(slow).delete("slow"))
            await asyncio.sleep(0)    # the deletion begins
            slow.released.set()
            return await deleting

        self.assertIs(asyncio.run(delete()), True)

    def test_stores_that_cannot_be(self):
        for store in ("redis://127.0.0.1", "127.0.0.1:8000", "http://", ""):
            with self.assertRaisesRegex(ValueError, "http://127.0.0.1:8000"):
                Images(store)

        async def misuse():
            client = redis.asyncio.from_url(REDIS)
            with self.assertRaisesRegex(TypeError, "AsyncImages"):
                Images(client).put("misused", png())
            await client.aclose()

        with self.assertWarnsRegex(RuntimeWarning, "never awaited"):
            asyncio.run(misuse())
        self.assertIsNone(self.redis.get("image:misused"))

    def test_a_server_that_is_not_there_is_an_os_error(self):
        for make in (Images, InThreads):
            with self.assertRaises(OSError):
                make("http://127.0.0.1:1", token=TOKEN).put("nowhere", png())
        with self.assertRaises(redis.ConnectionError):
            Images(redis.Redis(port=1)).put("nowhere", png())


class Elsewhere(unittest.TestCase):
    """Answers of something between the module and the server."""

    def answer(self, status: int, headers: "dict[str, str]", body: bytes = b""):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.send_response(status)
                for field in headers.items():
                    self.send_header(*field)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_PUT = do_DELETE = do_HEAD

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        return Images(f"http://127.0.0.1:{server.server_port}/images.example")

    def test_a_redirect_to_the_object_store_has_the_etag(self):
        images = self.answer(307, {"ETag": '"5d41402abc4b2a76b9719d911017c592"', "Location": "http://127.0.0.1:1/"})
        self.assertEqual(images.url("a"), "/images/a?v=5d41402abc4b2a76b9719d911017c592")
        for write in (lambda: images.put("a", png()), lambda: images.delete("a")):
            with self.assertRaises(ImageError):
                write()

    def test_a_weak_etag_names_the_version_too(self):
        images = self.answer(200, {"ETag": 'W/"5d41402abc4b2a76b9719d911017c592"'})
        self.assertEqual(images.url("a"), "/images/a?v=5d41402abc4b2a76b9719d911017c592")

    def test_an_answer_of_something_else_is_an_error_that_says_so(self):
        for status, detail in ((200, "Afterimage"), (302, "Afterimage"), (500, "Internal"), (502, "Bad Gateway")):
            images = self.answer(status, {"Content-Type": "text/html"}, b"<p>hello")
            for call in (lambda: images.put("a", png()), lambda: images.url("a")):
                with self.assertRaisesRegex(ImageError, f"{detail}.*{status}"):
                    call()


class Package(unittest.TestCase):
    def test_the_program_comes_with_it(self):
        version = metadata.version("afterimage")
        program = os.path.join(os.path.dirname(sys.executable), "afterimage")
        for command in ([program], [sys.executable, "-m", "afterimage"]):
            said = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
            self.assertTrue(said.startswith(f"afterimage {version}"), said)
        refused = subprocess.run([sys.executable, "-m", "afterimage", "--unknown"], capture_output=True)
        self.assertEqual(refused.returncode, subprocess.run([program, "--unknown"], capture_output=True).returncode)
        self.assertNotEqual(refused.returncode, 0)

    def test_it_is_typed_and_needs_nothing(self):
        self.assertTrue(os.path.exists(os.path.join(os.path.dirname(afterimage.__file__), "py.typed")))
        self.assertEqual([it for it in metadata.requires("afterimage") or [] if "extra" not in it], [])


if __name__ == "__main__":
    unittest.main()
