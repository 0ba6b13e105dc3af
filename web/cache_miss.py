"""Why no more of a prompt came from the prefix cache, as answers say it: `cache_miss_reason`, beside `usage`.

Not inside `usage`, whose numbers clients add up. The reasons are the scheduler's (`runtime.scheduler.block_tables`).
"""

from __future__ import annotations

from collections.abc import Iterable

from pagegraph.runtime.text.output import TextOutput


def cache_miss(outputs: Iterable[TextOutput]) -> dict[str, str]:
    """What is added to an answer; nothing where all that can be cached of the prompts was. `outputs`: one a prompt."""
    reasons = dict.fromkeys(output.cache_miss for output in outputs if output.cache_miss)
    return {"cache_miss_reason": ", ".join(reasons)} if reasons else {}
