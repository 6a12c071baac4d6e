"""What a page is set in: its frame, and its style on paper, phones and in the dark."""

from string import Template

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #111; --pale: #ddd;
  --grey: #666; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #000; --ink: #eee; --pale: #333; --grey: #aaa; --accent: #56b4e9; }
  figure svg { filter: invert(1) hue-rotate(180deg); }
}
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
.verdicts { list-style: none; margin: 1rem 0; padding: 0; max-width: 48rem; }
.verdicts li { margin: .7rem 0; padding: .1rem 0 .1rem .8rem;
  border-left: .35rem solid var(--pale); overflow-wrap: anywhere; }
.verdicts li.bad { border-color: var(--accent); }
.verdicts b { display: block; font-size: .8rem; letter-spacing: .05em;
  color: var(--grey); }
dl { display: grid; gap: .4rem 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
dt { font-size: .8rem; color: var(--grey); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.pictures { columns: 34rem 2; column-gap: 2rem; }
figure { margin: 0 auto 1.5rem; max-width: 42rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption, th:first-child, td:first-child, th:last-child, td:last-child {
  text-align: left; }
caption { color: var(--grey); padding-bottom: .3rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--pale); }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
tr.marked td { font-weight: bold; }
@media (max-width: 40rem) {
  table, caption, thead, tbody { display: block; }
  tr { display: grid; grid-template-columns: repeat(4, 1fr); padding: .3rem 0;
    border-bottom: 1px solid var(--pale); }
  th, td { border: none; padding: 0; }
  th:first-child, th:last-child, td:first-child, td:last-child { grid-column: 1 / -1; }
}
summary { cursor: pointer; margin: .8rem 0; }
footer { margin-top: 2rem; font-size: .8rem; color: var(--grey); }
"""
PAGE = Template(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>$title</title>
<style>{CSS}</style>
</head>
<body>
<main>
$body
</main>
<footer>Made by optaxclip. Norms are those before the clip.</footer>
</body>
</html>
""")
