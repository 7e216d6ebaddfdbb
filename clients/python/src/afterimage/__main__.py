"""Runs the program that the wheel brings: `python -m afterimage serve`."""

import os
import subprocess
import sys
import sysconfig


def find_program() -> str:
    """Returns the path of the program: among the scripts of this Python or of its user, or beside the package (`pip --target`)."""
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bin")
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    folders = [sysconfig.get_path("scripts"), beside, user]
    for folder in folders:
        program = os.path.join(folder, "afterimage" + (sysconfig.get_config_var("EXE") or ""))
        if os.path.isfile(program):
            return program
    raise FileNotFoundError(f"the program afterimage must be in one of {', '.join(folders)}")


if __name__ == "__main__":
    command = [find_program(), *sys.argv[1:]]
    if sys.platform == "win32":
        sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)
