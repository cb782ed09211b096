"""Runs as Ray tasks: each is `python -m gqalib run` in a process of its own, and is tried again when its worker dies.

A worker leaves `attempts.json` and `log.txt` in its run's folder. What it executes needs the standard library and Ray alone and is sent
to it by value, so that no worker loads torch only to wait for a process. On a cluster the project, its environment and the sweep's folder
must lie at the same place on every machine, and `ray start` wants RAY_process_group_cleanup_enabled=1; a cluster that asks for a token is
reached with RAY_AUTH_MODE=token.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqalib.errors import InputError
from gqalib.run.resume import replacing
from gqalib.run.series import KERNEL_DIED, Series

PROGRAM = ("-m", "gqalib")
WORKER_DIED = "its worker died"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # what a run measures must not wait for others
    "RAY_process_group_cleanup_enabled": "1",  # what a dead worker had started must not run on beside the next attempt
}
OBJECT_STORE_BYTES = 80 * 2**20  # nothing but a line of text comes back from a task


def run_all(
    jobs: list[Series], num_cpus: int = 1, num_gpus: float = 0, max_retries: int = 2, address: str | None = None
) -> Iterator[tuple[Series, str | None]]:
    """Run each job as one task, as many at a time as there are cores and cards for; yields a job as it ends, with its error or None.

    Raises:
        InputError: no cluster answers at the address, or no machine has as many cores or cards as one run is to have.
    """
    with _ray(address) as ray:
        _check_resources(ray, num_cpus, num_gpus)
        attempt = ray.remote(
            num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries, retry_exceptions=[ChildProcessError]
        )(_attempt)
        tasks = {
            attempt.remote(_arguments(job), str(job.run_dir), os.getcwd(), num_cpus, num_gpus): job for job in jobs
        }
        while tasks:
            (task,), _ = ray.wait(list(tasks), num_returns=1)
            job = tasks.pop(task)
            try:
                yield job, ray.get(task)
            except ray.exceptions.RayError:  # as often as it was allowed to
                attempts = _close(read_attempts(job.run_dir))
                yield job, f"{attempts[-1]['ended']} at attempt {len(attempts)}: see {job.run_dir / 'log.txt'}"


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """One entry per attempt at a run, oldest first: host, pid of the worker, started, seconds, and how it ended (None: it has not)."""
    try:
        return json.loads((Path(folder) / "attempts.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []


def _arguments(job: Series) -> list[str]:
    """What `python -m gqalib` is asked for; values go as JSON, which YAML reads."""
    numbers = ",".join(path.name[:2] for path in job.paths)
    pairs = [part for name, value in job.overrides.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    where = ["--run-dir", str(job.run_dir), "--notebooks-dir", str(Path(job.notebooks).absolute())]
    return ["run", "--preset", job.preset, "--seed", str(job.seed), "--only", numbers, *where, *pairs]


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray on this machine, in a folder that goes with it, or on a running cluster; without dashboard, reporting and messages of its own."""
    os.environ.update(RAY_ENVIRONMENT)
    if not address:  # a password for this sweep alone; Ray would leave one in the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        path = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_without_iri_grammar(folder), path]))
        sent = [sys.modules[function.__module__] for function in (_attempt, replacing)]
        for module in sent:
            ray.cloudpickle.register_pickle_by_value(module)
        try:
            _start(ray, address, folder)
            ray._private.worker._worker_logs_enabled = (
                False  # of a dead worker Ray tells in a paragraph, the sweep in a line
            )
            yield ray
        finally:
            os.environ["PYTHONPATH"] = path
            for module in sent:
                ray.cloudpickle.unregister_pickle_by_value(module)
            ray.shutdown()


def _without_iri_grammar(folder: str) -> str:
    """A folder for PYTHONPATH with which Ray's own processes load in a fifth of the time.

    jsonschema compiles a grammar of web addresses (`rfc3987_syntax`) whenever it is imported, if it is there; nothing here needs it.
    """
    (Path(folder) / "rfc3987_syntax.py").write_text("raise ImportError\n", encoding="utf-8")
    return folder


def _start(ray: Any, address: str | None, folder: str) -> None:
    """Three times if need be: on a busy machine Ray is not up within the half minute that it gives itself, and raises a bare Exception."""
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": folder}
    for left in (2, 1, 0):
        try:
            ray.init(address or "local", logging_level="CRITICAL", log_to_driver=False, **({} if address else local))
            return
        except (ConnectionError, ValueError) as error:
            hint = "give the host:port that `ray start --head` printed, and set RAY_AUTH_MODE=token if it asks for one"
            raise InputError(f"no Ray cluster answers at {address}: {hint}") from error
        except Exception:
            ray.shutdown()
            if address or not left:
                raise


def _check_resources(ray: Any, num_cpus: int, num_gpus: float) -> None:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= num_cpus and machine.get("GPU", 0) >= num_gpus for machine in machines):
        there = "; ".join(f"{machine.get('CPU', 0):g} and {machine.get('GPU', 0):g}" for machine in machines)
        raise InputError(
            f"no machine has num_cpus = {num_cpus} and num_gpus = {num_gpus:g} for a run (there are {there}): lower them in the grid"
        )


def _attempt(arguments: list[str], folder: str, cwd: str, num_cpus: int, num_gpus: float) -> str | None:
    """One attempt at a run, in a worker. Returns None, or the sentence with which the run itself failed.

    Raises:
        ChildProcessError: its process was killed; Ray tries again.
    """
    place, begun = Path(folder), time.time()
    place.mkdir(parents=True, exist_ok=True)
    attempt = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(begun),
        "seconds": None,
        "ended": None,
    }
    with (place / ".lock").open("a") as lock:  # what a dead worker left may take a moment to go, or run to its end
        fcntl.flock(lock, fcntl.LOCK_EX)
    earlier = _close(read_attempts(place))
    _write(place, [*earlier, attempt])
    status, said = _execute(arguments, place, cwd, num_cpus, num_gpus)
    killed = status < 0 or status == KERNEL_DIED
    ended = "finished" if status == 0 else "its process was killed" if killed else said
    _write(place, [*earlier, attempt | {"seconds": round(time.time() - begun, 1), "ended": ended}])
    if killed:
        raise ChildProcessError(ended)
    return said if status else None


def _execute(arguments: list[str], place: Path, cwd: str, num_cpus: int, num_gpus: float) -> tuple[int, str]:
    """Exit status of the process, and the last thing that it said, in one line."""
    threads = {name: str(num_cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    hidden = {} if num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    with (place / "log.txt").open("a+", encoding="utf-8") as log:
        log.write(f"\n{sys.executable} {' '.join([*PROGRAM, *arguments])}\n")
        log.flush()
        begun = log.tell()
        status = subprocess.run(
            [sys.executable, *PROGRAM, *arguments],
            cwd=cwd,
            env=os.environ | threads | hidden,
            stdout=log,
            stderr=log,
            check=False,
        ).returncode
        log.seek(begun)
        return status, _last_words(log.read())


def _last_words(text: str) -> str:
    """The sentence after `error:` or `failed:`; of a traceback the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    for start, line in enumerate(lines):
        for word in ("error: ", "failed: "):
            if line.startswith(word):
                return ": ".join([line.removeprefix(word), *lines[start + 1 : start + 2]])
    return lines[-1]


def _close(attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An attempt that left no end was cut off together with its worker."""
    return [attempt | {"ended": attempt["ended"] or WORKER_DIED} for attempt in attempts]


def _write(place: Path, attempts: list[dict[str, Any]]) -> None:
    with replacing(place / "attempts.json") as file:
        file.write_text(json.dumps(attempts, indent=1), encoding="utf-8")
