"""The skeleton of every page halfbyte writes: one file that needs nothing else, light and dark, for a phone too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6b7b; --line: #d7dee6; --paper: #fff; --card: #f5f8fb;
        --c0: #1f5a91; --c1: #c8553d; --c2: #4a8f4f; --c3: #8a5aa8; --c4: #b8860b;
        --c5: #4f8fc0; --c6: #7d7d7d; --c7: #d18a9c; --c8: #2f4858; --mark: #d9efdc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9fb0c0; --line: #34414e; --paper: #12181f; --card: #1a222b;
          --c0: #6cb2ee; --c1: #f08a70; --c2: #7cc682; --c3: #c39be0; --c4: #e0b64c;
          --c5: #a9d3f2; --c6: #a8a8a8; --c7: #ecb3c1; --c8: #8fb3c9; --mark: #1f4a2a }
  svg.plot { background: #fff; border-radius: 6px }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.soft, td small, .soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .88rem }
th, td { text-align: right; padding: .45rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem }
table.names td, table.names th { text-align: left; white-space: normal; overflow-wrap: anywhere }
table.long td:first-child { min-width: 13rem }
tr.best td { font-weight: 600 } svg { max-width: 100%; height: auto }
details { background: var(--card); border-radius: 8px; padding: .6rem 1rem; margin: .5rem 0 }
summary { cursor: pointer }
blockquote { margin: .2rem 0 .8rem; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap;
             overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto }
code, pre { font-size: .9em; overflow-wrap: anywhere; white-space: pre-wrap }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.cards { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1.2rem 0 }
.cards > div { background: var(--card); border-radius: 8px; padding: .6rem .9rem }
.cards b { display: block; font-size: 1.3rem; font-weight: 600 }
figure { margin: 0 } figcaption { font-weight: 600 } figcaption span { font-weight: 400; font-size: .85rem }
figcaption i { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid; margin: 0 .3rem .25rem .8rem }
svg.chart { display: block; width: 100%; font-size: 12px; fill: var(--soft) }
.chart path, .chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.chart .axis { stroke: var(--line); stroke-width: 1 } .chart .level { stroke-dasharray: 6 4; stroke-width: 1.5 }
.chart .thin { stroke-width: 1; opacity: .45 } .chart .mark { stroke: var(--soft); stroke-width: 1; opacity: .5 }
.tokens { line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { border-left: 1px solid var(--line); padding: .1em 0 } .tokens .on { background: var(--mark) }
.tokens .special { color: var(--c3) }
"""
"""`svg.plot` is a picture of matplotlib's, black on nothing; `svg.chart` is one of report/chart.py."""


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of what follows, and halves of characters."""


def legible(said: object) -> str:
    """`said` with what cannot be seen spelled out: data must drive neither a page nor a terminal."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(said))


def text(said: object) -> str:
    """`said` as HTML that shows it, whatever it is."""
    return escape(legible(said))


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of `parts`, which are HTML; `title` is text."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; cells are HTML. `kind`: "names" for text, else numbers stand to the right."""
    top = f"<tr>{''.join(f'<th>{cell}' for cell in head)}" if any(head) else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    return f'<div class=wide><table class="{kind}">{top}{lines}</table></div>'
