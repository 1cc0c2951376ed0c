"""A program that is spoken with in lines: started without a shell, waited for with patience that ends, and ended for good."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST = 2**22  # bytes of a line: what is longer is not an answer
WAITING = 1000  # lines that wait to be read; a program that says more has to wait itself
SAID = 6  # last lines of standard error in an error message
ENDING = 10.0  # seconds that a program is given to end when it has nothing left to do
# Of this process's own environment; another Python must not find our packages instead of its own.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class Child:
    """A running program. Use it in a `with` block: whatever happens in it, the program and what it started are ended.

    Args:
        command: program and arguments; no shell sees them.

    Raises:
        ValueError: the program cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in HIDDEN}
        script = next((word for word in command if str(word).endswith(".py")), command[0] if command else "")
        self.name = f"sidecar {Path(script).name}"
        try:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
                start_new_session=True,  # one signal reaches all that it starts, and Ctrl-C reaches us alone
            )
        except (OSError, IndexError, ValueError) as error:
            raise ValueError(f"{self.name} cannot be started: {error}. Command: {' '.join(map(str, command))}") from None
        self.lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self.said: deque[str] = deque(maxlen=SAID)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._overhear)]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for thread in self.threads:
            while thread.is_alive():  # a reader may be waiting for room
                with contextlib.suppress(queue.Empty):
                    self.lines.get(timeout=0.05)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def send(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one line of JSON for each row, then close the program's input; returns at once."""
        thread = threading.Thread(target=self._write, args=(rows,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def line(self, patience_s: float, otherwise: str) -> str:
        """The next line that is not blank.

        Args:
            patience_s: to wait at most, seconds.
            otherwise: what the program failed to do if none comes, for the error.

        Raises:
            ValueError: the program ended or fell silent; ends with its last words.
        """
        line = self._next(patience_s)
        if line:
            return line
        if line is None:
            raise ValueError(f"{self.name} ended with code {self._code()} and {otherwise}{self.last_words()}")
        raise ValueError(f"{self.name} was silent for {patience_s:g} s and {otherwise}{self.last_words()}")

    def end(self) -> None:
        """Wait until a program that has said everything ends; one that does not is ended when the block is left.

        Raises:
            ValueError: it says something more.
        """
        line = self._next(ENDING)
        if line:
            raise ValueError(f"{self.name} went on after its last answer: {line[:120]!r}{self.last_words()}")

    def last_words(self) -> str:
        """The last lines of its standard error, as the end of an error message."""
        self.threads[1].join(timeout=1.0 if self.process.poll() is not None else 0.1)
        return ". Its last words: " + " | ".join(self.said) if self.said else ""

    def _next(self, patience_s: float) -> str | None:
        """The next line; "" if none came in time; None at the end."""
        deadline = time.monotonic() + patience_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                return ""
            if line is None or line.strip():
                return line
        return ""

    def _code(self) -> int | str:
        try:
            return self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "unknown (it closed its output and goes on)"

    def _kill(self) -> None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pipe = self.process.stdin
        if pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it ended: whoever reads its answers finds out
            for row in rows:
                pipe.write(json.dumps(row).encode() + b"\n")
                pipe.flush()
        with contextlib.suppress(OSError, ValueError):
            pipe.close()

    def _read(self) -> None:
        pipe = self.process.stdout
        while pipe is not None and (line := pipe.readline(LONGEST)):
            self.lines.put(line.decode("utf-8", errors="replace").rstrip("\r\n") or " ")
        self.lines.put(None)

    def _overhear(self) -> None:
        pipe = self.process.stderr
        while pipe is not None and (line := pipe.readline(LONGEST)):
            text = "".join(c if c.isprintable() else " " for c in line.decode("utf-8", errors="replace"))[:300].strip()
            if text:
                self.said.append(text)
