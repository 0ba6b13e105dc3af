"""How web processes are held back until the engine answers: they wait for the file of their settings.

Imports nothing of the web.
"""

from __future__ import annotations

import os
import time

SETTINGS_VARIABLE = "PAGEGRAPH_WEB_SETTINGS"  # of the environment: path of the file


def wait_for_settings() -> None:
    """Return once the file is there; at once if no path is given. The process ends with its parent meanwhile."""
    path, parent = os.environ.get(SETTINGS_VARIABLE), os.getppid()
    while path and not os.path.exists(path):
        if os.getppid() != parent:
            raise SystemExit(0)
        time.sleep(0.02)
