"""What configs/deploy says is true of the server: its flags, ports, paths, metrics and times."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pagegraph.runtime.config import FIELDS, Config, load_config
from pagegraph.runtime.engine.metrics import EngineMetrics
from pagegraph.runtime.server import health
from pagegraph.runtime.server.restarts import Restarts, ServerMetrics
from pagegraph.web.cluster.autoscaling import RUNNING, WAITING, by_queue
from pagegraph.web.settings import WebSettings
from tests.paths import ROOT

DEPLOY = ROOT / "configs" / "deploy"
STOP_S = Config(model="m").drain_timeout_s + 7  # as the help of drain_timeout_s says
PROBE_PORT = 9000


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def manifest(kind: str) -> dict:
    (found,) = (one for one in documents("kubernetes.yaml") if one["kind"] == kind)
    return found


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_yaml_is_yaml(path: Path) -> None:
    assert all(documents(str(path.relative_to(DEPLOY))))


@pytest.mark.parametrize("name", ["Dockerfile", "pagegraph.service"])
def test_flags_are_those_of_the_command(name: str) -> None:
    (command,) = re.findall(r"^(?:ENTRYPOINT|ExecStart=)(?:.*\\\n)*.*$", (DEPLOY / name).read_text(), re.M)
    flags = re.findall(r"--([a-z-]+)", command)
    assert "probe-port" in flags and str(PROBE_PORT) in command
    assert {flag.replace("-", "_") for flag in flags} <= set(FIELDS)


def test_the_image_copies_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    assert {"pagegraph", "compiler", "kernels", "runtime", "web", "constraints.txt", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^torch==[0-9.]+$", (ROOT / "constraints.txt").read_text(), re.M)  # which a step of it looks for


def test_ports_and_paths_of_probes() -> None:
    container = manifest("StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": Config(model="m").port, "probes": PROBE_PORT}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "probes" and container[probe]["httpGet"]["path"] in health.PATHS
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"  # of the others some fail while it loads
    (targets,) = documents("prometheus.yaml")[0]["scrape_configs"][0]["static_configs"]
    assert targets["targets"] == [f"pagegraph:{PROBE_PORT}"]
    assert f"127.0.0.1:{PROBE_PORT}/health/ready" in (DEPLOY / "Dockerfile").read_text()


# What of autoscaling/v2 and of probes the files use: a field that Kubernetes does not know is one that it would drop or refuse.
_PROBE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["httpGet", "periodSeconds"],
    "properties": {
        "httpGet": {
            "type": "object", "additionalProperties": False, "required": ["path", "port"],
            "properties": {"path": {"type": "string", "pattern": "^/"}, "port": {"type": ["string", "integer"]}},
        },
        **{name: {"type": "integer", "minimum": 1} for name in ("periodSeconds", "timeoutSeconds", "failureThreshold")},
    },
}  # fmt: skip
_RULES = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": {
            "type": "array", "minItems": 1,
            "items": {
                "type": "object", "additionalProperties": False, "required": ["type", "value", "periodSeconds"],
                "properties": {
                    "type": {"enum": ["Pods", "Percent"]}, "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                },
            },
        },
    },
}  # fmt: skip
_AUTOSCALER = {
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "autoscaling/v2"}, "kind": {"const": "HorizontalPodAutoscaler"}, "metadata": {"type": "object"},
        "spec": {
            "type": "object", "additionalProperties": False, "required": ["scaleTargetRef", "maxReplicas", "metrics"],
            "properties": {
                "scaleTargetRef": {
                    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "name"],
                    "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
                },
                "minReplicas": {"type": "integer", "minimum": 1}, "maxReplicas": {"type": "integer", "minimum": 1},
                "metrics": {
                    "type": "array", "minItems": 1,
                    "items": {
                        "type": "object", "additionalProperties": False, "required": ["type", "pods"],
                        "properties": {
                            "type": {"const": "Pods"},
                            "pods": {
                                "type": "object", "additionalProperties": False, "required": ["metric", "target"],
                                "properties": {
                                    "metric": {
                                        "type": "object", "additionalProperties": False, "required": ["name"],
                                        "properties": {"name": {"type": "string", "pattern": "^[a-z_]+$"}},
                                    },
                                    "target": {
                                        "type": "object", "additionalProperties": False,
                                        "required": ["type", "averageValue"],
                                        "properties": {
                                            "type": {"const": "AverageValue"},
                                            "averageValue": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?m?$"},
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "behavior": {
                    "type": "object", "additionalProperties": False,
                    "properties": {"scaleUp": _RULES, "scaleDown": _RULES},
                },
            },
        },
    },
}  # fmt: skip


def test_probes_and_autoscaling_have_the_fields_that_kubernetes_knows() -> None:
    container = manifest("StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        jsonschema.validate(container[probe], _PROBE)
    scaler = manifest("HorizontalPodAutoscaler")
    jsonschema.validate(scaler, _AUTOSCALER)
    spec, scaled = scaler["spec"], manifest("StatefulSet")
    assert spec["minReplicas"] < spec["maxReplicas"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": scaled["apiVersion"], "kind": scaled["kind"], "name": scaled["metadata"]["name"]
    }  # fmt: skip
    assert "replicas" not in scaled["spec"]  # which would undo what the autoscaler has made
    labels = scaled["spec"]["template"]["metadata"]["labels"]
    assert scaled["spec"]["selector"]["matchLabels"] == labels == manifest("Service")["spec"]["selector"]
    assert scaled["spec"]["serviceName"] == manifest("Service")["metadata"]["name"]
    pod = scaled["spec"]["template"]["spec"]
    volumes = {one["name"] for one in pod["volumes"]} | {
        one["metadata"]["name"] for one in scaled["spec"]["volumeClaimTemplates"]
    }
    assert {one["name"] for one in container["volumeMounts"]} == volumes


def test_the_autoscaler_asks_for_metrics_that_a_server_has() -> None:
    """By the names that the adapter makes of those a server with two engines serves."""
    (rule,) = yaml.safe_load(documents("prometheus-adapter.yaml")[0]["data"]["config.yaml"])["rules"]
    (series,) = re.findall(r'__name__=~"(.*?)"', rule["seriesQuery"])
    served = re.findall(r"^([\w:]+)\{", EngineMetrics("m", 8192, rank=1).render().decode(), re.M)
    asked = sorted({name for name in served if re.fullmatch(series, name)})
    replacement = rule["name"]["as"].replace("$1", r"\1")
    made = [re.sub(rule["name"]["matches"], replacement, name) for name in asked]
    wanted = {one["pods"]["metric"]["name"]: one["pods"]["target"]["averageValue"]
              for one in manifest("HorizontalPodAutoscaler")["spec"]["metrics"]}  # fmt: skip
    assert sorted(wanted) == made == [f"pagegraph_{name}" for name in (RUNNING, WAITING)]
    config = yaml.safe_load(manifest("ConfigMap")["data"]["config.yaml"])
    places = Config(**config).max_num_seqs
    assert float(wanted[f"pagegraph_{RUNNING}"]) == 0.75 * places
    assert "by (<<.GroupBy>>)" in rule["metricsQuery"] and set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_there_is_time_to_stop() -> None:
    pod = manifest("StatefulSet")["spec"]["template"]["spec"]
    before = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= STOP_S + before
    assert int(re.search(r"TimeoutStopSec=(\d+)", (DEPLOY / "pagegraph.service").read_text())[1]) >= STOP_S
    assert int(documents("compose.yaml")[0]["services"]["pagegraph"]["stop_grace_period"].rstrip("s")) >= STOP_S


def test_the_configuration_of_the_cluster_is_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(manifest("ConfigMap")["data"]["config.yaml"])
    assert load_config(str(path)).config.model


def test_the_proxy_takes_what_the_server_takes() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    most = WebSettings(
        engine_addresses=[""], model="", served_model_name="", threads=1, enough_threads=1
    ).max_body_bytes
    assert f"client_max_body_size {most >> 20}m;" in text and "proxy_buffering off;" in text


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads((DEPLOY / "grafana" / "pagegraph.json").read_text())
    text = EngineMetrics("m", 8192).render() + ServerMetrics("m", [(Restarts(3, 600), lambda: True)]).render()
    served = set(re.findall(r"^([\w:]+)", text.decode(), re.M))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|pagegraph):\w+", target["expr"])
    }
    assert len(asked) > 20 and asked <= served, asked - served
    (source,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_the_application_of_ray_is_ours() -> None:
    (application,) = documents("ray/serve.yaml")[0]["applications"]
    module, _, function = application["import_path"].partition(":")
    text = (ROOT / f"{module.removeprefix('pagegraph.').replace('.', '/')}.py").read_text()  # which imports Ray
    assert f"def {function}(" in text
    names = {one["name"] for one in application["deployments"]}
    assert all(re.search(rf"^(class {name}\b|{name} = serve\.deployment)", text, re.M) for name in names)
    args = dict(application["args"])
    config = load_config(args.pop("config"), args).config
    (scaled,) = [one["autoscaling_config"] for one in application["deployments"] if "autoscaling_config" in one]
    assert scaled["policy"]["policy_function"] == f"{by_queue.__module__}:{by_queue.__name__}"
    assert scaled["target_ongoing_requests"] == 0.75 * config.max_num_seqs
