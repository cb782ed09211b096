"""What is committed: notebooks executed once and in order, README equal to the records, nothing of anybody's
machine."""

import ast
import json
import re
import shutil
import subprocess
import tarfile

import nbformat
import pytest

from gqalib.model.load import REPOSITORY
from gqalib.run import publish
from gqalib.run.notebook import read_record

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RESULTS = REPOSITORY / "data" / "results" / "tiny"
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(params=NOTEBOOKS, ids=NAMES, scope="module")
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_executed_once_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) > 5


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=NAMES[1:])
def test_heading_names_the_run_of_the_outputs(path):
    heading = nbformat.read(path, as_version=4).cells[0].source
    (row,) = [line for line in heading.splitlines() if line.startswith("| **Outputs** |")]
    (preset,) = [name for name in (publish.REAL, publish.QUICK) if f"of preset `{name}`" in row]
    record = read_record(RESULTS.parent / preset / f"{path.stem}.json")
    assert f"of preset `{record['preset']}`" in row and f"code of `{record['git_commit'][:7]}" in row
    assert publish.named(heading, record) == heading


def test_no_error_output(notebook):
    assert not [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]


def test_shape_of_a_page(notebook):
    """Opens with question and time, closes with takeaways, limits and the way on; cells are short."""
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    for word in ("**Question**", "**Time**", "**Reads**", "**Writes**"):
        assert word in first
    for word in ("## Takeaways", "**Limits.**"):
        assert word in last
    assert "Exercise" in "\n".join(cell.source for cell in notebook.cells)
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(notebook))
    assert lengths[len(lengths) // 2] <= 9 and lengths[-1] <= 24
    assert [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]


def test_plans_heed_the_multiple(notebook):
    """At 8B widths are to be multiples of 128: every table and every uniform plan is told so."""
    code = "\n".join(cell.source for cell in code_cells(notebook))
    asked = r"(?:frontier\.frontier|covariances_and_table|cost_table|uniform_plan)[(,]"
    calls = [code[match.end() :][:120] for match in re.finditer(asked, code)]
    assert all("multiple" in call for call in calls), calls


LONG = {
    "covariances_and_table", "cost_table", "distill", "frontier.frontier", "in_context", "mend", "prune_and_recover",
    "prune_to", "founding.prune", "refit.sweep", "trial",
}  # fmt: skip


def outside_stages(node, long):
    """The long calls below a node that stand in no `with` of a stage."""
    if isinstance(node, ast.With) and "stage" in ast.unparse(node.items[0].context_expr):
        return set()
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    called = ast.unparse(node.args[0]) if called.endswith(".run") else called  # a function in steps, kept
    found = {name for name in long if called == name or called.endswith(f".{name}")}
    return found.union(*(outside_stages(child, long) for child in ast.iter_child_nodes(node)))


@pytest.mark.parametrize("path", NOTEBOOKS[8:], ids=NAMES[8:])
def test_long_steps_state_their_memory(path):
    """Also those in the notebook's functions: whoever calls them does it in a stage."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))))
    functions, long = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)], set(LONG)
    for _ in functions:
        long |= {f.name for f in functions if any(outside_stages(part, long) for part in f.body)}
    assert not set().union(*(outside_stages(node, long) for node in tree.body if node not in functions))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("00")])
def test_record_beside_notebook(name):
    record = read_record(RESULTS / f"{name}.json")
    assert record["preset"] == "tiny" and record["overrides"] == {} and record["metrics"]
    for artefact in record["artefacts"]:
        if artefact.startswith("figures/"):
            assert (REPOSITORY / "figures" / "tiny" / artefact.removeprefix("figures/")).stat().st_size > 1000


def test_records_agree():
    records = [read_record(RESULTS / f"{name}.json") for name in NAMES if not name.startswith("00")]
    assert len({record["git_commit"] for record in records}) == 1, "make one run of one commit"
    assert not records[0]["git_commit"].endswith("-dirty")
    assert len({record["machine"] for record in records}) == 1
    sections = [item for record in records for item in record["parameters"].items()]
    assert len({json.dumps(item) for item in sections}) == len({name for name, _ in sections})


def test_no_speed_travels():
    """What was measured on one machine is no measurement of another."""
    archives = sorted(RESULTS.parent.glob("*/progress/*.tar.gz"))
    for archive in archives:
        with tarfile.open(archive) as packed:
            assert not [name for name in packed.getnames() if "/decode speed" in name], archive
    assert archives


def test_readme_equals_the_records():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for name, block in publish.readme_blocks(RESULTS.parent).items():
        assert f"<!-- {name} -->\n{block}\n<!-- /{name} -->" in text, f"run `make publish`: README's {name} differ"


def test_readme_shows_no_table_of_two_runs(tmp_path):
    """01 has run anew, 07 has not: its perplexities are of another text than 01 says."""

    def shown():
        return re.findall("preset `(.*?)`", publish.readme_blocks(tmp_path)["results"])

    def change(path, old, new):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    for name in ("smollm2", "tiny"):
        shutil.copytree(RESULTS, tmp_path / name)
        change(tmp_path / name / "07_cost_analysis.json", '"preset": "tiny"', f'"preset": "{name}"')
    assert shown() == ["smollm2"]
    change(tmp_path / "smollm2" / "01_baseline.json", '"seed": 0', '"seed": 1')
    assert shown() == ["tiny"]
    (tmp_path / "tiny" / "01_baseline.json").unlink()  # as where 07 alone was published
    assert shown() == []


def test_the_story_holds():
    """What the series teaches must be what it measured."""
    value = {
        key: m["value"]
        for name in NAMES
        if name != NAMES[0]
        for key, m in read_record(RESULTS / f"{name}.json")["metrics"].items()
    }
    dense = value["perplexity_short"]
    assert value["perplexity_v2"] > 5 * value["perplexity_v3"]
    assert dense < value["perplexity_v3_lora"] < value["perplexity_v3"]
    assert value["perplexity_v2_lora"] > 2 * value["perplexity_v3_lora"]
    assert value["masked_oracle_difference"] < 1e-4 and value["merge_difference"] < 1e-3
    assert value["factor_pairing"] > 2 * value["factor_choice"]
    sizes = [key.removeprefix("ratio_own_") for key in value if key.startswith("ratio_own_")]
    assert sizes and all(value[f"ratio_own_{size}"] < value[f"ratio_best_peer_{size}"] for size in sizes)
    assert value["ratio_allocated"] < value["ratio_uniform"]
    assert value["ratio_literal_distilled"] < value["ratio_literal_start"] < value["ratio_literal_taylor_start"]


def test_reference_model_is_good_enough():
    card = (REPOSITORY / "data" / "reference_model" / "README.md").read_text(encoding="utf-8")
    assert float(re.search(r"test perplexity \| ([\d.]+)", card)[1]) <= 25


def tracked():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return [REPOSITORY / name for name in listed if name and (REPOSITORY / name).exists()]


def test_nothing_of_anybodys_machine():
    pattern = re.compile(r"/(?:tmp|root|work)/\w|/home/(?!a/)\w+/")
    for path in tracked():
        if (
            path.suffix in {".ipynb", ".py", ".md", ".json", ".yml", ".yaml", ".toml", ".txt", ""}
            and path.name != "test_repository.py"
        ):
            assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_algorithms_know_nothing_of_runs():
    for room in ("model", "prune", "peers"):
        for path in (REPOSITORY / "gqalib" / room).glob("*.py"):
            assert "import gqalib.run" not in (text := path.read_text(encoding="utf-8")), path
            assert "from gqalib.run" not in text and "from gqalib import run" not in text, path


def test_no_pickles_and_no_remote_code():
    banned = ["torch" + ".load(", "trust_remote_code" + "=True", "pickle" + ".load"]
    for path in tracked():
        if (
            path.suffix == ".py"
        ):  # one place must: that a saved folder loads without gqalib can be tested in no other way
            found = [
                word for word in banned for _ in range(path.read_text(encoding="utf-8").replace(" ", "").count(word))
            ]
            assert found == (banned[1:2] if path.name == "test_models.py" else []), path
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl"}, path


def test_one_name_for_one_thing():
    """A seed is the random one's, a sweep the refit's: neither is the founding document nor a range of rates."""
    names = {name for path in RESULTS.parent.glob("*/*.json") for name in read_record(path)["tables"]}
    assert "sweep" not in names
    said = [path.read_text(encoding="utf-8") for path in (*NOTEBOOKS, *RESULTS.parent.glob("*/*.json"))]
    assert not [text for text in said if re.search(r"seed (Taylor|\(q\+k\+v\))|SEED_PERCENT", text)]
