"""One self-contained HTML page of an explanation: pictures of times, densities and patterns, the table, the reasons."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from .. import markup

if TYPE_CHECKING:
    from .table import Explanation, LayerRow

SPARSE, DENSE, KEPT = "#2b7bba", "#b0b7bf", "#d9822b"
MOST = 60  # bars of a picture: the layers that take the most time
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; } th { border-bottom: 1px solid #8888; }
tbody tr:hover { background: #8882; } .wide { overflow-x: auto; }
figure { display: inline-block; margin: 0 1rem 1rem 0; } figcaption { font-size: 13px; }
h2 { margin-top: 2rem; font-size: 1.2rem; } td { vertical-align: top; }
"""


def page(of: Explanation) -> str:
    """The text of the page."""
    stored, dense = of.sizes
    facts = [
        f"One call of the model takes {markup.time_of(of.model.median)} on {of.where}; with all these weights dense it "
        f"would take about {markup.time_of(of.dense_model)}.",
        f"The weights have {markup.count_of_bytes(stored)}, dense {markup.count_of_bytes(dense)}.",
        of.in_short(),
    ]
    if of.densified:
        facts.append(f"These were then made dense: {', '.join(of.densified)}.")
    timed = [row for row in of.rows if row.seconds is not None]
    shown = sorted(timed, key=lambda row: -row.seconds.median)[:MOST]  # type: ignore[union-attr]
    names = {id(row) for row in shown}
    shown = [row for row in timed if id(row) in names]
    rest = f" (the {MOST} that take the most time)" if len(timed) > MOST else ""
    parts = [
        f"<h1>sten.explain</h1><p>{'<br>'.join(map(html.escape, facts))}</p>",
        f"<h2>Time by layer{rest}</h2>",
        _wide(markup.bars([_times(row) for row in shown], ("as it is", "dense"), (SPARSE, DENSE))),
        f"<h2>Density by layer{rest}</h2>",
        _wide(markup.bars([_density(row) for row in shown], ("density", "energy kept"), (SPARSE, KEPT))),
        f"<h2>Layers</h2>{_wide(of._repr_html_())}",
        _patterns(of),
        f"<h2>What ran, and why</h2>{''.join(map(_reason, of.rows))}",
        "<p>Times are medians of rounds in which both sides take turns, with quartiles in parentheses; those of a "
        "layer are of all its calls in one call of the model.</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><title>sten.explain</title>{head}</head>\n<body>{body}</body></html>\n'
    )


def _wide(inside: str) -> str:
    """What scrolls by itself where the window is narrow."""
    return f'<div class="wide">{inside}</div>'


def _times(row: LayerRow) -> tuple[str, tuple[float, float], str]:
    own = 0.0 if row.seconds is None else row.seconds.median
    if row.dense_seconds is None or row.speedup is None:
        return row.name or "(model)", (0.0, own), markup.time_of(own)
    return row.name or "(model)", (own, row.dense_seconds.median), f"{row.speedup.median:.2f}x"


def _density(row: LayerRow) -> tuple[str, tuple[float, float], str]:
    return row.name or "(model)", (row.density, row.energy or 0.0), f"{row.density:.3f} {row.layout}"


def _patterns(of: Explanation) -> str:
    figures = [
        f"<figure>{picture}<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, picture in of.patterns.items()
    ]
    return f"<h2>Patterns, one weight of each kind</h2>{''.join(figures)}" if figures else ""


def _reason(row: LayerRow) -> str:
    lines = [f"{row.kernel}: {row.reason}" if row.kernel else "", row.advice]
    lines += [
        f"{one.layout}: {one.speedup.median:.2f} times as fast as dense, {one.energy:.0%} of the energy, "
        f"{markup.count_of_bytes(one.stored_bytes)}"
        for one in row.alternatives
    ]
    inside = "<br>".join(html.escape(line) for line in lines if line)
    calls = f", called {row.calls} times on {'x'.join(map(str, row.input))}" if row.calls else ""
    title = html.escape(f"{row.name or '(model)'}: {row.layout}{calls}")
    return f"<details><summary>{title}</summary><p>{inside}</p></details>"
