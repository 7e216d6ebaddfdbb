#!/usr/bin/env python3
"""Makes target/soak/report.html of the samples and faults of a soak.

    tests/soak/report.py [FOLDER]
"""

import csv
import html
import pathlib
import sys

WIDTH, HEIGHT, LEFT, BOTTOM = 900, 130, 56, 18
COLOURS = {
    "Demotion": "#e6a0a0", "Switch": "#e6c3a0", "HungSwitch": "#e6dfa0", "Freeze": "#a0c8e6", "Suspension": "#a0a8e6",
    "Hang": "#c4e6a0", "Kill": "#d9b8b8", "NoAccess": "#c8c8c8", "NoTracking": "#b8d9d2", "Loading": "#d2b8d9",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
svg { width: 100%; height: auto; display: block } h2 { font-size: 1rem; margin: 1.4rem 0 .2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: .15rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.scroll { overflow-x: auto } .key { display: inline-block; width: .9em; height: .9em; margin-right: .4em }
text { font: 11px system-ui, sans-serif; fill: #555 }
"""


def rows(path):
    with open(path, newline="") as file:
        return [
            {name: float(text) if text.replace(".", "", 1).isdigit() else text for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def number(value):
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def chart(samples, faults, end, lines, scale=1.0):
    """Draws lines of columns over time, before bands of the faults."""
    most = max((row[column] / scale for row in samples for column, _ in lines), default=0) or 1
    x = lambda seconds: LEFT + (WIDTH - LEFT) * seconds / end
    y = lambda value: (HEIGHT - BOTTOM) * (1 - value / most)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for fault in faults:
        parts.append(
            f'<rect x="{x(fault["from"]):.1f}" y="0" width="{max(x(fault["to"]) - x(fault["from"]), 1):.1f}" '
            f'height="{HEIGHT - BOTTOM}" fill="{COLOURS[fault["fault"]]}" fill-opacity=".45">'
            f'<title>{html.escape(fault["fault"])}, {html.escape(fault["server"])}, S3 {html.escape(fault["s3"])}</title></rect>'
        )
    for server in dict.fromkeys(row["server"] for row in samples):
        for column, colour in lines:
            points = " ".join(
                f'{x(row["seconds"]):.1f},{y(row[column] / scale):.1f}' for row in samples if row["server"] == server
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
    for value in (0, most / 2, most):
        parts.append(f'<text x="{LEFT - 6}" y="{max(y(value) + 4, 10):.1f}" text-anchor="end">{number(value)}</text>')
    for step in range(5):
        seconds = end * step / 4
        anchor = ("start", "middle", "middle", "middle", "end")[step]
        parts.append(f'<text x="{x(seconds):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{seconds / 60:.1f} min</text>')
    return "".join(parts) + "</svg>"


def table(faults):
    """Draws a row for each kind of fault."""
    lines = ["<tr><th>fault</th><th>times</th><th>answers</th><th>latest</th><th>bound</th></tr>"]
    for kind, colour in COLOURS.items():
        those = [fault for fault in faults if fault["fault"] == kind]
        if those:
            lines.append(
                f'<tr><td><span class="key" style="background:{colour}"></span>{kind}</td><td>{len(those)}</td>'
                f'<td>{sum(it["answers"] for it in those):,.0f}</td><td>{max(it["latest"] for it in those):.3f} s</td>'
                f'<td>{those[0]["bound"]:.1f} s</td></tr>'
            )
    return '<div class="scroll"><table>' + "".join(lines) + "</table></div>"


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else root / "target/soak"
    samples, faults = rows(folder / "samples.csv"), rows(folder / "faults.csv")
    if not samples or not faults:
        sys.exit(f"there are no samples in {folder}: just soak makes them")
    end = max(samples[-1]["seconds"], faults[-1]["to"])
    answers = sum(fault["answers"] for fault in faults)
    summary = (
        f"{answers:,.0f} answers beside {len(faults)} faults in {end / 60:.1f} minutes, none later than its bound. "
        f"Seed {faults[0]['seed']:.0f}."
    )
    charts = [
        ("Resident memory, MiB", [("resident", "#1f6f8b")], 2**20),
        ("Descriptors and threads", [("descriptors", "#1f6f8b"), ("threads", "#b3541e")], 1),
        ("Latency, ms: median and 99th percentile", [("p50", "#1f6f8b"), ("p99", "#b3541e")], 1),
        ("Answers in half a second; refused; marked as possibly outdated",
         [("answers", "#1f6f8b"), ("refused", "#b3541e"), ("marked", "#6a4c93")], 1),
    ]
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Afterimage: soak</title><style>{STYLE}</style><h1>Soak</h1><p>{summary}</p>",
        "<p><em>Latest</em> is the longest time between a write and a request that was still answered with the image before it.</p>",
        table(faults),
    ]
    for title, lines, scale in charts:
        page.append(f"<h2>{title}</h2>" + chart(samples, faults, end, lines, scale))
    report = folder / "report.html"
    report.write_text("\n".join(page))
    print(f"soak: {summary} {report}")


if __name__ == "__main__":
    main()
