import pytest

from gqalib.exercise import attempt


def check(double):
    assert double(2) == 4, "Twice two is four."
    assert double(0) == 0, "Twice nothing is nothing."


def unfinished(x):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: 2 * x, "right"),
        (lambda x: x + 2, "not yet. Twice nothing is nothing."),
        (lambda x: x.width, "not yet. It raises AttributeError: 'int' object has no attribute 'width'"),
        (unfinished, "not tried yet"),
        (None, "not tried yet"),
    ],
)
def test_an_answer_is_told_what_is_wrong(answer, says, capsys):
    attempt(3, check, answer)
    assert capsys.readouterr().out == f"exercise 3: {says}\n"
