"""Packs a program into a wheel, installs that in a fresh environment, runs the lines of README.md, then the tests.

    target/python/bin/python clients/python/tests/run.py target/debug/afterimage [TESTS]

Needs cargo and redis-server, and in the Python that runs it pip, maturin and redis-py. Nothing is compiled or fetched.
"""

import base64
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent
TOKEN = "a-token-of-the-tests"
# A PNG of one grey pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
PATIENCE = 20


def until(what: str, ask):
    """Polls until there is an answer."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := ask()):
        if time.monotonic() > deadline:
            sys.exit(f"waited {PATIENCE} s in vain until {what}")
        time.sleep(0.01)
    return answer


class Running:
    """Programs that are ended with the tests."""

    def __enter__(self):
        self.programs = []
        return self

    def __exit__(self, *_):
        for program in reversed(self.programs):
            program.kill()
            program.wait()

    def start(self, command, log: Path, **options):
        with log.open("wb") as file:
            self.programs.append(subprocess.Popen(command, stdout=file, stderr=file, **options))

    def serve(self, command, log: Path, **options) -> str:
        """Starts a server on a free port. Returns its address, once it answers."""
        self.start(command, log, **options)
        printed = lambda: re.search(rb"serves (http://[\d.:]+)/", log.read_bytes())
        try:
            return until("the server printed its address", printed)[1].decode()
        except SystemExit:
            print(log.read_text(), file=sys.stderr)
            raise


def pack(program: Path, folder: Path) -> Path:
    """Returns a wheel with the program, made by maturin, for which tests/stand-in/cargo stands in for the build."""
    path = os.environ["PATH"]
    env = {
        **os.environ,
        "PATH": f"{HERE / 'stand-in'}:{path}",
        "AFTERIMAGE_PATH": path,
        "AFTERIMAGE_PROGRAM": str(program.resolve()),
        "AFTERIMAGE_FOLDER": str(folder),
        "CARGO_TARGET_DIR": str(folder / "target"),
    }
    # A test run by cargo has variables of cargo that a build of its own hasn't.
    env.pop("CARGO", None)
    command = [sys.executable, "-m", "maturin", "build", "--offline", "--compatibility", "linux"]
    command += ["--compression-method", "stored", "--out", str(folder)]
    identity = lambda it: (it.st_ino, it.st_ctime_ns)
    before = identity(program.stat())
    subprocess.run(command, check=True, cwd=PACKAGE, env=env, stdout=subprocess.DEVNULL)
    assert identity(program.stat()) == before, "the program must be left alone: other tests run it"
    return next(folder.glob("*.whl"))


def blocks(language: str):
    """Returns the code in README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", (PACKAGE / "README.md").read_text(), re.M | re.S)


def main() -> None:
    program, tests = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as name, Running() as running:
        folder = Path(name)
        wheel = pack(program, folder)
        redis = f"{folder}/redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", redis, "--save", "", "--dir", name]
        running.start(command, folder / "redis.log")

        # Without redis-py: the module needs none for HTTP.
        home = folder / "home"
        home.mkdir()
        scripts = folder / "venv/bin"
        python = str(scripts / "python")
        environment = {"PATH": f"{scripts}:{os.environ['PATH']}", "HOME": str(home)}
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)

        start = time.monotonic()
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        subprocess.run([*pip, "install", "--quiet", "--no-index", wheel], check=True)
        assert blocks("sh")[1] == "afterimage\n", "README.md starts the server with the bare command"
        embedded = {**environment, "PORT": "0"}
        base = running.serve(["afterimage"], folder / "embedded.log", cwd=home, env=embedded)
        over_http, into_redis = blocks("python")
        (home / "picture.png").write_bytes(base64.b64decode(PIXEL))
        lines = over_http.replace("8000", base.rpartition(":")[2])
        url = subprocess.check_output([python, "-c", lines], cwd=home, env=environment, text=True).strip()
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == (home / "picture.png").read_bytes()
        print(f"{time.monotonic() - start:.1f} s from `pip install` of the wheel to the first image of one's own", flush=True)

        settings = {
            **environment,
            "PORT": "0",
            "REDIS_URL": f"redis+unix://{redis}",
            "AFTERIMAGE_WRITES_TOKENS": f'["{TOKEN}"]',
            "AFTERIMAGE_RECORDS_MAX_VALUE": "1MiB",
            # Most images of the tests are a signature and a text.
            "AFTERIMAGE_WRITES_VERIFY": "false",
        }
        until("Redis listens", lambda: os.path.exists(redis))
        base = running.serve(["afterimage"], folder / "redis-server.log", cwd=home, env=settings)
        ready = lambda: urllib.request.urlopen(f"{base}/readyz").status == 200
        until("the server is ready", lambda: quiet(ready))
        with_redis = {**environment, "PYTHONPATH": sysconfig.get_path("purelib")}
        lines = into_redis.replace("redis.Redis()", f"redis.Redis(unix_socket_path={redis!r})")
        lines = f'png = open("picture.png", "rb").read()\n{lines}\nprint(url)'
        url = subprocess.check_output([python, "-c", lines], cwd=home, env=with_redis, text=True).strip()
        with urllib.request.urlopen(base + url) as answer:
            assert answer.read() == (home / "picture.png").read_bytes()

        with_redis["AFTERIMAGE_TEST_REDIS"] = f"unix://{redis}"
        with_redis["AFTERIMAGE_TEST_SERVER"] = base
        with_redis["AFTERIMAGE_TEST_TOKEN"] = TOKEN
        command = [python, HERE / "test_afterimage.py", *tests]
        sys.exit(subprocess.run(command, cwd=home, env=with_redis, check=False).returncode)


def quiet(ask):
    """Returns the answer, and nothing while there is a failure."""
    try:
        return ask()
    except OSError:
        return None


if __name__ == "__main__":
    main()
