"""How the server's processes write their logs: lines of text, or a JSON object a line, all to stderr.

No prompt and no answer is in them, and no key. Knows Python's logging alone; imports no torch.
"""

from __future__ import annotations

import json
import logging
import logging.config
import time
from typing import Any

FORMATS = ("text", "json")
FIELDS = "fields"  # an attribute of a record: a mapping whose keys become keys of the object, given as `extra`
# How processes that another one starts are told.
FORMAT_VARIABLE, LEVEL_VARIABLE = "PAGEGRAPH_LOG_FORMAT", "PAGEGRAPH_LOG_LEVEL"


class JsonFormatter(logging.Formatter):
    """A record as a JSON object in one line: time (UTC, ISO 8601), level, logger, process, message, and its own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def configuration(level: str, format: str, process: str) -> dict[str, Any]:
    """What `logging.config.dictConfig`, and gunicorn, take. `format`: one of FORMATS; `process`: its name in the lines, and
    in those of text where there are several of its kind."""
    which = f"[{process}] " if " " in process else ""
    text = {"format": f"%(asctime)s %(name)s {which}%(message)s"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": JsonFormatter, "process": process} if format == "json" else text},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "lines"}},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        # gunicorn has handlers of its own for these.
        "loggers": {
            name: {"level": level.upper(), "handlers": [], "propagate": True}
            for name in ("gunicorn.error", "gunicorn.access")
        },
    }


def configure(level: str, format: str, process: str) -> None:
    """Set up this process's logs."""
    logging.config.dictConfig(configuration(level, format, process))
