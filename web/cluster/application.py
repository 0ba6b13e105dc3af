"""The application that `serve run` and `serve deploy` take: `build`, with a configuration of `runtime serve` as its arguments.

Knows how keys of a configuration become options of Ray's deployments.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pagegraph.runtime.config import Config, ConfigError, load_config
from pagegraph.web.cluster.front import Front
from pagegraph.web.cluster.replica import Replica as Served
from pagegraph.web.cluster.server import OWN_KEYS

ROUTER = "pagegraph.web.cluster.router:PrefixRouter"
POLICY = "pagegraph.web.cluster.autoscaling:by_queue"
STATS_S = 1.0  # between two looks of a front's router at replicas
FULL_SHARE = 0.75  # of a replica's places, that are to be taken: what autoscaling aims at
STOP_S = 10.0  # beyond drain_timeout_s for a server to end


@serve.deployment(max_ongoing_requests=100_000)
@serve.ingress(Front())
class Ingress:
    """The deployment of the front."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas = replicas


Replica = serve.deployment(Served)


def build(args: dict[str, Any]) -> Application:
    """An application of `config`, a YAML file or a model as `runtime serve` takes it, which every node has to find.

    Other arguments are keys of the configuration, but for `num_replicas` (1 unless Ray's options of the deployment say otherwise)
    and `max_replicas`: with that one, autoscaling has from `num_replicas` to so many. Raises ConfigError.
    """
    keys = dict(args)
    source = keys.pop("config", None)
    if not source:
        raise ConfigError("config is missing: name a YAML file or a model, as `runtime serve` takes it")
    for key in OWN_KEYS:
        if key in keys:
            raise ConfigError(f"{key} is no argument of the application: {_INSTEAD.get(key, _ADDRESS)}")
    num_replicas, max_replicas = (int(keys.pop(name, 0)) for name in ("num_replicas", "max_replicas"))
    if max_replicas and max_replicas < num_replicas:
        raise ConfigError(
            f"max_replicas={max_replicas} is below num_replicas={num_replicas}; set it to {num_replicas} or more"
        )
    config = load_config(source, keys).config
    if config.nnodes > 1:
        raise ConfigError(
            f"nnodes={config.nnodes}: a replica is on one node of Ray; set it to 1, or run `runtime serve` on each"
        )
    options: dict[str, Any] = options_of(config)
    if max_replicas:
        options["autoscaling_config"] = autoscaling_of(config, max(num_replicas, 1), max_replicas)
    elif num_replicas:
        options["num_replicas"] = num_replicas
    return Ingress.bind(Replica.options(**options).bind(source, keys))


def options_of(config: Config) -> dict[str, Any]:
    """Of the deployment of replicas: what each takes of a node, how many requests it gets, how long it may take to end."""
    devices = 0 if config.device == "cpu" else config.tensor_parallel_size * config.data_parallel_size
    return {
        "ray_actor_options": {"num_gpus": devices, "num_cpus": config.num_threads or 1},
        "max_ongoing_requests": 2 * config.enough_threads,  # its server refuses first, and says when to come back
        "graceful_shutdown_timeout_s": config.drain_timeout_s + STOP_S,
        "request_router_config": {
            "request_router_class": ROUTER,
            "request_routing_stats_period_s": STATS_S,
            "request_routing_stats_timeout_s": 10 * STATS_S,
        },
    }


def autoscaling_of(config: Config, least: int, most: int) -> dict[str, Any]:
    """Ray's `autoscaling_config` of that many replicas."""
    return {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": max(FULL_SHARE * config.max_num_seqs * config.data_parallel_size, 1),
        "policy": {"policy_function": POLICY},
    }


_ADDRESS = "replicas listen on the loopback interface; http_options of Ray Serve have the address of the front"
_INSTEAD = {"api_key": "Ray shows arguments; use api_key_file, or PAGEGRAPH_API_KEY in the environment of each node"}
