"""gunicorn's settings for the web processes that no configuration changes.

The supervisor gives bind address, workers, threads and log level as flags. One thread carries one POST for its whole
stream; other requests have threads of their own, so health checks always find one. Threads start as they are needed.

gunicorn starts beside the engine: its parent process imports the application, once for all workers, and listens when
the engine answers.
"""

import importlib
import os

from pagegraph.runtime.server import logs
from pagegraph.runtime.server.web_gate import wait_for_settings

worker_class = "pagegraph.web.worker.Worker"
# Heartbeats come from the worker's main loop, so this limits a hung worker, not a long stream.
timeout = 60
graceful_timeout = 3  # the supervisor has drained before gunicorn hears of a stop
keepalive = 75
max_requests = 0
preload_app = False
control_socket_disable = True
accesslog = None
errorlog = "-"
logconfig_dict = logs.configuration(
    os.environ.get(logs.LEVEL_VARIABLE, "info"), os.environ.get(logs.FORMAT_VARIABLE, "text"), "web"
)
# The heartbeat file on a disk can block a worker.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None


def on_starting(server):
    """Called before gunicorn listens and forks: import what workers need, but make nothing that a fork would share."""
    importlib.import_module("pagegraph.web.app")
    wait_for_settings()
