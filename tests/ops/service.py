"""Checks the systemd units and what goes into the Debian package.

    apt-get install systemd
    python3 tests/ops/service.py [PROGRAM]

PROGRAM, target/debug/afterimage by default, is started with the settings of the package. Needs Python 3.11 and its standard
library alone, and takes a second or two.
"""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
PROGRAM = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/afterimage")
UNITS = ["afterimage.service", "afterimage.socket"]
# `systemd-analyze security`, of ten: below two is the best that a server on the network gets.
MOST_EXPOSED = 2.0


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def check_units(folder):
    for name in UNITS:
        # The program isn't installed here.
        text = (CONFIG / name).read_text().replace("/usr/bin/afterimage", PROGRAM)
        (folder / name).write_text(text)
    run("systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in UNITS))
    report = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(folder / UNITS[0]))
    exposure = float(re.search(r"Overall exposure level .*: ([0-9.]+)", report)[1])
    assert exposure < MOST_EXPOSED, report
    service = (CONFIG / UNITS[0]).read_text()
    defaults = tomllib.loads((CONFIG / "afterimage.toml").read_text())
    times = [defaults["http"][it] for it in ("shutdown_delay", "shutdown_timeout")]
    patience = int(re.search(r"^TimeoutStopSec=(\d+)s$", service, re.M)[1])
    assert patience > sum(int(it.removesuffix("s")) for it in times), "killed before it has stopped"
    files = int(re.search(r"^LimitNOFILE=(\d+)$", service, re.M)[1])
    assert files > defaults["limits"]["connections"], "fewer files than connections"
    # The same memory settings as in the container, and as with `cargo run`.
    tunables = r"GLIBC_TUNABLES=(\S+)"
    in_service = re.search(tunables, service)[1]
    assert in_service == re.search(tunables, (ROOT / "Dockerfile").read_text())[1]
    cargo = tomllib.loads((ROOT / ".cargo/config.toml").read_text())
    assert in_service == cargo["env"]["GLIBC_TUNABLES"]
    return exposure


def check_package():
    package = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["metadata"]["deb"]
    for source, *_ in package["assets"]:
        assert source.startswith("target/release/") or list(ROOT.glob(source)), f"{source} is missing"
    there = {pathlib.PurePath(target.removesuffix("/") if not target.endswith("/") else target + pathlib.PurePath(source).name)
             for source, target, _ in package["assets"]}
    for file in package["conf-files"]:
        assert pathlib.PurePath(file.removeprefix("/")) in there, file
    for script in ("postinst", "prerm", "postrm"):
        run("sh", "-n", str(CONFIG / "debian" / script))


def check_settings(folder):
    """Starts the program with the settings file of the package."""
    with socket.create_server(("127.0.0.1", 0)) as public, socket.create_server(("127.0.0.1", 0)) as admin:
        ports = [it.getsockname()[1] for it in (public, admin)]
    command = [PROGRAM, "--config", str(CONFIG / "debian/afterimage.toml"), "--embedded-dir", str(folder)]
    command += ["--http-listen", f"127.0.0.1:{ports[0]}", "--admin-listen", f"127.0.0.1:{ports[1]}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/readyz", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.02)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, (folder / "log").read_text()


with tempfile.TemporaryDirectory() as name:
    exposure = check_units(pathlib.Path(name))
    print(f"the units pass systemd-analyze; exposure {exposure}")
    check_package()
    print("the Debian package has its files")
    check_settings(pathlib.Path(name))
    print("the program takes the package's settings")
