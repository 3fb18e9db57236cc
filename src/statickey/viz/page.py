"""A page of results: one HTML file that needs nothing else, and what goes into it."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .._files import one_line, write_atomic, write_text

_SCREEN_DPI, _DPI = 96, 144
_NOTHING_ELSE = "default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'unsafe-inline'"
"""A policy under which a browser loads nothing that is not in the page."""


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Write a page of ``section``s.

    Raises:
        OutputError: It cannot be written.
    """
    head = html.escape(title)
    write_text(
        path,
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f'<meta http-equiv=Content-Security-Policy content="{_NOTHING_ELSE}">'
        f"<title>{head}</title><style>{_CSS}</style><main><h1>{head}</h1>{''.join(sections)}</main></html>\n",
    )


def section(title: str, *parts: str) -> str:
    """A box with a heading, where ``title`` is not empty; nothing without content."""
    body = "".join(parts)
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f"<section>{heading}{body}</section>" if body else ""


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(words)}</p>"


def note(words: str) -> str:
    """A paragraph in small print, under what it explains."""
    return f"<p class=note>{html.escape(words)}</p>"


def points(lines: Iterable[tuple[str, str]]) -> str:
    """A list, each line beginning with a name in bold."""
    body = "".join(f"<li><b>{html.escape(name)}</b> {html.escape(words)}</li>" for name, words in lines)
    return f"<ul>{body}</ul>" if body else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers, its first column names; it scrolls under that column where the page is narrow."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide tabindex=0><table><tr>{head}</tr>{body}</table></div>"


def facts(lines: Mapping[str, Any]) -> str:
    """What was done, by name."""
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in lines.items()
    )
    return f"<table class=facts>{body}</table>"


def details(summary: str, content: str) -> str:
    """Preformatted text that opens when asked for."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(content)}</pre></details>"


def row(*parts: str) -> str:
    """Pictures side by side, wrapped to the width of the page."""
    return f"<div class=row>{''.join(parts)}</div>" if parts else ""


def svg(figure: Figure) -> str:
    """A figure of lines and words, the same bytes each time."""
    drawn = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "statickey", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"<div class=plot>{drawn.getvalue()[drawn.getvalue().index('<svg') :]}</div>"


def picture(figure: Figure, caption: str = "") -> str:
    """A figure of pixels, with words under it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    width = figure.get_figwidth() * _SCREEN_DPI
    data = base64.b64encode(file.getvalue()).decode()
    under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><img width={width:.0f} src='data:image/png;base64,{data}' alt=''>{under}</figure>"


def drawn(what: str, draw: Callable[[], str]) -> str:
    """What ``draw`` makes, or a line that says why ``what`` is left out: a picture never costs the page."""
    try:
        return draw()
    except Exception as error:
        return note(f"{what} is left out: {one_line(error)}.")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        OutputError: It cannot be written.
    """
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150))


_CSS = """
:root{color-scheme:light;--page:#f5f7fa;--card:#fff;--ink:#1f2933;--faint:#616e7c;--line:#e4e7eb}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){DARK}}
:root[data-theme=dark]{DARK}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0 0 18px;letter-spacing:-.01em;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:0 0 18px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:7px 5px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--faint);font-size:13px}td:first-child,th:first-child{text-align:left}
td:first-child{font-weight:600}tr:last-child>*{border-bottom:0}
.wide{overflow-x:auto;font-size:13px;background-color:var(--card);background-repeat:no-repeat;
background-image:linear-gradient(270deg,var(--card) 40%,transparent),linear-gradient(270deg,#1f293333,transparent);
background-position:100% 0;background-size:48px 100%,16px 100%;background-attachment:local,scroll}
.wide th{white-space:normal;vertical-align:bottom;font-size:12px}
.wide td:first-child,.wide th:first-child{position:sticky;left:0;background:var(--card);padding:7px 10px 7px 0}
.note{color:var(--faint);font-size:13px;margin:10px 0 0}ul{margin:0 0 16px;padding-left:18px}
.plot svg,.row img{max-width:100%;height:auto}.row{display:flex;flex-wrap:wrap;gap:18px}.row>*{max-width:100%}
.plot svg,figure img{background:#fff;border-radius:6px}
figure{margin:0}figcaption{text-align:center;color:var(--faint);font-size:13px}
.facts th{width:190px;vertical-align:top}.facts td{text-align:left;font-weight:400}
.facts th,.facts td{white-space:normal;overflow-wrap:anywhere}
details{margin-top:12px}pre{overflow-x:auto;font-size:12px}
@media(max-width:640px){main{padding:18px 10px 40px}h1{font-size:21px}section{padding:14px 12px}
.facts tr,.facts th,.facts td{display:block;width:auto;padding:0;border:0}
.facts tr{padding:7px 0;border-bottom:1px solid var(--line)}.facts tr:last-child{border:0}}
""".replace("DARK", "color-scheme:dark;--page:#12161c;--card:#1b2129;--ink:#e4e7eb;--faint:#9aa5b1;--line:#333d49")
