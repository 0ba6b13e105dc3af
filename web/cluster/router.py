"""Ray's request router, by `web.cluster.placement`. Knows Ray's interface of routers (alpha there)."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pagegraph.web.cluster.messages import Request
from pagegraph.web.cluster.placement import Placement


class PrefixRouter(RequestRouter):
    """A front's choice among replicas; Ray tries the others where the best one has `max_ongoing_requests`."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once by Ray, with `request_router_kwargs`: there are none."""
        self._placement = Placement()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first."""
        named = {one.replica_id.unique_id: one for one in candidate_replicas}
        if pending_request is None or not named:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Ray asks again without a pause while all are full
        request = next(iter(pending_request.args), None)
        if not isinstance(request, Request):  # a call of another method
            return [candidate_replicas]
        self._placement.update({name: one.routing_stats for name, one in named.items()})
        best = self._placement.choose(request, named)
        return [[named.pop(best)], list(named.values())]
