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
        http = {"token": TOKEN}
        cls.ways = {
            "Redis": Images(cls.redis),
            "Redis, text": Images(redis.from_url(REDIS, decode_responses=True)),
            "HTTP": Images(SERVER, **http),
            "HTTP, slash": Images(SERVER + "/", **http),
            "Redis, async": InThreads(lambda: redis.asyncio.from_url(REDIS)),
            "Redis, async, text": InThreads(lambda: redis.asyncio.from_url(REDIS, decode_responses=True)),
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
        for ttl, seconds in ((None, 7200), (60, 60)):
            start = time.monotonic()
            images.put(image_id, png(), **({"ttl": ttl} if ttl else {}))
            left = self.redis.pttl(f"image:{image_id}")
            elapsed = (time.monotonic() - start) * 1000 + 1
            self.assertTrue(seconds * 1000 - elapsed <= left <= seconds * 1000 or elapsed > seconds * 1000, (ttl, left))
        for ttl in (0, -1):
            with self.assertRaisesRegex(ValueError, "ttl"):
                images.put(image_id, png(), ttl=ttl)

    def test_the_server_bounds_the_life(self):
        error = self.refused(400, "bad-parameter", Images(SERVER, token=TOKEN).put, "long", png(), ttl=366 * 86400)
        self.assertIn("max_ttl", error.detail)

    @each_way
    def test_a_bad_id_is_refused_before_anything_is_sent(self, images, image_id):
        bad = ["", "x" * 129, "a b", "a/b", "ä", "-a", ".a", "a\n", "a?v=1", "a.webp", "a.avif", "a.jpg", "a.png"]
        for wrong in bad:
            for call in (images.delete, images.url, images.etag, lambda it: images.put(it, png())):
                with self.assertRaisesRegex(ValueError, "the id must"):
                    call(wrong)
        for good in ("_a", "0", "A.b_c:d~e-", "a.jpeg", "x" * 128):
            self.served(images.put(good, (image := png())), image)
            self.assertTrue(images.delete(good))

    def test_what_is_no_image_is_refused_over_http_and_answered_502_from_redis(self):
        for image in (b"plain text", png(LIMIT)):
            with self.assertRaises(ImageError) as caught:
                Images(SERVER, token=TOKEN).put("no_image", image)
            self.assertIn(caught.exception.type, ("not-an-image", "body-too-large"))
            self.assertEqual(fetch(Images(self.redis).put("no_image", image))[0], 502)

    @each_way
    def test_any_bytes_are_taken_and_text_is_not(self, images, image_id):
        image = png()
        for same in (bytearray(image), memoryview(image)):
            self.served(images.put(image_id, same), image)
        with self.assertRaises(TypeError):
            images.put(image_id, "text")

    @each_way
    def test_no_bytes_are_refused_before_anything_is_sent(self, images, image_id):
        for image in (b"", bytearray(), memoryview(b"")):
            with self.assertRaisesRegex(ValueError, "must have bytes"):
                images.put(image_id, image)
        self.assertFalse(self.redis.exists(f"image:{image_id}"))

    def test_in_redis_the_same_bytes_have_the_same_version(self):
        image = png()
        value = json.dumps({"base64_data": base64.b64encode(image).decode()}).encode()
        for images in (images for name, images in self.ways.items() if name.startswith("Redis")):
            url = images.put("same", image)
            self.assertEqual(self.redis.get("image:same"), value)
            self.assertEqual(url, f"/images/same?v={hashlib.md5(value).hexdigest()}")

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

    def test_stores_that_cannot_be(self):
        asynchronous = redis.asyncio.from_url(REDIS)
        for store in ("redis://127.0.0.1", "127.0.0.1:8000", "http://", "", asynchronous):
            with self.assertRaisesRegex(TypeError, "http://"):
                Images(store)
        for store in ("http://", self.redis):
            with self.assertRaisesRegex(TypeError, "redis.asyncio"):
                AsyncImages(store)

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

    def test_the_address_of_a_stored_image_is_the_one_that_the_server_names(self):
        images = self.answer(201, {"Content-Type": "application/json"}, b'{"url": "/images/a?v=1"}')
        self.assertEqual(images.put("a", png()), "/images/a?v=1")

    def test_a_weak_etag_names_the_version_too(self):
        images = self.answer(200, {"ETag": 'W/"5d41402abc4b2a76b9719d911017c592"'})
        self.assertEqual(images.url("a"), "/images/a?v=5d41402abc4b2a76b9719d911017c592")

    def test_an_answer_of_something_else_is_an_error_with_its_status(self):
        for status, detail in ((200, "OK"), (302, "Found"), (500, "Internal"), (502, "Bad Gateway")):
            images = self.answer(status, {"Content-Type": "text/html"}, b"<p>hello")
            for call in (lambda: images.put("a", png()), lambda: images.url("a")):
                with self.assertRaisesRegex(ImageError, f"{status}.*{detail}"):
                    call()


class Package(unittest.TestCase):
    def test_the_program_comes_with_it(self):
        version = metadata.version("afterimage-server")
        program = os.path.join(os.path.dirname(sys.executable), "afterimage")
        for command in ([program], [sys.executable, "-m", "afterimage"]):
            said = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
            self.assertTrue(said.startswith(f"afterimage {version}"), said)
        refused = subprocess.run([sys.executable, "-m", "afterimage", "--unknown"], capture_output=True)
        self.assertEqual(refused.returncode, subprocess.run([program, "--unknown"], capture_output=True).returncode)
        self.assertNotEqual(refused.returncode, 0)

    def test_it_is_typed_and_needs_nothing(self):
        self.assertTrue(os.path.exists(os.path.join(os.path.dirname(afterimage.__file__), "py.typed")))
        self.assertEqual([it for it in metadata.requires("afterimage-server") or [] if "extra" not in it], [])


if __name__ == "__main__":
    unittest.main()
