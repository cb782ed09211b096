"""A long computation in steps, so that whoever runs it may keep what each step came to.

    @in_steps()
    def removal_importance(model, windows):
        for layer in range(num_layers):
            loss = yield f"layer-{layer}", partial(loss_without, model, windows, layer)

A step is a name and what computes it; the computation goes on with what that came to. Called as it stands, such a
function computes every step. `run.resume.Progress.run` computes those that no earlier run has kept.
"""

from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

Steps = Generator[tuple[str, Callable[[], Any]], Any, Any]


def in_steps(*apart: str) -> Callable[[Callable[..., Steps]], Callable[..., Any]]:
    """Make a plain function of one that yields its steps; `apart` names arguments that no step depends on.

    A step may change what the computation has in hand only if its result says all about it.
    """

    def plain(steps: Callable[..., Steps]) -> Callable[..., Any]:
        @wraps(steps)
        def function(*args: Any, **options: Any) -> Any:
            return drive(steps(*args, **options), lambda _, compute: compute())

        function.steps, function.apart = steps, apart
        return function

    return plain


def drive(steps: Steps, once: Callable[[str, Callable[[], Any]], Any]) -> Any:
    """What the computation returns, each step's result being `once(name, compute)`; what that raises is raised where
    the computation waits for it."""
    go_on, value = steps.send, None
    try:
        while True:
            name, compute = go_on(value)
            del value  # large, as are the streams that `compute` holds
            try:
                go_on, value = steps.send, once(name, compute)
            except BaseException as error:
                go_on, value = steps.throw, error
            del compute
    except StopIteration as end:
        return end.value
