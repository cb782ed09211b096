"""A finished run as one HTML file, to be sent to a colleague: an index with the main results, then every notebook and
its solutions, code behind a button. Of a grid, a page across its runs, which leads to theirs."""

import base64
import io
import re
from collections import Counter
from html import escape, unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, unquote

import pandas as pd

from gqalib.errors import InputError
from gqalib.run.checks import NOTEBOOKS, numbered_notebooks
from gqalib.run.notebook import read_record, write_atomically
from gqalib.run.publish import MAIN_TABLES, title

THUMBNAIL = 360, 360  # pixels
FIGURE = "A panel for each perplexity over what the grid varies, as mean and standard deviation over seeds."
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }
td, th { padding: 0.2rem 0.6rem; } th { text-align: left; } tr { border-bottom: 1px solid #ddd; }
pre { font-size: 0.8rem; overflow-x: auto; } section { border-top: 3px solid #222; margin-top: 4rem; }
img { max-width: 100%; } a.anchor-link, .prompt { display: none; }
.input { display: none; background: #f5f5f5; padding: 0 0.6rem; } body.code .input { display: block; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; font-size: 0.8rem; }
button { position: fixed; top: 1rem; right: 1rem; padding: 0.4rem 0.8rem; } @media print { button { display: none; } }
"""
BUTTON = """<button onclick="this.textContent = document.body.classList.toggle('code') ? 'Hide code' : 'Show code'">\
Show code</button>"""


def report(run_dir: Path) -> Path:
    """Write `report.html` for the finished notebooks of a run; for a grid, a page across its runs and a report of each.

    Raises:
        InputError: no notebook is finished.
    """
    if (run_dir / "grid.csv").exists():
        return _across_runs(run_dir)
    if not (records := _records(run_dir)):
        raise InputError(f"{run_dir} holds no finished notebook: run the series first")
    pages = {name: run_dir / f"{name}.ipynb" for name in records}
    pages |= {f"solutions/{p.stem}": p for p in numbered_notebooks(NOTEBOOKS / "solutions") if p.stem in records}
    sections = [f'<section id="{name}">{_body(name, pages, records)}</section>' for name in pages]
    first = next(iter(records.values()))
    return _page(run_dir, f"Report of preset {first['preset']}", BUTTON, _index(run_dir, records), *sections)


def _across_runs(folder: Path) -> Path:
    """What was run, the settings of a grid side by side, and every run with a link to its own report."""
    from gqalib.run.grid import means, per_run  # takes a second

    table = pd.read_csv(folder / "grid.csv")
    records = {run: found for run in table["run"] if (found := _records(folder / run))}
    links = {run: quote(report(folder / run).relative_to(folder).as_posix()) for run in records}
    parts = [_table(_what_was_run([record for run in records.values() for record in run.values()]), header=False)]
    parts += ["<h2>Means over seeds</h2>", _table(means(table).reset_index())]
    if (figure := folder / "grid.png").exists():
        parts.append(f"{_image(figure.read_bytes(), FIGURE)}<p><b>Figure 1.</b> {FIGURE}</p>")
    parts += ["<h2>Runs</h2>", _runs(per_run(table), links), *_verdicts(records)]
    last = {run: figures[-1] for run, found in records.items() if (figures := _figures(found))}
    pictures = [f"<div>{escape(run)}{_thumbnail(folder / run, *last[run], links[run])}</div>" for run in last]
    return _page(folder, f"Report of {folder.name}", *parts, _gallery("The last figure of each run", pictures))


def _runs(table: pd.DataFrame, links: dict[str, str]) -> str:
    names = [f'<a href="{links[run]}">{escape(run)}</a>' if run in links else escape(run) for run in table["run"]]
    shown = table.map(lambda value: "" if pd.isna(value) else escape(str(value)))
    return _table(shown.assign(run=names), escape=False)


def _verdicts(records: dict[str, dict[str, Any]]) -> list[str]:
    """How often each verdict was given, a row per run that has judged the claims."""
    claims = {run: found["08_claims"]["tables"]["claims"] for run, found in records.items() if "08_claims" in found}
    counts = {run: Counter(row["verdict"].partition(":")[0] for row in rows) for run, rows in claims.items()}
    table = pd.DataFrame(counts).T.fillna(0).astype(int).rename_axis("run").reset_index()
    return ["<h2>Verdicts on the founding document's claims</h2>", _table(table)] if claims else []


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the finished notebooks, by their names."""
    paths = {path.stem: path.with_suffix(".json") for path in numbered_notebooks(folder)}
    return {name: read_record(path) for name, path in paths.items() if path.exists()}


def _page(folder: Path, heading: str, *parts: str) -> Path:
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(heading)}</title>'
    head += f"<style>{STYLE}{colours}</style>"
    html = "\n".join([head, "<body>", f"<h1>{escape(heading)}</h1>", *parts, "</body></html>\n"])
    write_atomically(folder / "report.html", html)
    return folder / "report.html"


def _index(run_dir: Path, records: dict[str, dict[str, Any]]) -> str:
    """What was run, the notebooks, the results, the verdicts, the figures."""
    parts = [_table(_what_was_run(list(records.values())), header=False)]
    parts += ["<h2>Notebooks</h2>", _contents(run_dir, records)]
    for name, (heading, table) in MAIN_TABLES.items():
        parts += [f"<h2>{heading}</h2>", _table(table(records[name]))] if name in records else []
    if "08_claims" in records:
        claims = pd.DataFrame(records["08_claims"]["tables"]["claims"]).drop(columns="tested")
        parts += ["<h2>The founding document's claims</h2>", _table(claims)]
    return "\n".join([*parts, _gallery("Figures", [_thumbnail(run_dir, *figure) for figure in _figures(records)])])


def _what_was_run(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Of one run or several; where they differ, every value once."""
    names = dict.fromkeys(name for record in records for name in record["overrides"])
    values = {name: [record[name] for record in records] for name in ("preset", "seed", "machine", "git_commit")}
    values |= {name: [record["parameters"][name] for record in records] for name in ("model", "corpus")}
    values |= {f"override {name}": [record["overrides"].get(name) for record in records] for name in names}
    rows = {name.removeprefix("git_"): "; ".join(dict.fromkeys(map(str, found))) for name, found in values.items()}
    rows |= {} if names else {"overrides": "none"}
    return pd.DataFrame((rows | {"seconds": f"{sum(record['seconds'] for record in records):,.0f}"}).items())


def _contents(run_dir: Path, records: dict[str, dict[str, Any]]) -> str:
    titles = {name: escape(title(run_dir / f"{name}.ipynb")) for name in records}
    rows = [f'<li><a href="#{name}">{titles[name]}</a>, {records[name]["seconds"]:.0f} s</li>' for name in records]
    return f"<ul>{''.join(rows)}</ul>"


def _table(table: pd.DataFrame, **options: Any) -> str:
    return table.to_html(index=False, border=0, **options)


def _figures(records: dict[str, dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    return [(record, name) for record in records.values() for name in record.get("captions", {})]


def _gallery(heading: str, pictures: list[str]) -> str:
    return "\n".join([f"<h2>{heading}</h2>", '<div class="gallery">', *pictures, "</div>"])


def _image(png: bytes, alt: str = "") -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{alt}">'


def _thumbnail(run_dir: Path, record: dict[str, Any], name: str, page: str = "") -> str:
    """A small picture that leads to the figure in its notebook, on this page or another."""
    from PIL import Image

    number = f"{int(record['notebook'][:2])}.{list(record['captions']).index(name) + 1}"
    with Image.open(run_dir / "figures" / f"{record['notebook'][:2]}_{name}.png") as picture, io.BytesIO() as small:
        picture.thumbnail(THUMBNAIL)
        picture.save(small, "png")
        image = _image(small.getvalue())
    words = escape(record["captions"][name])
    return f'<a href="{page}#{record["notebook"]}--{name}">{image}<br>Figure {number}. {words}</a>'


def _body(name: str, pages: dict[str, Path], records: dict[str, dict[str, Any]]) -> str:
    """A notebook as HTML whose ids begin with its name, whose links lead to places in the same file, and whose formulas
    are MathML, which browsers draw without the network."""
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer

    inline, block = (lambda _, tex, display=display: convert(tex, display=display) for display in ("inline", "block"))
    with patch.multiple(IPythonRenderer, inline_math=inline, block_math=block):
        html, _ = HTMLExporter(template_name="basic").from_filename(str(pages[name]))
    figures = {caption: figure for figure, caption in records.get(name, {}).get("captions", {}).items()}
    html = re.sub(r'alt="([^"]*)"', lambda m: _id(name, figures.get(unescape(m[1]), "")) + m[0], html)
    html = re.sub(r'(<(?:h\d|div)[^>]*) id="([^"]*)"', lambda m: f"{m[1]} {_id(name, m[2])}", html)
    return re.sub(r'<a ([^>]*?)href="([^"]*)">(.*?)</a>', lambda link: _relinked(*link.groups(), name, pages), html)


def _id(notebook: str, place: str) -> str:
    return f'id="{_place(notebook, place)}" ' if place else ""


def _place(notebook: str, place: str) -> str:
    """What a place of a notebook is called in the report. Links may be percent-encoded in more ways than one."""
    return escape("--".join(filter(None, [notebook, unquote(unescape(place))])))


def _relinked(others: str, target: str, words: str, name: str, pages: dict[str, Path]) -> str:
    """A link of the notebook `name`, to a place in this file or to the net; its words alone where it leads nowhere."""
    page, _, place = target.partition("#")
    stem = page.removeprefix("../").removesuffix(".ipynb") or name  # a solution leads back to its notebook
    if not target.startswith("http"):
        target = f"#{_place(stem, place)}"
    return f'<a {others}href="{target}">{words}</a>' if stem in pages or target.startswith("http") else words
