"""What REDbot notes about an answer, for programs: its own command writes for people, and can't send a field.

    redbot_notes.py URL [NAME:VALUE ...]

Requests the URL with these fields and, where the answer is fit for it, again as REDbot does: with the validators, for
a part, and compressed. Prints an array in JSON with an object for each answer: `check` (`default` is the request
itself), `status`, and `notes`, each with its `level` (good, info, warning, bad), `name`, `subject` and `summary`.
"""

import json
import sys
from configparser import ConfigParser

import thor

from redbot.resource import HttpResource


def main() -> None:
    url, fields = sys.argv[1], [tuple(field.split(":", 1)) for field in sys.argv[2:]]
    config = ConfigParser()
    # Otherwise REDbot asks nobody on this machine.
    config["redbot"] = {"enable_local_access": "True"}
    resource = HttpResource(config["redbot"])
    resource.set_request(url, headers=fields)
    resource.on("check_done", thor.stop)
    resource.check()
    # An answer that came at once has stopped the loop already.
    if not resource.check_done:
        thor.run()
    asked = [resource, *resource.subreqs.values()]
    json.dump([answer(it) for it in asked if it.fetch_started], sys.stdout, indent=1)


def answer(fetched) -> dict:
    if fetched.fetch_error is not None:
        sys.exit(f"{fetched}: {fetched.fetch_error!r}")
    return {
        "check": fetched.check_id,
        "status": fetched.response.status_code,
        "notes": list(flat(fetched.response.notes)),
    }


def flat(notes):
    for note in notes:
        yield {
            "level": note.level.value,
            "name": type(note).__name__,
            "subject": note.subject,
            "summary": str(note.summary),
        }
        yield from flat(note.subnotes)


if __name__ == "__main__":
    main()
