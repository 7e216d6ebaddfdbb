#!/usr/bin/env python3
"""Runs what the documents tell their readers to type: the fenced blocks of README.md, docs/ and clients/*/README.md.

    target/python/bin/python tests/docs.py PROGRAM [REDIS_SERVER] [DOCUMENT...]

PROGRAM is a built `afterimage`. A line is printed for each block: ran, checked, or not run and why. The exit code is 1 if any
failed. A block that isn't run must say why, in a comment before it.

Each document has a folder, a home and a shell of its own, which its blocks run in one after the other, as if a reader typed them.
The ports 8000, 8001 and 6379 of the text are others, which are free. The folder looks like a checkout, with `picture.png` and
PROGRAM as `target/release/afterimage`; `cargo run --release` and `cargo install` use PROGRAM in place of what they would build. `pip
install` finds what target/python has, and fetches nothing.
Python blocks of a document share their names, and have `png`, the bytes of that picture. A document that speaks of a Redis and
starts none has one.

    sh, python      run
    html, js, ...   parsed; scripts within HTML too
    toml            given to PROGRAM as a settings file
    json, ini       parsed
    none            text: output, or an illustration

Links between the documents are followed, to the heading.

Comments in Markdown, before a block and invisible to readers:

    <!-- not run: needs Docker -->          the block isn't run
    <!-- no block is run: REASON -->        none of the document is, anywhere in it
    <!-- file: main.py -->                  the reader saves the block under this name
    <!-- goes on: http://127.0.0.1:8000 --> the block ends with a command that goes on, in a terminal of its own, until another one
                                            takes its address; it has started when it answers there, or listens where there is no http:
    <!-- server: --http-max-age 1m -->      a server runs already, with these flags
    <!-- fails: TEXT -->                    the block fails, and says TEXT
    <!-- given: TOKEN=secret -->            what the reader has to put in, in the language of the block

And where readers look at a page:

    <!-- open: http://127.0.0.1:8001 -->    it is opened in Chromium, and each of its images is drawn in the end
    <!-- see: 3 images -->                  it comes to have drawn so many images
    <!-- see: another image -->             without a reload, an image of it is replaced by another
"""

import ast
import configparser
import contextlib
import html.parser
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSER = ROOT / "target/browser"
PORTS = ("8000", "8001", "6379")
# Longest time for one block, and for a server to start. A machine with other work takes long.
PATIENCE = 30
SCRIPTS = {"js": "js", "jsx": "jsx", "ts": "ts", "tsx": "tsx"}
MARKS = ("not run", "no block is run", "file", "goes on", "server", "fails", "given", "open", "see")


class Failed(Exception):
    """A block that doesn't do what its document says."""


@dataclass
class Block:
    """A fenced block, or a look at a page (`open`, `see`)."""

    line: int
    language: str
    text: str = ""
    marks: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> list[Block]:
    """Finds the blocks of a document, each with the comments right before it."""
    blocks, marks, fence = [], {}, None
    for number, line in enumerate(text.splitlines(), 1):
        if fence is not None:
            if line.strip() == fence[1]:
                fence[0].text = "\n".join(fence[2]) + "\n"
                fence = None
            else:
                fence[2].append(line.removeprefix(fence[3]))
        elif match := re.match(r"(\s*)(```+)\s*(\w*)", line):
            block = Block(number, match[3], marks=marks)
            blocks.append(block)
            fence, marks = (block, match[2], [], match[1]), {}
        elif match := re.fullmatch(r"\s*<!-- ([a-z ]+):(.*)-->", line):
            if match[1] not in MARKS:
                raise SystemExit(f"line {number}: no such mark as `{match[1]}`; there are {', '.join(MARKS)}")
            if match[1] in ("open", "see"):
                blocks.append(Block(number, match[1], match[2].strip()))
            else:
                marks[match[1]] = match[2].strip()
        elif line.strip():
            marks = {name: it for name, it in marks.items() if name == "no block is run"}
    return blocks


class Sandbox:
    """The folder, the home, the shell and the terminals of a document's reader."""

    def __init__(self, folder: Path, program: Path, redis: str, text: str) -> None:
        self.folder, self.program = folder, program
        self.work, self.home, bin_, run = (folder / name for name in ("work", "home", "bin", "run"))
        for place in (self.work, self.home, bin_, run):
            place.mkdir(mode=0o700)
        self.ports = dict(zip(PORTS, free_ports(len(PORTS))))
        self.terminals: dict[str, subprocess.Popen] = {}
        self.python: subprocess.Popen | None = None
        for entry in ROOT.iterdir():
            if entry.name not in ("target", ".git"):
                (self.work / entry.name).symlink_to(entry)
        release = self.work / "target/release"
        release.mkdir(parents=True)
        for place in (release, bin_):
            (place / "afterimage").symlink_to(program)
        (self.work / "picture.png").write_bytes(png())
        # A refusal fails the block; curl would end with 0.
        (self.home / ".curlrc").write_text("fail\nsilent\nshow-error\n")
        script(bin_ / "cargo", f'[ "$1 $2" = "run --release" ] || {{ [ "$1" = install ] && exit; exit 1; }}; shift 2; [ "$1" != -- ] || shift; exec {program} "$@"')
        script(bin_ / "redis-server", f'exec {redis} --port {self.ports["6379"]} --save "" --dir {folder} "$@"')
        tools = Path(sys.executable).parent
        # Copying pip into an environment takes longer than all the rest.
        script(bin_ / "python3", f'[ "$1 $2" != "-m venv" ] || {{ shift 2; exec {sys.executable} -m venv --without-pip "$@"; }}; exec {sys.executable} "$@"')
        self.environment = {
            "PATH": f"{bin_}:{tools}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(run),
            # Read by the server; the default is no text that could be replaced.
            "PORT": self.ports["8000"],
            # Of the module, and of packages that an environment of the reader's has to have.
            "PYTHONPATH": f"{ROOT / 'clients/python/src'}:{sysconfig.get_path('purelib')}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "LANG": "C.UTF-8",
        }
        self.state = folder / "state.sh"
        self.state.write_text(f"cd {shlex.quote(str(self.work))}\n")
        if re.search(r"redis\.(asyncio\.)?Redis\(\)|6379", text) and not re.search(r"^redis-server", text, re.M):
            self.start("redis", [str(bin_ / "redis-server")])
            self.wait("redis", lambda: answer(f"127.0.0.1:{self.ports['6379']}"))

    def mapped(self, text: str) -> str:
        """Replaces the ports of a text by those of this sandbox."""
        text = re.sub(r"(?<!\d)(8000|8001|6379)(?!\d)", lambda it: self.ports[it[0]], text)
        return re.sub(r"(redis\.(asyncio\.)?Redis)\(\)", rf"\1(port={self.ports['6379']})", text)

    def start(self, name: str, command: list[str]) -> None:
        """Starts a command in a terminal of its own. What had its address is stopped first."""
        self.stop(name)
        with open(self.log(name), "w") as log:
            self.terminals[name] = subprocess.Popen(
                command, env=self.environment, cwd=self.work, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def log(self, name: str) -> Path:
        return self.folder / re.sub(r"\W+", "-", f"{name}.log")

    def wait(self, name: str, answers) -> None:
        """Waits until a terminal's command answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self.terminals[name].poll() is not None
            try:
                if ended:
                    raise OSError("ended")
                return answers()
            except OSError as error:
                if ended or time.monotonic() > deadline:
                    words = "ended" if ended else f"doesn't answer: {error}"
                    raise Failed(f"{name} {words}\n{self.log(name).read_text()}") from None
                time.sleep(0.02)

    def stop(self, name: str) -> None:
        """Presses Ctrl-C in a terminal."""
        process = self.terminals.pop(name, None)
        if process is None:
            return
        for sent in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                return

    def close(self) -> None:
        if self.python:
            self.python.stdin.close()
            self.python.wait(10)
        for name in list(self.terminals):
            self.stop(name)

    def goes_on(self, url: str, text: str, given: str) -> None:
        """Runs a block whose last command goes on, until it answers."""
        # A reader's shell has what earlier blocks exported.
        place = re.search(r"[\w.]+:\d+", url)[0]
        self.start(place, ["bash", "-euo", "pipefail", "-c", f". {self.state}\n{given}\n{text}"])
        self.wait(place, lambda: answer(url))

    def serve(self, flags: str) -> None:
        """Starts the server that a document takes for granted."""
        place = f"127.0.0.1:{self.ports['8000']}"
        self.start(place, [str(self.program), *shlex.split(flags)])
        self.wait(place, lambda: answer(f"http://{place}/readyz"))

    def shell(self, text: str, given: str, fails: str | None) -> None:
        """Runs a block in the document's shell: with its folder and its variables."""
        end = f"pwd | sed 's/.*/cd \"&\"/' > {self.state}.new; export -p >> {self.state}.new; mv {self.state}.new {self.state}"
        whole = f". {self.state}\nset -a\n{given}\n{text}\n{{ {end}; }}"
        ran = run(["bash", "-euo", "pipefail", "-c", whole], env=self.environment, cwd=self.work)
        expect(ran.returncode, ran.stdout, fails)

    def python_block(self, text: str, given: str, fails: str | None) -> None:
        """Runs a block in the document's Python."""
        if self.python is None:
            command = [sys.executable, "-u", __file__, "--python-blocks", str(self.work / "picture.png")]
            self.python = subprocess.Popen(
                command, env=self.environment, cwd=self.work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        timer = threading.Timer(PATIENCE, self.python.kill)
        timer.start()
        self.python.stdin.write(json.dumps([given, text]) + "\n")
        self.python.stdin.flush()
        line = self.python.stdout.readline()
        timer.cancel()
        if not line.startswith("["):
            raise Failed(f"Python ended: {line}")
        failed, output = json.loads(line)
        expect(failed, output, fails)


def python_blocks(picture: str) -> None:
    """Runs blocks that come as lines of JSON, in one namespace."""
    names = {"__name__": "__main__", "png": Path(picture).read_bytes()}
    for line in sys.stdin:
        output, failed = io.StringIO(), 0
        with contextlib.redirect_stdout(output):
            for text in json.loads(line):
                try:
                    code = compile(text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                    waits = eval(code, names)
                    if waits is not None:
                        import asyncio

                        asyncio.run(waits)
                except BaseException:
                    output.write(traceback.format_exc())
                    failed = 1
                    break
        print(json.dumps([failed, output.getvalue()]))


def expect(code: int, output: str, fails: str | None) -> None:
    if fails is None and code != 0:
        raise Failed(f"it ended with {code}\n{output}")
    if fails is not None and (code == 0 or fails not in output):
        raise Failed(f"it should fail and say `{fails}`, and ended with {code}\n{output}")


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, with all that it started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise Failed(f"it goes on after {PATIENCE} s; mark it with `goes on` if it should\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def answer(url: str) -> None:
    """Fetches a page, which may be missing but not broken. Of an address without http:// the port has to be open."""
    if "://" not in url:
        host, port = url.split(":")
        return socket.create_connection((host, int(port)), 5).close()
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise OSError(f"{error.code}") from None


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(it.getsockname()[1]) for it in sockets]
    for it in sockets:
        it.close()
    return ports


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def png() -> bytes:
    """A small picture, without a library."""
    rows = b"".join(b"\0" + b"".join(bytes([x * 2, y * 2, 160]) for x in range(96)) for y in range(96))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (96).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class Scripts(html.parser.HTMLParser):
    """Parses HTML: collects its scripts, and refuses tags that are closed in another order."""

    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

    # Their end may be left out.
    OPTIONAL = {"html", "head", "body", "p", "li", "option"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        unclosed = [tag for tag in self.open if tag not in self.OPTIONAL]
        if unclosed:
            raise Failed(f"<{unclosed[-1]}> isn't closed")

    def handle_starttag(self, tag: str, attributes) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attributes) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in self.OPTIONAL:
            self.open.pop()
        if not self.open or self.open.pop() != tag:
            raise Failed(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data


class Node:
    """A Node process that parses scripts and looks at pages, started when it is needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, **question) -> None:
        if self.process is None:
            chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
            command = ["node", str(ROOT / "tests/browser/docs.mjs"), str(BROWSER), chromium]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed("tests/browser/docs.mjs ended; it needs Node, Chromium and target/browser: run tests/run.sh, which installs them")
        if error := json.loads(line)["error"]:
            raise Failed(error)

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait(30)


@dataclass
class Runner:
    program: Path
    redis: str
    node: Node = field(default_factory=Node)
    counts: dict[str, int] = field(default_factory=dict)

    def document(self, path: Path) -> None:
        name, text = path.relative_to(ROOT), path.read_text()
        blocks = parse(text)
        none = re.search(r"^<!-- no block is run: (.*) -->$", text, re.M)
        sandbox = None
        try:
            for block in blocks:
                began = time.monotonic()
                why = none[1] if none else block.marks.get("not run")
                try:
                    if why is None and sandbox is None and (block.language not in ("", "mermaid")):
                        folder = Path(tempfile.mkdtemp(prefix="docs-"))
                        sandbox = Sandbox(folder, self.program, self.redis, text)
                    outcome = f"not run: {why}" if why else self.block(block, sandbox)
                except Failed as failure:
                    outcome = f"FAILED: {failure}"
                took = time.monotonic() - began
                self.counts[outcome.split(":")[0]] = self.counts.get(outcome.split(":")[0], 0) + 1
                print(f"{name}:{block.line} {block.language or 'text'}: {outcome}" + (f" ({took:.1f} s)" if took > 0.1 else ""), flush=True)
            self.links(path)
        finally:
            if sandbox:
                sandbox.close()
                shutil.rmtree(sandbox.folder, ignore_errors=True)

    def links(self, path: Path) -> None:
        for line, why in broken_links(path, path.read_text()):
            self.counts["FAILED"] = self.counts.get("FAILED", 0) + 1
            print(f"{path.relative_to(ROOT)}:{line} link: FAILED: {why}")

    def block(self, block: Block, sandbox: Sandbox) -> str:
        """Runs or checks a block. Returns what was done."""
        language, marks = block.language, block.marks
        if language in ("", "mermaid"):
            return "not run: text" if not language else "not run: a diagram"
        text, given = sandbox.mapped(block.text), sandbox.mapped(marks.get("given", ""))
        fails = marks.get("fails")
        if "server" in marks:
            sandbox.serve(sandbox.mapped(marks["server"]))
        if language in ("open", "see"):
            self.node.ask(**{language: text})
            return "seen"
        if "file" in marks:
            here = run(["bash", "-c", f". {sandbox.state}; pwd"]).stdout.strip()
            (Path(here) / marks["file"]).write_text(text)
        if language == "sh" and "goes on" in marks:
            sandbox.goes_on(sandbox.mapped(marks["goes on"]), text, given)
        elif language == "sh":
            sandbox.shell(text, given, fails)
        elif language == "python" and "file" not in marks:
            sandbox.python_block(text, given, fails)
        else:
            self.check(language, text, sandbox)
            return "saved" if "file" in marks else "checked"
        return "ran"

    def check(self, language: str, text: str, sandbox: Sandbox) -> None:
        try:
            if language == "html":
                for it in Scripts(text).scripts:
                    self.node.ask(script=it, loader="js")
            elif language in SCRIPTS:
                self.node.ask(script=text, loader=SCRIPTS[language])
            elif language == "json":
                json.loads(text)
            elif language == "ini":
                configparser.ConfigParser().read_string(text if text.startswith("[") else f"[x]\n{text}")
            elif language == "python":
                compile(text, "block", "exec")
            elif language == "toml":
                file = sandbox.folder / "settings.toml"
                file.write_text(text)
                ran = run([str(self.program), "--config", str(file), "config"], env=sandbox.environment)
                expect(ran.returncode, ran.stdout, None)
            else:
                raise Failed(f"nothing runs or checks `{language}`; say why before the block: <!-- not run: … -->")
        except (ValueError, SyntaxError, configparser.Error) as error:
            raise Failed(str(error)) from None


def broken_links(path: Path, text: str):
    """Finds links to files or headings that aren't there."""
    prose = re.sub(r"^(```+).*?^\1", lambda it: "\n" * it[0].count("\n"), text, flags=re.S | re.M)
    for number, line in enumerate(prose.splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!\[)`[^`]*`(?!\])", "", line)):
            if "://" in target or target.startswith("mailto:"):
                continue
            file, _, fragment = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            if not place.exists():
                yield number, f"there is no {file}"
            elif fragment and place.suffix == ".md" and fragment not in anchors(place.read_text()):
                yield number, f"{file or path.name} has no heading #{fragment}"


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives to headings. Of equal ones the later have a number."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.*)", re.sub(r"^(```+).*?^\1", "", text, flags=re.S | re.M), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not count else f"{name}-{count}" for name, most in found.items() for count in range(most + 1)}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "clients").glob("*/README.md"))]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--python-blocks"]:
        python_blocks(arguments[1])
        return 0
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    program = Path(arguments[0]).resolve()
    redis = shutil.which(arguments[1] if len(arguments) > 1 else "redis-server")
    if redis is None:
        raise SystemExit("redis-server is needed: apt-get install redis-server")
    chosen = [ROOT / it for it in arguments[2:]] or documents()
    runner, began = Runner(program, redis), time.monotonic()
    try:
        for path in chosen:
            runner.document(path)
        for path in [] if arguments[2:] else [*ROOT.glob("*.md"), ROOT / "benches/README.md", *ROOT.glob("examples/*/README.md")]:
            if path not in chosen:
                runner.links(path)
    finally:
        runner.node.close()
    counts = ", ".join(f"{count} {what}" for what, count in sorted(runner.counts.items()))
    print(f"{counts} in {time.monotonic() - began:.0f} s")
    return int("FAILED" in runner.counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
