"""Lines for people and for machines."""

from __future__ import annotations

import datetime
import json
import logging

from logitcache_pipeline.log import JsonFormatter, Log


def test_people_get_the_message_alone_beside_the_bar_where_there_is_one():
    lines: list[str] = []
    beside: list[str] = []
    log = Log(lines.append)
    log.info("plan", "16 records", records=16)
    log.beside(beside.append).warning("attempt_failed", "shard 3 failed", shard=3)
    assert (lines, beside) == (["16 records"], ["shard 3 failed"])


def test_machines_get_one_object_a_line_wherever_people_look():
    lines: list[str] = []
    log = Log(lines.append, as_json=True).beside(lambda text: None)
    log.warning("attempt_failed", "two\nlines, é", shard=3, reason="bad\n")
    (line,) = lines
    assert "\n" not in line
    assert line.isascii()
    found = json.loads(line)
    assert datetime.datetime.fromisoformat(found.pop("time")).tzinfo is not None
    assert found == {
        "level": "warning",
        "event": "attempt_failed",
        "message": "two\nlines, é",
        "shard": 3,
        "reason": "bad\n",
    }


def test_warnings_of_libraries_have_the_same_form():
    try:
        raise ValueError("no")
    except ValueError as e:
        record = logging.LogRecord("some.library", logging.ERROR, "f.py", 1, "%d left", (3,), (type(e), e, None))
    found = json.loads(JsonFormatter().format(record))
    assert (found["level"], found["event"], found["message"]) == ("error", "log", "3 left")
    assert found["logger"] == "some.library"
    assert "ValueError: no" in found["traceback"]
