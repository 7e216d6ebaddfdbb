"""Runs the program that the wheel brings: `python -m afterimage serve`."""

from __future__ import annotations

import os
import sys
import sysconfig


def find_program() -> str:
    """Returns the path of the program: in the folder of scripts of this Python, of its base, of its user, or beside a
    package that was installed with `--target` or `--prefix`."""
    package = os.path.dirname(os.path.abspath(__file__))
    library = os.path.dirname(package)
    user = sysconfig.get_preferred_scheme("user") if sys.version_info >= (3, 10) else f"{os.name}_user"
    folders = [
        sysconfig.get_path("scripts"),
        sysconfig.get_path("scripts", vars={"base": sys.base_prefix}),
        os.path.join(library, "bin"),
        os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(library))), "bin"),
        sysconfig.get_path("scripts", scheme=user),
    ]
    name = "afterimage" + (sysconfig.get_config_var("EXE") or "")
    for folder in folders:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise FileNotFoundError(f"the program afterimage must be in one of {', '.join(dict.fromkeys(folders))}")


def main() -> None:
    """Becomes the program, with the arguments of this process."""
    program = find_program()
    if sys.platform == "win32":
        import subprocess

        sys.exit(subprocess.run([program, *sys.argv[1:]], check=False).returncode)
    os.execv(program, [program, *sys.argv[1:]])


if __name__ == "__main__":
    main()
