"""A report as one page for a browser, which needs no network and no script: table, plots, notes, and links to the runs.

The plots show a mark's value while the pointer is on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from src.config.names import UNTRAINED
from src.reporting.plots import caption
from src.reporting.rows import TableRow
from src.runs.links import link_to, page_of
from src.runs.record import Record
from src.system.redact import redact

NO_BREAK = "\N{NON-BREAKING HYPHEN}"
# The colours are the browser's own for light and dark. Plots are drawn for paper, so they stay on white.
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1, li, p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.4rem; text-align: right; border-bottom: 1px solid #8886; }
td { white-space: nowrap; }
th { vertical-align: bottom; }
tr > :first-child { min-width: min(10rem, 35vw); text-align: left; white-space: normal; overflow-wrap: anywhere; }
.mark { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.5em; border-radius: 50%;
  outline: 1px solid #8888; }
figure { margin: 2rem 0; }
figure div { background: white; padding: 0.5rem; border-radius: 4px; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; }
@media print { body { margin: 0; padding: 0; max-width: none; } .scroll { overflow: visible; } table { font-size: 7pt; }
  th, td { padding: 0.2rem 0.3rem; } tr > :first-child { min-width: 5.5rem; } tr, figure { break-inside: avoid; }
  .mark { print-color-adjust: exact; } }
</style>
</head>
<body>
<h1>$title</h1>
<p>$caption.</p>
<div class="scroll"><table>
$table
</table></div>
$figures
$notes
<h2>Runs</h2>
$how$runs
</body>
</html>
""")
HOW_TO_OPEN = (
    "<p>A link opens the run's page in MLflow. Without a server, <code>mlflow ui</code> serves these pages.</p>\n"
)


def render(
    title: str,
    rows: Sequence[TableRow],
    table: Sequence[Sequence[str]],
    pictures: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """Render the page in HTML.

    Args:
        title: the heading.
        rows: the rows of the table.
        table: the table as text: its header, then a line for each of the rows.
        pictures: SVG by caption.
        notes: lines below the plots.
    """
    trained = [row for row in rows if row.method != UNTRAINED]  # the untrained row has the other rows' runs
    header, *body = table
    names = [escape(name.replace("-", NO_BREAK)) for name in header]
    lines = [f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>", "<tbody>"]
    for row, (label, *cells) in zip(rows, body, strict=True):
        first = f'<td><span class="mark" style="background: {escape(row.colour)}"></span>{escape(label)}</td>'
        lines.append(f"<tr>{first}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return PAGE.substitute(
        title=escape(title),
        caption=escape(caption(rows)),
        table="\n".join([*lines, "</tbody>"]),
        figures="\n".join(_figure(name, svg) for name, svg in pictures.items()),
        notes=f"<h2>Notes</h2>\n{_list([escape(note) for note in notes])}" if notes else "",
        how=HOW_TO_OPEN if any(page_of(run) for row in trained for run in row.runs) else "",
        runs=_list([f"{escape(row.title)}: {', '.join(_run(run) for run in row.runs)}" for row in trained]),
    )


def _figure(name: str, svg: str) -> str:
    drawing = svg[svg.index("<svg") :]  # without the XML declaration before it
    return f"<figure>\n<figcaption>{escape(name)}</figcaption>\n<div>{drawing}</div>\n</figure>"


def _list(items: Sequence[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{item}</li>" for item in items), "</ul>"])


def _run(run: Record) -> str:
    """The name of the run's folder, linked to the run's page if MLflow has it."""
    name = escape(run.directory.name if run.directory else run.name)
    path = page_of(run)
    return f'<a href="{escape(redact(link_to(path)))}">{name}</a>' if path else name
