"""How the page looks."""

from __future__ import annotations

# Eight hues for the series, at 3:1 or more on their ground in light and in dark; dashes tell them apart as well.
STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fcfcfb; --text: #14140f; --muted: #5a5954; --line: #e2e1db; --axis: #8a8982; --mark: #eaf1fb; --link: #1c5cab;
  --s1: #2a78d6; --s2: #d9541e; --s3: #178a5f; --s4: #b27900; --s5: #c9478a; --s6: #4a3aa7; --s7: #4f7f1c; --s8: #c93635;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #171716; --text: #f4f3ee; --muted: #b4b3ab; --line: #34342f; --axis: #86857d; --mark: #1d2c40; --link: #86b6ef;
    --s1: #5aa0ee; --s2: #ee7a4a; --s3: #2fbd87; --s4: #d9a21f; --s5: #ea7fb4; --s6: #a79df2; --s7: #9cc25a; --s8: #ee7574;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.08rem; margin: 2rem 0 .2rem; }
h1, h2, h3, p, li, table.plain td { overflow-wrap: anywhere; }
a { color: var(--link); }
.muted, .about, caption { color: var(--muted); }
.about { margin: 0 0 .6rem; max-width: 60rem; }
.lead { font-size: 1.06rem; padding-left: 1.2rem; max-width: 60rem; }
.lead li { margin: .2rem 0; }
ul.words { padding-left: 1.2rem; max-width: 64rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; font-size: .92rem; }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; min-width: 4.5rem; }
table.numbers td + td, table.numbers th + th { text-align: right; }
table.numbers td + td { white-space: nowrap; }
table.numbers td:first-child { min-width: 7rem; }
table.plain td { max-width: 38rem; min-width: 6rem; }
table.plain td:first-child { white-space: nowrap; }
tr.strong td { background: var(--mark); font-weight: 600; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 2rem; align-items: start;
}
figure { margin: .4rem 0; max-width: 40rem; min-width: 0; }
figcaption { font-size: .9rem; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .15rem 0; font-size: .85rem; color: var(--muted); }
.legend svg { width: 28px; height: 10px; margin-right: .35rem; vertical-align: middle; display: inline-block; }
figure > svg { width: 100%; height: auto; display: block; }
figure text { fill: var(--muted); font-size: 12px; }
figure text.name { fill: var(--text); }
.grid { stroke: var(--line); }
.axis { stroke: var(--axis); }
.whisker { stroke: var(--text); stroke-width: 1.2; opacity: .75; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  body { font-size: 15px; padding: 1rem .8rem 3rem; }
  th, td { padding: .28rem .5rem; }
  figure text { font-size: 14px; }
}
@media print { nav { display: none; } figure, tr { break-inside: avoid; } }
"""
