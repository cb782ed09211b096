"""The runner: executes the numbered notebooks by papermill, a line of progress each; goes on after an interruption."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from gqalib.errors import InputError
from gqalib.model.load import load_tokenizer
from gqalib.run.checks import NOTEBOOKS, check_preset, code_of, selected, waits_for
from gqalib.run.corpora import BY_PATH, evaluation_windows
from gqalib.run.notebook import (
    AT_ONCE, HELD, SHARED, code_used, committed_seconds, default_run_dir, find_record, fitting_record, locked,
    progress_dir, read_record, sha256,
)  # fmt: skip
from gqalib.run.resume import replacing

KERNEL_ENVIRONMENT = {  # never MPLBACKEND: figures would vanish from the executed notebooks
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}
TIMEOUT_S = 24 * 3600  # per cell; a hung kernel ends some day
REFUSALS = {kind.__name__ for kind in (InputError, *InputError.__subclasses__())}  # in a cell: one sentence, no trace
KERNEL_DIED = 3  # the command line's exit status: the same run may succeed another time


class NotebookFailed(RuntimeError):
    """A notebook of the series raised; the message names notebook, cell and error."""


class KernelDied(NotebookFailed):
    """A notebook's process was killed from outside, often for memory: the same run may succeed another time."""


@dataclass
class Series:
    """What is to be run, checked before anything starts."""

    preset: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    run_dir: Path | None = None
    seed: int = 0
    first: str | None = None
    only: str | None = None
    notebooks: Path = NOTEBOOKS

    def __post_init__(self) -> None:
        self.parameters = asdict(check_preset(self.preset, self.overrides))
        self._check_length()
        self.run_dir = Path(self.run_dir or default_run_dir(self.preset, self.overrides, self.seed)).absolute()
        self.paths = selected(self.notebooks, self.first, self.only)

    def _check_length(self) -> None:
        """Anybody's own text may be too short; the corpora that the workbook names are not."""
        p = self.parameters
        if p["corpus"].startswith(BY_PATH):
            tokenizer = load_tokenizer(p["model"])
            for split, length in (("test", p["evaluation"]["short_window"]), ("train", p["calibration"]["length"])):
                evaluation_windows(p["corpus"], split, tokenizer, length, length)

    def run(self, force: bool = False, at_once: int = 1) -> None:
        """Execute what is not finished yet, one line of progress each.

        Args:
            at_once: notebooks that run beside each other, each on its share of the cores; one that reads another's
            record waits for it, and those begin first on which most work waits. If one fails, the others are stopped,
            and go on where they were another time.
        """
        share = KERNEL_ENVIRONMENT | {HELD: str(self.run_dir), AT_ONCE: str(at_once)}
        if at_once > 1:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
        started, running = time.monotonic(), {}
        waiting = self._most_urgent_first() if at_once > 1 else list(self.paths)
        with locked(self.run_dir), patch.dict(os.environ, share):  # kernels inherit it
            if force:
                shutil.rmtree(progress_dir(self.run_dir, SHARED), ignore_errors=True)
                progress_dir(self.run_dir).mkdir(exist_ok=True)  # so that nothing that was committed is unpacked either
            with ThreadPoolExecutor(at_once) as pool, _stopped_on_error():
                while waiting or running:
                    for path in self._ready(waiting, running)[: at_once - len(running)]:
                        waiting.remove(path)
                        running[pool.submit(self._finish, path, force)] = path
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        path, left = running.pop(done), [*running.values(), *waiting]
                        self._say(path, done.result(), started, left, at_once)

    def _most_urgent_first(self) -> list[Path]:
        """By the time from a notebook's beginning to the end of all that wait for it, as the committed run took."""
        rest: dict[Path, float] = {}
        for path in reversed(self.paths):  # who waits for a notebook has a higher number
            later = [rest[other] for other in rest if path.stem in waits_for(other)]
            rest[path] = (committed_seconds(path.stem, self.preset) or 1.0) + max(later, default=0.0)
        return sorted(self.paths, key=lambda path: -rest[path])

    def _ready(self, waiting: list[Path], running: dict[Future, Path]) -> list[Path]:
        """Those that need no record or model of a notebook that is not there yet."""
        unfinished = {path.stem for path in [*waiting, *running.values()]}
        ready = [path for path in waiting if not unfinished.intersection(waits_for(path))]
        return ready or ([] if running else waiting[:1])  # where they wait in a circle, the first says what it lacks

    def _finish(self, path: Path, force: bool) -> float | None:
        """Execute a notebook that is not finished; the seconds that it took, or None."""
        if not force and self.is_finished(path):
            return None
        if force:
            shutil.rmtree(progress_dir(self.run_dir, path.stem), ignore_errors=True)
        begun = time.monotonic()
        print(f"{path.stem} begins", flush=True)
        self.execute(path)
        return time.monotonic() - begun

    def _say(self, path: Path, seconds: float | None, started: float, left: list[Path], at_once: int) -> None:
        number = f"[{len(self.paths) - len(left)}/{len(self.paths)}] {path.stem:24s}"
        clock = f"elapsed {_clock(time.monotonic() - started)}, {self._expected_s(left, at_once)}"
        print(number, "finished before" if seconds is None else f"{seconds:4.0f} s   ({clock})", flush=True)

    def is_finished(self, path: Path) -> bool:
        """Whether record and notebook stand for these parameters, inputs, code and upstream, and nothing is gone."""
        where = self.parameters, self.seed
        try:
            record = fitting_record(self.run_dir / f"{path.stem}.json", *where)
            executed = code_of(self.run_dir / path.name)
            upstream = {name: sha256(find_record(name, self.run_dir, *where)) for name in record["upstream"]}
            same = record["library"] == code_used(path) and record["upstream"] == upstream
            whole = all((self.run_dir / name).exists() for name in record["artefacts"])
        except (InputError, OSError, KeyError, ValueError):
            return False
        return whole and same and executed == code_of(path)

    def execute(self, path: Path) -> None:
        """Run one notebook headlessly; the executed copy appears in the run folder when it is whole.

        Raises:
            InputError: a cell raised one. NotebookFailed: it raised anything else. KernelDied: its process was killed.
        """
        import papermill
        from nbclient.exceptions import DeadKernelError

        values = {"preset": self.preset, "overrides": self.overrides, "run_dir": str(self.run_dir), "seed": self.seed}
        if unknown := values.keys() - papermill.inspect_notebook(str(path)).keys():
            lacks = f"{path.name} has no parameter {', '.join(sorted(unknown))}"
            raise InputError(f"{lacks}: add it to the cell tagged parameters")
        record, failed = self.run_dir / f"{path.stem}.json", self.run_dir / f"{path.stem}.failed.ipynb"
        record.unlink(missing_ok=True)  # an old record must not stand beside a half-run notebook
        with replacing(self.run_dir / path.name) as executed:
            try:
                papermill.execute_notebook(
                    str(path), str(executed), values, kernel_name="python3", language="python", cwd=str(path.parent),
                    progress_bar=False, execution_timeout=TIMEOUT_S, extra_arguments=["--log-level=CRITICAL"],
                )  # fmt: skip
            except papermill.PapermillExecutionError as error:
                if error.ename in REFUSALS:
                    raise InputError(f"{error.evalue} ({path.stem})") from None
                where = f"{path.stem}, cell {error.cell_index}: {error.source.strip().splitlines()[0]}"
                said = f"{where}\n{error.ename}: {error.evalue}"
                raise NotebookFailed(f"{said}\nthe notebook up to there: {executed.replace(failed)}") from None
            except DeadKernelError:
                what = f"{path.stem}: its process was killed from outside"
                raise KernelDied(f"{what}; if it was for memory, run less beside it") from None
            read_record(record)  # a notebook that wrote none has not finished
        failed.unlink(missing_ok=True)

    def _expected_s(self, paths: list[Path], at_once: int) -> str:
        """What is left, from the committed records of the same preset where there are any."""
        seconds = [committed_seconds(path.stem, self.preset) for path in paths]
        if not paths:
            return "done"
        return f"about {_clock(sum(seconds) / at_once)} left" if all(seconds) else f"{len(paths)} left"

    def summary(self) -> str:
        """The main tables and where everything lies."""
        from gqalib.run.publish import MAIN_TABLES  # three seconds that a grid's runs do without

        lines = []
        for name, (_, table) in MAIN_TABLES.items():
            with contextlib.suppress(InputError):
                lines += ["", table(read_record(self.run_dir / f"{name}.json")).to_string(index=False)]
        lines += [""] * bool(lines)
        lines += [f"notebooks  {self.run_dir / path.name}" for path in self.paths]
        return "\n".join([*lines, f"figures    {self.run_dir / 'figures'}"])


@contextlib.contextmanager
def _stopped_on_error() -> Iterator[None]:
    """An error inside, or Ctrl-C, ends the kernels that still run, so that nobody waits for them."""
    try:
        yield
    except BaseException:
        for kernel in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                kernel.terminate()
        raise


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
