"""The command line for the tests: `Shell` forks commands from one process that has imported everything.

A command is what `python -m codex_ml.cli.train` does, but for the seconds that importing torch takes: its own process and process
group, its own working folder, its output in files, signals as from a terminal.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Command:
    """A command under way; `wait` for its exit code."""

    shell: "Shell"
    pid: int
    out: Path
    err: Path

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def wait(self) -> int:
        """The exit code; negative for the signal that ended it."""
        return self.shell.ask(wait=self.pid)

    def signal(self, number: int = signal.SIGINT) -> None:
        """As Ctrl-C: to the whole process group."""
        os.killpg(self.pid, number)

    def until(self, path: Path, seconds: float = 30) -> None:
        """Wait until a file is there."""
        limit = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < limit, f"{path} did not appear; {self.stderr}"
            time.sleep(0.002)


class Shell:
    """Starts commands; usable as a context manager."""

    def __enter__(self) -> "Shell":
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count = 0
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, *words: str, script: str | None = None) -> Command:
        """Run the command line `words`, or a Python `script`, in `folder`."""
        self.count += 1
        logs = folder.parent / "logs"
        logs.mkdir(exist_ok=True)
        out, err = logs / f"{self.count}.out", logs / f"{self.count}.err"
        return Command(self, self.ask(folder=str(folder), words=words, script=script, out=str(out), err=str(err)), out, err)

    def run(self, folder: Path, *words: str, **options) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        command = self.start(folder, *words, **options)
        return command.wait(), command.stdout, command.stderr


def _child(folder: str, words: list[str], script: str | None, out: str, err: str) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    code = 1
    try:
        from codex_ml.cli.train import main

        code = exec(script, {"__name__": "__main__"}) or 0 if script else main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        with contextlib.suppress(Exception):
            import multiprocessing.util

            multiprocessing.util._exit_function()
        os._exit(code)


def serve() -> None:
    """Answer questions from standard input until it closes."""
    import torch._dynamo  # noqa: F401  (torch's optimizers import it when the first is made)

    from codex_ml.settings import parse_overrides

    parse_overrides(["epochs=1"])  # which imports Hydra
    for line in sys.stdin:
        question = json.loads(line)
        if pid := question.get("wait"):
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif (answer := os.fork()) == 0:
            _child(**question)
        else:
            with contextlib.suppress(OSError):  # the child does so too; whoever comes first
                os.setpgid(answer, answer)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
