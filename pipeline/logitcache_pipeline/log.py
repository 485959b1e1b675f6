"""What a build says: lines for people, or one JSON object a line for machines.

    {"time": "2026-01-31T12:00:00.123+00:00", "level": "warning", "event": "attempt_failed", "message": "...", ...}

`time`, `level` ("info", "warning", "error"), `event` and `message` are in every line; the other fields depend on the
event and are only ever added to.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True)
class Log:
    """Lines to wherever `say` takes them."""

    say: Say
    as_json: bool = False
    say_text: Say | None = None
    """For lines for people, where a progress bar is in the way of `say`."""

    def info(self, event: str, message: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._line("info", event, message, fields)

    def warning(self, event: str, message: str, **fields: Any) -> None:
        """Something went wrong, and the build goes on."""
        self._line("warning", event, message, fields)

    def beside(self, say_text: Say) -> Log:
        """The same, with lines for people going elsewhere."""
        return replace(self, say_text=say_text)

    def _line(self, level: str, event: str, message: str, fields: dict[str, Any]) -> None:
        if self.as_json:
            self.say(json_line(level, event, message, fields))
        else:
            (self.say_text or self.say)(message)


class JsonFormatter(logging.Formatter):
    """Warnings of libraries in the form of our own lines; the event is `log`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it."""
        fields = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), "log", record.getMessage(), fields)


def json_line(level: str, event: str, message: str, fields: dict[str, Any]) -> str:
    """One JSON object, in ASCII and without a line break."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "event": event, "message": message, **fields}, default=str)
