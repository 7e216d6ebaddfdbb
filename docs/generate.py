#!/usr/bin/env python3
"""Writes docs/reference/ from what the program is built of and what it says, with the standard library alone.

    docs/generate.py PROGRAM            writes the pages
    docs/generate.py --check PROGRAM    fails if a page differs from what would be written, and shows how

PROGRAM is a built `afterimage`, such as target/debug/afterimage: the page on metrics is what it answers. It runs for a
moment, on a free port and with a store in a temporary folder. Of log.md, which is written by hand, the fields of a request are
compared with those of a line that PROGRAM writes.
"""

import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs/reference"
SETTINGS = ROOT / "config/afterimage.toml"
DESCRIPTION = ROOT / "src/http/openapi.json"
PROBLEMS = ROOT / "src/http/problem.rs"
GRAMMAR = ROOT / "src/cli/grammar.rs"

# Longest line of a table and of prose. What would make a table wider is a list instead.
WIDTH = 140


def main(arguments: list[str]) -> int:
    check = arguments[:1] == ["--check"]
    if len(arguments) != 1 + check:
        print(__doc__, file=sys.stderr)
        return 2
    description = json.loads(DESCRIPTION.read_text())
    running = Running(arguments[-1])
    api = Api(description)
    pages = {
        "settings.md": settings(tomllib.loads(SETTINGS.read_text())),
        "http.md": http(api),
        "events.md": events(api),
        "problems.md": problems(api),
        "metrics.md": metrics(running.metrics),
    }
    failed = check_log(running.access_line)
    for name, text in pages.items():
        path = PAGES / name
        before = path.read_text() if path.exists() else ""
        if before == text:
            continue
        if not check:
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}: written")
            continue
        failed = True
        print(f"docs/reference/{name} isn't what docs/generate.py writes; run docs/generate.py PROGRAM:")
        difference = difflib.unified_diff(before.splitlines(), text.splitlines(), "committed", "generated", "", "", 1, "")
        print("\n".join(list(difference)[:40]))
    return int(failed)


class Running:
    """A server that ran for a moment: its metrics before any request, and the line that it logs for one."""

    def __init__(self, program: str) -> None:
        with tempfile.TemporaryDirectory(prefix="afterimage-docs-") as folder:
            clean = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
            flags = ["--http-listen", "127.0.0.1:0", "--embedded-dir", folder, "--embedded-demo", "false", "--log-format", "json"]
            log = Path(folder) / "log"
            with open(log, "w") as file:
                process = subprocess.Popen(
                    [Path(program).resolve(), *flags], env={**clean, "HOME": folder}, stdout=subprocess.PIPE, stderr=file, text=True
                )
            try:
                first = process.stdout.readline()
                address = re.search(r"http://[^/\s]+", first)
                if not address:
                    raise SystemExit(f"{program} didn't start: {first}{log.read_text()}")
                accept = {"Accept": "application/openmetrics-text"}
                request = urllib.request.Request(f"{address[0]}/metrics", headers=accept)
                with urllib.request.urlopen(request, timeout=30) as answer:
                    self.metrics = answer.read().decode()
                urllib.request.urlopen(f"{address[0]}/openapi.json", timeout=30).close()
                self.access_line = self._await_line(log)
            finally:
                process.terminate()
                process.communicate(timeout=30)

    @staticmethod
    def _await_line(log: Path) -> dict:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for text in log.read_text().splitlines():
                line = json.loads(text) if text.endswith("}") else {}
                if line.get("path") == "/openapi.json":
                    return line
            time.sleep(0.02)
        raise SystemExit("the request wasn't logged")


# --- Markdown ---------------------------------------------------------------------------------------------------------------


def page(title: str, sources: str, *parts: str) -> str:
    head = f"<!-- Written by docs/generate.py from {sources}. Change that instead. -->\n\n# {title}"
    return "\n\n".join([head, *(part.strip("\n") for part in parts if part)]) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """Breaks lines between words, but never within `code`."""
    text = re.sub(r"\s+", " ", text.strip())
    words = re.findall(r"(?:`[^`]*`|\S)+", text)
    lines, line = [], ""
    for word in words:
        longer = f"{line} {word}" if line else word
        if line and len(indent) + len(longer) > WIDTH:
            lines.append(line)
            longer = word
        line = longer
    return f"\n{indent}".join([*lines, line])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table, or a list where a row would be too wide."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *escaped]]
    lines.insert(1, "|" + "---|" * len(head))
    if max(map(len, lines)) <= WIDTH:
        return "\n".join(line.replace("|  |", "| |") for line in lines)
    return "\n".join(item(*row) for row in rows)


def item(name: str, *rest: str) -> str:
    """A line of a list: a name, short values in parentheses, and a description."""
    *values, text = [it for it in rest if it] or [""]
    between = f" ({', '.join(values)})" if values else ""
    return "- " + wrapped(f"**{name}**{between}: {text}" if text else f"**{name}**{between}", "  ")


def anchor(title: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def link(title: str, to: str = "") -> str:
    return f"[{title}]({to}#{anchor(title)})"


# --- settings.md ------------------------------------------------------------------------------------------------------------


def settings(defaults: dict) -> str:
    """Reads names and defaults as TOML, and the comments above them as descriptions."""
    short = dict(re.findall(r'^    \("([a-z_.]+)", "([a-z]+)", "', GRAMMAR.read_text(), re.M))
    if not short:
        raise SystemExit(f"there are no short flags in {GRAMMAR}")
    parts, comment, section, seen = [], [], "", 0
    overview = []
    for line in SETTINGS.read_text().splitlines():
        if line.startswith("# "):
            comment.append(line[2:])
        elif match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
            parts.append(f"## [{section}]")
            comment = []
        elif match := re.match(r"(\w+) = ", line):
            name, seen = match[1], seen + 1
            key = f"{section}.{name}"
            value = defaults[section][name]
            shown = "none" if value in ("", []) else f"`{json.dumps(value)}`"
            flags = [f"`--{flag}`" for flag in (key.replace(".", "-").replace("_", "-"), short.get(key)) if flag]
            variable = f"`AFTERIMAGE_{key.replace('.', '_').upper()}`"
            if comment:
                parts += [f"### [{section}] {name}", wrapped(" ".join(comment))]
                about = f"[{section}] {name}"
            else:
                # A comment is about all settings up to the next empty line.
                parts += [f"### [{section}] {name}", f"See {link(about)}."]
            parts.append(wrapped(f"Default: {shown}", "") + "\\\n" + f"{variable}, {', '.join(flags)}")
            overview.append((section, name))
        if not line:
            comment = []
        elif re.match(r"\w+ = ", line):
            comment = []
    if seen != sum(map(len, defaults.values())):
        raise SystemExit(f"{SETTINGS} has settings that aren't written as `name = value`")
    index = "\n".join(
        "- " + wrapped(f"**{link(f'[{section}]')}**: " + ", ".join(f"[{name}](#{section}-{name})" for of, name in overview if of == section), "  ")
        for section in defaults
    )
    intro = wrapped(
        "Every setting with its default, its environment variable and its flags. [Configuration](../configuration.md) explains how they are "
        "given, and how durations, sizes, addresses and lists are written. `afterimage config` prints the same as a file."
    )
    return page("Settings", "config/afterimage.toml", intro, index, *parts)


# --- openapi.json -----------------------------------------------------------------------------------------------------------


class Api:
    """The description of the service, with references resolved."""

    def __init__(self, description: dict) -> None:
        self.paths: dict = description["paths"]
        self.parts: dict = description["components"]
        self.tags: dict = {tag["name"]: tag["description"] for tag in description["tags"]}

    def get(self, it: dict) -> tuple[str, dict]:
        """Returns what is meant, with its name if it was referred to."""
        if "$ref" not in it:
            return "", it
        kind, name = it["$ref"].split("/")[-2:]
        return name, self.parts[kind][name]

    def operations(self, path: str) -> dict:
        return {method: it for method, it in self.paths[path].items() if method in ("get", "head", "put", "post", "delete")}

    def problems_of(self, response: dict) -> list[str]:
        """The types of problem that an answer may have."""
        schema = response.get("content", {}).get("application/problem+json", {}).get("schema", {})
        types = [part["properties"]["type"] for part in schema.get("allOf", []) if "type" in part.get("properties", {})]
        names = [name for it in types for name in it.get("enum", [it.get("const")]) if name]
        return [name.rsplit(":", 1)[-1] for name in names]

    def shape(self, schema: dict) -> str:
        """The type of a value, in few words."""
        name, schema = self.get(schema)
        if name:
            return link(name) if name in DESCRIBED else f"`{name}`"
        if "const" in schema:
            return f"`{json.dumps(schema['const'])}`" if not isinstance(schema["const"], str) else f"`{schema['const'] or 'empty'}`"
        if "enum" in schema:
            values = schema["enum"]
            return ", ".join(f"`{it}`" for it in values)
        if "allOf" in schema:
            return self.shape(schema["allOf"][0])
        kind = schema.get("type", "any value")
        kinds = kind if isinstance(kind, list) else [kind]
        if kinds == ["array"]:
            return f"list of {self.shape(schema.get('items', {}))}"
        return " or ".join(kinds)


# Schemas with a section of their own on the page, in this order.
DESCRIBED = ["ImageId", "Record", "StoredImage", "Info", "Listing", "ListedImage", "Status", "ReadWindow", "KnownKey", "Readiness", "Problem"]


def fields(api: Api, schema: dict, prefix: str = "") -> list[list[str]]:
    """Rows of an object's fields, those of objects within it included."""
    rows, required = [], schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        _, meant = api.get(field)
        kind = api.shape(field)
        if name not in required:
            kind += ", optional"
        if "properties" in field:
            rows.append([f"`{prefix}{name}`", kind, field.get("description", "")])
            rows += fields(api, field, f"{prefix}{name}.")
        else:
            text = field.get("description") or ("" if "$ref" in field else meant.get("description", ""))
            rows.append([f"`{prefix}{name}`", kind, text])
    return rows


def http(api: Api) -> str:
    parts = [
        wrapped(
            "Each address with its parameters and its answers, from [`openapi.json`](../../src/http/openapi.json), which the server has at "
            "`/openapi.json`. [HTTP](../http.md) explains how they work together; [Events](events.md) and [Problems](problems.md) have pages of "
            "their own."
        )
    ]
    rows = []
    for path in sorted(api.paths, key=order):
        for methods, operation in grouped(api.operations(path)):
            rows.append([f"[`{methods} {path}`](#{anchor(f'{methods} {path}')})", operation["summary"], needed(operation)])
    parts.append(table(["address", "", "needs"], rows))

    used_parameters, used_responses, tag = {}, {}, None
    for path in sorted(api.paths, key=order):
        common = api.paths[path].get("parameters", [])
        for methods, operation in grouped(api.operations(path)):
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
            parts.append(f"## {methods} {path}")
            parts.append(wrapped(f"{operation['summary']}. {operation.get('description', '')}"))
            parameters = [api.get(it) for it in [*common, *operation.get("parameters", [])]]
            lists = {"path": [], "query": [], "header": []}
            for name, it in parameters:
                used_parameters[name or f"{path} {it['name']}"] = it
                lists[it["in"]].append(f"[`{it['name']}`](#{anchor(titled(it))})")
            words = {"path": "In the path", "query": "Parameters", "header": "Headers"}
            lines = [item(words[kind], ", ".join(dict.fromkeys(names))) for kind, names in lists.items() if names]
            if body := operation.get("requestBody"):
                types = ", ".join(f"`{it}`" for it in body["content"])
                lines.append(item("Body", f"{types}. {body.get('description', '')}"))
            answers = []
            for status, it in operation["responses"].items():
                name, it = api.get(it)
                used_responses[name or f"{status} of {methods} {path}"] = (status, it)
                answers.append(f"[{status}](#{anchor(answer_title(name or f'{methods} {path}', status))})")
            parts.append("\n".join([*lines, item("Answers", ", ".join(answers))]))

    parts.append("## Parameters\n\nOf the path, of the query, and headers of requests.")
    for it in unique(sorted(used_parameters.values(), key=lambda it: (["path", "query", "header"].index(it["in"]), it["name"].lower())), titled):
        schema = api.get(it["schema"])[1]
        facts = [f"{bound[1]} {schema[bound[0]]}" for bound in BOUNDS if bound[0] in schema]
        if "default" in schema:
            facts.append(f"`{schema['default']}` by default")
        if it.get("required"):
            facts.append("required")
        examples = [f"`{example['value']}`" for example in it.get("examples", {}).values() if example.get("value") not in ("", None)]
        if examples:
            facts.append("such as " + ", ".join(examples))
        values = "; ".join([api.shape(it["schema"]), *facts])
        parts += [f"### {titled(it)}", wrapped(it["description"]), wrapped(f"Values: {values}.")]

    usual = ", ".join(f"[`{it}`](#{anchor('header ' + it)})" for it in USUAL)
    parts.append("## Answers\n\nOf several kinds with one status, each address above links to its own.")
    parts.append(wrapped(f"The headers that most answers have aren't listed again: {usual}, and of errors [`Cache-Control`](#header-cache-control)."))
    for name, (status, it) in sorted(used_responses.items(), key=lambda it: (it[1][0], it[0])):
        parts += [f"### {answer_title(name, status)}", wrapped(it["description"])]
        lines = []
        bodies = [describe_body(api, kind, content) for kind, content in it.get("content", {}).items()]
        if bodies:
            lines.append(item("Body", ", ".join(bodies)))
        if found := api.problems_of(it):
            lines.append(item("Problems", ", ".join(f"[`{kind}`](problems.md#{kind})" for kind in found)))
        rare = [it for it in it.get("headers", {}) if it not in USUAL and not (it == "Cache-Control" and status >= "400")]
        headers = [f"[`{header}`](#{anchor('header ' + header)})" for header in rare]
        if headers:
            lines.append(item("Headers", ", ".join(headers)))
        parts.append("\n".join(lines))

    parts.append("## Headers of answers\n\nWhere a header differs from answer to answer, each form has a line.")
    headers: dict[str, dict[str, list[str]]] = {}
    for name, (status, it) in used_responses.items():
        for header, meant in it.get("headers", {}).items():
            _, meant = api.get(meant)
            about = meant.get("description", "")
            schema = meant.get("schema", {})
            value = f"`{schema['const']}`" if isinstance(schema.get("const"), str) and len(schema["const"]) < 80 else ""
            text = " ".join(it for it in (about, f"Always {value}." if value else "") if it) or "See the answers that have it."
            headers.setdefault(header, {}).setdefault(text, []).append(status)
    for header, texts in sorted(headers.items()):
        parts.append(f"### Header {header}")
        if len(texts) == 1:
            parts.append(wrapped(next(iter(texts))))
        else:
            parts.append("\n".join(item(", ".join(sorted(set(statuses))), text) for text, statuses in texts.items()))

    parts.append("## JSON\n\nObjects of requests and answers.")
    for name in DESCRIBED:
        schema = api.parts["schemas"][name]
        parts += [f"### {name}", wrapped(schema["description"])]
        rows = fields(api, schema)
        if name == "Problem":
            rows = [[row[0], "string", "`urn:problem:afterimage:` and one of [the problems](problems.md)."] if row[0] == "`type`" else row for row in rows]
        if rows:
            parts.append(table(["field", "type", ""], rows))
    missing = set(api.parts["schemas"]) - set(DESCRIBED) - set(EVENTS)
    if missing:
        raise SystemExit(f"docs/generate.py must list the schemas {', '.join(sorted(missing))}: in DESCRIBED or EVENTS")
    return page("HTTP, address by address", "src/http/openapi.json", *parts)


BOUNDS = [("minLength", "at least this long:"), ("maxLength", "at most this long:"), ("minimum", "from"), ("maximum", "to"), ("minItems", "at least this many:")]


# Headers of nearly every answer.
USUAL = ["X-Request-Id", "Vary", "X-Content-Type-Options", "Cross-Origin-Resource-Policy", "Timing-Allow-Origin", "Access-Control-Allow-Origin"]


def needed(operation: dict) -> str:
    """The credentials of an operation. An empty requirement says that there are requests that need none."""
    security = operation.get("security", [])
    if not any("token" in it for it in security):
        return ""
    if {} not in security:
        return "token"
    # Without one, writes are accepted with `[writes] local` and events by id.
    return "token for `prefix`" if operation["operationId"] == "followImages" else "token"


def order(path: str) -> tuple:
    first = ["/images", "/placeholders", "/events", "/openapi.json", "/healthz", "/readyz", "/metrics"]
    place = next((index for index, start in enumerate(first) if path.startswith(start)), len(first))
    # The image itself comes before its listing.
    return place, path == "/images", path


def grouped(operations: dict) -> list[tuple[str, dict]]:
    """GET and HEAD are one operation: HEAD is GET without the body."""
    found = []
    for method, operation in operations.items():
        if method == "head" and "get" in operations:
            continue
        name = "GET, HEAD" if method == "get" and "head" in operations else method.upper()
        found.append((name, operation))
    return found


def titled(parameter: dict) -> str:
    kind = {"path": "in the path", "query": "parameter", "header": "header"}[parameter["in"]]
    return f"{parameter['name']}, {kind}"


def answer_title(name: str, status: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return f"{status} {words}"


def unique(items, key) -> list:
    """Leaves out what was there before; of one name with several meanings, all are kept in one."""
    found: dict = {}
    for it in items:
        known = found.setdefault(key(it), dict(it))
        if it["description"] not in known["description"]:
            known["description"] += f" Elsewhere: {it['description']}"
    return list(found.values())


def describe_body(api: Api, kind: str, content: dict) -> str:
    name, _ = api.get(content.get("schema", {}))
    return f"`{kind}` ({link(name)})" if name in DESCRIBED else f"`{kind}`"


# --- events.md --------------------------------------------------------------------------------------------------------------

EVENTS = ["ConceptProgress", "ConceptAbsent", "ConceptList", "ConceptResync"]


def events(api: Api) -> str:
    stream = api.get(api.operations("/events")["get"]["responses"]["200"])[1]
    parts = [
        wrapped(
            "The events of `GET /events`, field by field. [HTTP](../http.md#events) explains streams and their bounds, the "
            "[front-end guide](../frontend.md#events) how a page uses them, and [the address](http.md#get-head-events) has its parameters."
        ),
        wrapped(
            "`event` is the name of an event. `data` is a JSON object of two fields: `type`, the name again, and `data`, whose fields are below. "
            "`id` is the version of the image where an event has one."
        ),
    ]
    for name in EVENTS:
        schema = api.parts["schemas"][name]
        parts += [f"## {schema['properties']['type']['const']}", wrapped(schema["description"])]
        parts.append(table(["field", "type", ""], fields(api, schema["properties"]["data"])).replace("](#imageid)", "](http.md#imageid)"))
    example = stream["content"]["text/event-stream"]["example"]
    parts += ["## The stream", wrapped(stream["description"])]
    broken = "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in map(str.rstrip, example.rstrip().splitlines()))
    parts.append(f"A stream begins like this; the ends of long lines are left out:\n\n```\n{broken}\n```")
    return page("Events", "src/http/openapi.json", *parts)


# --- problems.md ------------------------------------------------------------------------------------------------------------

# What a client does about each, or why it sees it. The description has the rest.
ADVICE = {
    "bad-host": "Send one `Host`, a name or an address, with a port or without. A proxy may have removed it.",
    "bad-id": "Use an id of the form in [The record](../record.md#key). Nothing was asked of the store.",
    "bad-parameter": "`detail` names the parameter and its allowed values. Unknown and repeated ones are refused, since caches would keep them apart.",
    "bad-digest": "Send `Content-Digest` as RFC 9530 has it: `sha-256=:…:`.",
    "body-incomplete": "The connection ended within the body. Send it again.",
    "digest-mismatch": "The body was changed on its way, or the digest is that of another one. Nothing was stored.",
    "not-an-image": "Send the bytes of an image, or a record as `application/json`. `detail` says what was found. Nothing was stored.",
    "partial-put": "Send the whole image, without `Content-Range`.",
    "invalid-token": "The token isn't one of this server's. See [the token](../operation.md#the-token).",
    "unauthorised": "Send `Authorization: Bearer TOKEN`. See [the token](../operation.md#the-token).",
    "listing-off": "`[events] prefix = \"off\"` lists to nobody. Follow `ids`.",
    "not-from-here": "With `[writes] local` only programs on this machine write without a token. Send one, or write from there.",
    "read-only": "`[writes] enabled = false` refuses writes over HTTP. Write to Redis.",
    "absent": "There is none under this id, or it has expired. With `fallback=placeholder` the body is a picture.",
    "unknown-address": "Look at [the addresses](http.md). With `[admin] listen`, those of operators are on that listener only.",
    "method-not-allowed": "`Allow` has the methods of this address.",
    "not-acceptable": "HEIC, SVG and pictures that can't be decoded are served as they are. Ask without a format, or store another.",
    "body-timeout": "The client sent nothing for `[http] body_timeout`. Send it again.",
    "precondition-failed": "The image was changed by somebody else, or is there already. `ETag` has the present version.",
    "body-too-large": "Raise `[records] max_value`, or store a smaller image: base64 makes it a third larger.",
    "too-many-pixels": "Raise `[pictures] max_pixels` or `[limits] fetch_bytes`, or store a smaller picture. The original is served.",
    "media-type": "Send the `Content-Type` of the bytes, or none; and no `Content-Encoding`.",
    "range-not-satisfiable": "`Content-Range` has the length of the image.",
    "misdirected": "Use one of `[http] hosts`, `localhost` or an IP address; or add the name to `[http] hosts`.",
    "internal": "A defect: please report it with the line of the log that has the same `X-Request-Id`.",
    "corrupt-record": "The value in the store is no record of an image. `detail` says why. The next good value is served at once.",
    "origin-failed": "The object store failed or doesn't have the object. `/readyz` has the reason in `object_store`.",
    "busy": "A limit is reached. Try again after `Retry-After`; `afterimage_shed_total` says which one.",
    "render-timeout": "Raise `[pictures] timeout`, or store a smaller picture. It is tried again after a minute.",
    "stopping": "Another server should get the request. `/readyz` says this while this one stops.",
    "store-unavailable": "Redis can't be reached or refuses. The members `coherence` and `reason`, `/readyz` and the log say why.",
    "store-timeout": "Redis took longer than `[redis] response_timeout`.",
    "disk-full": "Make room on the disk of the embedded store. Images are served meanwhile.",
}


def problems(api: Api) -> str:
    names = re.findall(r'^    \w+ = (\w+), "([a-z-]+)", "([^"]+)";', PROBLEMS.read_text(), re.M)
    declared = [name for _, name, _ in names]
    listed = [it.rsplit(":", 1)[-1] for it in api.parts["schemas"]["Problem"]["properties"]["type"]["enum"]]
    if sorted(declared) != sorted(listed) or sorted(declared) != sorted(ADVICE):
        differ = set(declared) ^ set(listed) | set(declared) ^ set(ADVICE)
        raise SystemExit(f"problem.rs, openapi.json and ADVICE in docs/generate.py must have the same types: {', '.join(sorted(differ))}")
    statuses, places = {}, {}
    for path in sorted(api.paths, key=order):
        for methods, operation in grouped(api.operations(path)):
            for status, response in operation["responses"].items():
                for kind in api.problems_of(api.get(response)[1]):
                    statuses.setdefault(kind, status)
                    places.setdefault(kind, []).append(f"{methods} {path}")
    # Those that no operation has answer requests for which there is none.
    statuses.setdefault("method-not-allowed", "405")
    statuses.setdefault("unknown-address", "404")
    parts = [
        wrapped(
            "The kinds of error that a program may branch on. An error is `application/problem+json` (RFC 9457) with `Cache-Control: no-store`; its "
            "`type` is `urn:problem:afterimage:` and one of these names, and `detail` explains the occurrence. "
            "[Troubleshooting](../troubleshooting.md) begins with symptoms."
        ),
        table(["type", "status", "title"], [[f"[`{name}`](#{name})", statuses[name], title] for _, name, title in names]),
    ]
    for _, name, title in names:
        where = places.get(name, [])
        parts += [f"## {name}", wrapped(f"{statuses[name]}, “{title}”. {ADVICE[name]}")]
        if where:
            links = ", ".join(f"[`{it}`](http.md#{anchor(it)})" for it in dict.fromkeys(where))
            parts.append(wrapped(f"From {links}." if len(set(where)) <= 8 else "From most addresses."))
    return page("Problems", "src/http/problem.rs and src/http/openapi.json", *parts)


# --- metrics.md -------------------------------------------------------------------------------------------------------------

# Labels whose values aren't listed: they are many, or depend on requests.
OPEN_LABELS = {"route", "method", "status", "version", "le", "quantile"}


def metrics(text: str) -> str:
    helps, types, units, labels, bounds = {}, {}, {}, {}, []
    for line in text.splitlines():
        if match := re.match(r"# HELP (\S+) (.*)", line):
            helps[match[1]] = match[2]
        elif match := re.match(r"# TYPE (\S+) (\S+)", line):
            types[match[1]] = match[2]
        elif match := re.match(r"# UNIT (\S+) (\S+)", line):
            units[match[1]] = match[2]
        elif match := re.match(r"(\w+?)(_total|_info|_sum|_count|_bucket)?(?:\{(.*)\})? ", line):
            family = match[1] if match[1] in types else match[1] + (match[2] or "")
            for name, value in re.findall(r'(\w+)="([^"]*)"', match[3] or ""):
                labels.setdefault(family, {}).setdefault(name, set()).add(value)
    rows = {"counter": [], "gauge": [], "histogram": [], "info": []}
    for family, kind in sorted(types.items()):
        suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
        found = []
        for name, values in labels.get(family, {}).items():
            if name == "le":
                bounds = bounds or sorted(values, key=lambda it: float(it.replace("+Inf", "inf")))
                continue
            shown = "" if name in OPEN_LABELS else ": " + ", ".join(f"`{it}`" for it in sorted(values))
            found.append(f"`{name}`{shown}")
        rows[kind].append([f"`{family}{suffix}`", "; ".join(found), helps[family]])
    parts = [
        wrapped(
            "Every metric of `/metrics`. [Operation](../operation.md#metrics) has the configuration for Prometheus, alerts and a dashboard, which "
            "shows and explains each."
        )
    ]
    titles = {
        "counter": "## Counters\n\nThey begin at 0 with each start and only grow.",
        "gauge": "## Gauges\n\nThe state at the moment of the request.",
        "histogram": "## Histograms\n\nIn seconds. Each has `_bucket`, `_sum` and `_count`.",
        "info": "## Information",
    }
    for kind, title in titles.items():
        if rows[kind]:
            parts.append(title)
            parts.append("\n".join(metric_item(row) for row in rows[kind]))
        if kind == "histogram" and bounds:
            shown = ", ".join(f"`{it}`" for it in bounds)
            parts.append(wrapped(f"Upper bounds of the buckets (`le`): {shown}."))
    parts.append(
        "## Labels\n\n"
        "- **route**: the address as in [HTTP](http.md), such as `/images/{id}`\n"
        "- **method**: the method; `other` for any that no address has\n"
        "- **status**: the status code"
    )
    return page("Metrics", "a running server", *parts)


def metric_item(row: list[str]) -> str:
    name, found, text = row
    return "- " + wrapped(f"{name}: {text}" + (f" Labels: {found}." if found else ""), "  ")


# --- log.md -----------------------------------------------------------------------------------------------------------------


def check_log(line: dict) -> bool:
    """Compares the fields that log.md lists for a request with those of a line. Returns whether they differ."""
    text = (PAGES / "log.md").read_text()
    start = text.index("## A request")
    section = text[start : text.index("\n## ", start + 1)]
    rows = re.findall(r"^\| (`[^|]*`) \| (only )?", section, re.M)
    listed = {name for names, _ in rows for name in re.findall(r"`([\w.]+)`", names)}
    sometimes = {name for names, only in rows if only for name in re.findall(r"`([\w.]+)`", names)}
    written = set(line) - {"timestamp", "level", "message", "target"}
    wrong = (listed - sometimes - written) | (written - listed)
    if wrong:
        print(f"docs/reference/log.md lists other fields than a line about a request has: {', '.join(sorted(wrong))}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
