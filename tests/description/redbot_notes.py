"""REDbot's notes about a response as JSON. Its own command prints text only, and can't send header fields.

    redbot_notes.py URL [NAME:VALUE ...]

Requests the URL with these fields and, if the response allows it, again as REDbot does: with the validators, for a
range, and compressed. Prints a JSON array with an object for each response: `check` (`default` is the request itself),
`status`, and `notes`, each with `level` (good, info, warning, bad), `name`, `subject` and `summary`.
"""

import json
import sys
from configparser import ConfigParser

import thor

from redbot.resource import HttpResource


def main() -> None:
    url, fields = sys.argv[1], [tuple(field.split(":", 1)) for field in sys.argv[2:]]
    config = ConfigParser()
    # Without this REDbot refuses local addresses.
    config["redbot"] = {"enable_local_access": "True"}
    resource = HttpResource(config["redbot"])
    resource.set_request(url, headers=fields)
    resource.on("check_done", thor.stop)
    resource.check()
    # A response that came at once has stopped the loop already.
    if not resource.check_done:
        thor.run()
    requests = [resource, *resource.subreqs.values()]
    json.dump([answer(it) for it in requests if it.fetch_started], sys.stdout, indent=1)


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
