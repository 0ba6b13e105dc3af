"""How many replicas there are to be, by what their servers have to do: a policy of Ray Serve's autoscaling.

Knows names of metrics and arithmetic. Ray applies the bounds, delays and factors of its `autoscaling_config`.
"""

from __future__ import annotations

import math
from typing import Any

# Of a server's /metrics, summed over its engines; what replicas tell (`Replica.record_autoscaling_stats`) has these names.
RUNNING, WAITING = "num_requests_running", "num_requests_waiting"


def by_queue(context: Any) -> tuple[int, dict[str, Any]]:
    """(replicas wanted, nothing to remember) of a `ray.serve.config.AutoscalingContext`.

    So many that each has `target_ongoing_requests` running and waiting; where requests wait although there are fewer, because the
    KV cache is full or prompts are long, as many more as hold those at what each runs now. Until replicas have told anything,
    Ray's own count of requests stands for theirs.
    """
    told = context.aggregated_metrics or {}
    running, waiting = (list(told.get(name, {}).values()) for name in (RUNNING, WAITING))
    if not running:
        return math.ceil(context.total_num_requests / context.config.target_ongoing_requests), {}
    target = context.config.target_ongoing_requests
    wanted = (sum(running) + sum(waiting)) / target
    if sum(waiting) >= 1:
        each = max(sum(running) / len(running), 1.0) if any(running) else target
        wanted = max(wanted, context.current_num_replicas + sum(waiting) / each)
    return math.ceil(wanted), {}
