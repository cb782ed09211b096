"""The exercises of the notebooks: every stub has a check and a solution, which passes it; the stub itself does not."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from gqalib.run.checks import NOTEBOOKS

PAGES, SOLUTIONS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")), NOTEBOOKS / "solutions"


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def exercises(path):
    """Code cells that begin with `# exercise N`, by N."""
    return {int(m[1]): source for source in cells(path) if (m := re.match(r"# exercise (\d+)\b", source))}


def checks(path):
    return {int(m[1]): source for source in cells(path) if (m := re.search(r"^attempt\((\d+), ", source, re.M))}


CASES = [(path, number) for path in PAGES for number in exercises(path)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("path", "number"), CASES, ids=[f"{path.stem}-{number}" for path, number in CASES])
def test_a_solution_passes_and_a_stub_does_not(path, number, capsys):
    """Both run by themselves: what they need, they import."""
    check, solution = checks(path)[number], exercises(SOLUTIONS / path.name)[number]
    for source, said in ((exercises(path)[number], "not tried yet"), (solution, "right")):
        exec(f"{source}\n\n{check}", {})
        assert capsys.readouterr().out.rstrip().endswith(f"exercise {number}: {said}")
    plt.close("all")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_exercise_says_what_it_takes(path):
    numbers, text = list(exercises(path)), "\n".join(cells(path, "markdown"))
    assert 3 <= len(numbers) <= 5 and numbers == sorted(checks(path)) == sorted(exercises(SOLUTIONS / path.name))
    for number in numbers:
        told = text.split(f"### Exercise {number} · ")[1].split("### Exercise")[0]
        assert re.search(r"[★☆]{3} · \d+ minutes?", told) and "<summary>Hint</summary>" in told
        assert f"solutions/{path.name}" in told
    assert "prediction" in "\n".join(exercises(path).values())


@pytest.mark.parametrize("path", sorted(SOLUTIONS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_solutions_were_run_once_in_order(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in found if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)) and (NOTEBOOKS / path.name).is_file()
