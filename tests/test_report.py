"""The report of a run of two small notebooks: one file, whose links lead somewhere in it."""

import base64
import re
import subprocess
from html import unescape
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.text import Text
from latex2mathml.converter import convert
from nbformat import read, v4, write

from gqalib import figures
from gqalib.model.names import REPOSITORY
from gqalib.run import publish
from gqalib.run.checks import NOTEBOOKS, numbered_notebooks
from gqalib.run.cli import main
from gqalib.run.notebook import Notebook

RESULT = {"model": "dense", "parameters kept %": 100.0, "backbone removed %": 0.0, "perplexity": 19.7}
RESULT |= {"speed-up": 1.0, "ceiling": 1.0}
TOKENS = {"start": "refitted-50", "way": "text", "tokens": 16384, "seconds": 90.0, "times dense": 2.22455}
TOKENS |= {"± standard error": 0.09065, "bought back %": None, "steps": 16}
CLAIM = {
    "claim": "v2 <broke>",
    "tested": "x",
    "claimed": "at least 10",
    "measured": "50",
    "verdict": "reproduced in form",
}
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
TEXT = """# 08 · What's left?

## 1. How far? 5 % · more
$$\\tfrac{1}{2}x^2$$ is a formula, and so is $\\lambda$; `$5` is none.
See [07](07_cost_analysis.ipynb), [its cost](07_cost_analysis.ipynb#2.-Cost%2C-all), [a gone one](12_gone.ipynb#x),
[solutions](solutions/08_claims.ipynb) and [the net](https://example.org/a.ipynb)."""


def finished(run_dir, name, text, tables, caption, seed=3):
    """Record, figure and executed notebook, as a runner leaves them."""
    nb = Notebook(name, "tiny", {"corpus": "random-tokens"}, run_dir, seed)
    for table, row in tables.items():
        nb.table(table, pd.DataFrame([row]))
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    nb.figure(fig, "curve", caption)
    nb.finish()
    png = base64.b64encode((run_dir / "figures" / f"{name[:2]}_curve.png").read_bytes()).decode()
    alt = {"image/png": {"alt": caption}}
    shown = v4.new_output("display_data", {"image/png": png}, metadata=alt)
    cells = [v4.new_markdown_cell(text), v4.new_code_cell("secret = 1", outputs=[shown])]
    write(v4.new_notebook(cells=cells), run_dir / f"{name}.ipynb")


@pytest.fixture
def page(tmp_path, capsys):
    finished(tmp_path, "07_cost_analysis", "# 07 · Cost\n\n## 2. Cost, all", {"results": RESULT}, "curve")
    finished(tmp_path, "08_claims", TEXT, {"claims": CLAIM}, 'A "curve" & its model\'s ends.')
    assert main(["report", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'report.html'}\n")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_link_leads_somewhere(page):
    ids = [unescape(place) for place in re.findall(r' id="([^"]*)"', page)]
    links = [unescape(link) for link in re.findall(r'href="([^"]*)"', page)]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    assert "#07_cost_analysis" in links and "#07_cost_analysis--2.-Cost,-all" in links
    assert [link for link in links if link[0] != "#"] == ["https://example.org/a.ipynb"]
    assert "a gone one" in page and "gone.ipynb" not in page
    assert '<a href="#solutions/08_claims">solutions</a>' in page and 'id="solutions/08_claims"' in page


def test_a_solution_leads_back_and_has_ids_of_its_own(tmp_path):
    """Cells of these two have the same ids."""
    for name in ("11_search", "12_distillation"):
        finished(tmp_path, name, f"# {name}", {"tokens": TOKENS}, "")
    main(["report", "--run-dir", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and '<a href="#12_distillation">' in page.partition('id="solutions/12_dist')[2]


def test_index_and_figures(page):
    index, *sections = page.split("<section")
    assert len(sections) == 4 and "Report of preset tiny" in index
    for word in ("random-tokens", "<td>3</td>", "19.70", "v2 &lt;broke&gt;", "reproduced in form", "cores"):
        assert word in index
    assert "<td>override corpus</td>" in index
    assert "Figure 7.1. curve" in index and "Figure 8.1. A &quot;curve&quot; &amp; its model" in index
    assert index.count("data:image/png;base64,") == index.count('--curve"') == 2
    assert 'id="08_claims--curve"' in sections[1] and "secret" in sections[1]


def test_formulas_need_no_network(page):
    for drawn in ("<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>", "<mi>λ</mi>", "<code>$5</code>"):
        assert drawn in page
    assert 'display="block"' in page and "tfrac" not in page and "<script" not in page


def test_every_formula_of_the_course_is_drawn():
    """What the converter does not know it leaves as it is, with its backslash."""
    formulas = [
        found[1] or found[2]
        for path in numbered_notebooks(NOTEBOOKS)
        for cell in read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for found in FORMULA.finditer(re.sub(r"(?s)```.*?```|`[^`]*`", "", cell.source))
    ]
    assert len(formulas) > 50 and not [tex for tex in formulas if "\\" in re.sub("<[^>]*>", "", convert(tex))]


def test_a_figure_is_there_for_a_paper(page, tmp_path):
    pdf = (tmp_path / "figures" / "08_curve.pdf").read_bytes()
    width = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) / 72
    assert pdf.startswith(b"%PDF") and width == pytest.approx(figures.COLUMN_WIDTH, abs=0.15)  # its margins are cut


@pytest.mark.parametrize(("panels", "width", "factor"), [(1, figures.COLUMN_WIDTH, 0.7), (4, figures.TEXT_WIDTH, 0.75)])
def test_a_figure_is_as_it_was_after_it_shrank_for_a_paper(panels, width, factor, tmp_path):
    fig, axes = plt.subplots(1, panels, figsize=(9, 3), squeeze=False)
    line, dots = axes[0, 0].errorbar([1, 2], [3, 4], [1, 1], lw=2, ms=5)[0], axes[0, 0].scatter([1], [2], s=9)

    def sizes():
        letters = sorted({text.get_fontsize() for text in fig.findobj(Text)})  # each size once: ticks come and go
        return [*letters, line.get_linewidth(), line.get_markersize(), *dots.get_sizes()]

    fig.draw_without_rendering()
    seen, before = [], sizes()
    fig.savefig = lambda path: seen.extend([fig.get_size_inches()[0], *sizes()])
    figures.save_for_paper(fig, tmp_path / "a.pdf")
    assert seen == pytest.approx([width, *(size * factor for size in before)])
    assert sizes() == before and fig.get_size_inches().tolist() == [9, 3]
    plt.close(fig)


def test_code_is_hidden_until_the_button_is_pressed(page):
    assert ".input { display: none;" in page and "body.code .input { display: block; }" in page
    assert "classList.toggle('code')" in page and '<div class="input">' in page


def test_nothing_to_report(tmp_path, capsys):
    assert main(["report", "--run-dir", str(tmp_path)]) == 2
    assert "holds no finished notebook: run the series first" in capsys.readouterr().err


def test_a_grid_has_a_page_across_its_runs(tmp_path, capsys):
    runs = ["tiny+seed=1", "tiny", "tiny+cost.min_run_s=2.0"]
    for run, seed in zip(runs[:2], (1, 0)):
        (tmp_path / run).mkdir()
        finished(tmp_path / run, "08_claims", "# 08 · What's left?", {"claims": CLAIM}, "dots", seed)
    (tmp_path / "grid.png").write_bytes((tmp_path / "tiny" / "figures" / "08_curve.png").read_bytes())
    table = pd.DataFrame({"run": runs, "preset": "tiny", "seed": [1, 0, 0], "seconds": [3.0, 5.0, None]})
    table = table.assign(attempts=1, error=[None, None, "a <sad> end"], perplexity_v3=[20.0, 22.0, None])
    table = table.assign(other=3.14159265)
    table.assign(**{"cost.min_run_s": [1.0, 1.0, 2.0]}).to_csv(tmp_path / "grid.csv", index=False)
    assert main(["report", "--run-dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = [unquote(unescape(link)) for link in re.findall(r'href="([^"]*)"', page)]
    reports = [f"{run}/report.html" for run in runs[:2]]
    assert links == reports + [f"{link}#08_claims--curve" for link in reports]  # those of the gallery come last
    assert all('id="08_claims--curve"' in (tmp_path / link).read_text(encoding="utf-8") for link in reports)
    assert "21.00 ± 1.41" in page and runs[2] in page and "a &lt;sad&gt; end" in page
    assert "<td>20.00</td>" in page and "<td>2.0</td>" in page and "other" not in page and "3.14" not in page
    assert "overflow-x: auto" in page and "<b>Figure 1.</b> A panel for each" in page and "Figure 8.1. dots" in page
    index, _, counts = page.partition("<h2>Verdicts")
    said = {"preset": "tiny", "seed": "1; 0", "override corpus": "random-tokens", "commit": "", "machine": ""}
    assert all(re.search(rf"<td>{name}</td>\s*<td>{value}", index) for name, value in said.items())
    assert re.search(r"(?s)<th>reproduced in form</th>.*<td>tiny</td>\s*<td>1</td>", counts)


def test_the_index_has_the_table_of_all_methods(tmp_path):
    row = {"method": "refit", "fraction": 0.25, "sample": 0, "ratio": 1.5, "backbone_removed_percent": 25.0, "note": ""}
    finished(tmp_path, "10_frontier", "# 10 · Every method", {"frontier": row}, "dots")
    main(["report", "--run-dir", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Perplexity over dense, by the part of the backbone removed</h2>" in page
    assert "<td>refit</td>" in page and "<td>1.50</td>" in page and "<h2>Results</h2>" not in page


def test_the_index_has_what_distillation_bought_back(tmp_path):
    finished(tmp_path, "12_distillation", "# 12 · Bought back", {"tokens": TOKENS}, "")
    main(["report", "--run-dir", str(tmp_path)])
    index = (tmp_path / "report.html").read_text(encoding="utf-8").partition("<section")[0]
    assert all(f"<td>{cell}</td>" in index for cell in ("refitted-50", "text", "16,384", "1.5", "2.225", "0.091", "–"))
    assert "steps" not in index


def test_a_saved_model_has_the_second_text_beside_it():
    """In its own column for each window; a run whose model was not saved has none."""
    other = {"text": "wt2", "window": 2048, "model": "long-50", "ratio": 2.26612}
    tokens = [TOKENS | {"model": ""}, TOKENS | {"model": "long-50"}]
    table = publish.tokens_table({"tables": {"tokens": tokens, "other_text": [other, other | {"model": "dense"}]}})
    assert table.columns[-1] == "wt2, 2048" and table["wt2, 2048"].tolist() == ["–", "2.266"]


def test_make_reports_a_run_or_a_grid():
    def says(*arguments):
        command = ["make", "--dry-run", "report", "PRESET=tiny", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    assert "gqalib report --preset tiny\n" in says("RUN=")
    assert 'gqalib report --run-dir "runs/grid-a b"\n' in says("RUN=runs/grid-a b")
