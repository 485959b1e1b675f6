"""Progress of long work, on standard error: a bar on a terminal, a line now and then elsewhere.

with progress("scoring", total=num_rows, unit="tok") as p:
    p.advance(1024)
    p.note("shard 17: worker lost, scored again")
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from logitcache_storage.terminal import format_bytes, format_count, format_duration, open_console
from logitcache_storage.visible import printable

LINE_EVERY_SECONDS = 10.0


class Meter:
    """How far the work is; `advance` and `note` may be called from any thread."""

    def __init__(
        self, label: str, total: float | None, unit: str, done: float, console: Console | None, every: float
    ) -> None:
        self._label, self._unit, self._console, self._every = label, unit, console, every
        self._total = total
        self._before, self.completed = done, done
        self._start = self._last_line = time.monotonic()
        self._num_lines = 0
        self._bar: Progress | None = None
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        """So much more of `total` is done."""
        with self._lock:
            self.completed += amount
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self.completed)
            elif self.completed != self._total and time.monotonic() - self._last_line >= self._every:
                self._print(f"{self._label}: {self.figures()}")

    def set_total(self, total: float) -> None:
        """Say how much there is, where it was not known at the start."""
        with self._lock:
            self._total = total
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], total=total)

    def note(self, text: str) -> None:
        """A line that stays: something went wrong, or is worth knowing."""
        with self._lock:
            self._print(f"{self._label}: {text}")

    def figures(self) -> str:
        """Amount, rate and time left, e.g. "1.2M of 3.4M tok, 10.2k tok/s, 3 min 40 s left"."""
        rate = self._rate()
        parts = [self._amount(self.completed, self._total)]
        if rate > 0:
            parts.append(f"{self._amount(rate)}/s")
            if self._total is not None and self._total > self.completed:
                parts.append(f"{format_duration((self._total - self.completed) / rate)} left")
        return ", ".join(parts)

    def finish(self) -> None:
        """The closing line of work that took long enough to have said something before."""
        elapsed = time.monotonic() - self._start
        if self._num_lines or elapsed >= self._every:
            rate = f", {self._amount(self._rate())}/s" if self._rate() > 0 else ""
            amount = self._amount(self.completed, self._total)
            self._print(f"{self._label}: {amount} in {format_duration(elapsed)}{rate}")

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Draw on the terminal until the end of the block; elsewhere, nothing."""
        if self._console is None or not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), _Figures(self))
        with Progress(*columns, console=self._console, transient=True) as bar:
            bar.add_task(self._label, total=self._total, completed=int(self.completed))
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def _rate(self) -> float:
        """Of this run: what was done before it counts for nothing."""
        return (self.completed - self._before) / max(time.monotonic() - self._start, 1e-9)

    def _amount(self, count: float, total: float | None = None) -> str:
        if self._unit == "B":
            return format_bytes(count) + (f" of {format_bytes(total)}" if total is not None else "")
        return format_count(count) + (f" of {format_count(total)}" if total is not None else "") + f" {self._unit}"

    def _print(self, line: str) -> None:
        if self._console is not None:
            self._console.print(Text(printable(line)), soft_wrap=True)
        self._num_lines += 1
        self._last_line = time.monotonic()


@contextmanager
def progress(
    label: str,
    *,
    total: float | None = None,
    unit: str = "",
    done: float = 0,
    quiet: bool = False,
    every: float = LINE_EVERY_SECONDS,
) -> Iterator[Meter]:
    """Show the progress of the block.

    Work that ends within `every` seconds prints no line at all, unless it notes something.

    Args:
        label: what is being done, e.g. "scoring".
        total: how much there is; None where nobody knows.
        unit: of `total`; "B" is shown as KB, MB, ...
        done: how much of `total` an earlier run did.
        quiet: say nothing.
        every: seconds between lines where there is no terminal.
    """
    meter = Meter(label, total, unit, done, None if quiet else open_console(stderr=True), every)
    with meter.bar():
        yield meter
    meter.finish()


class _Figures(ProgressColumn):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        return Text(self._meter.figures())
