"""The Kubernetes manifests and the chart, held against the schemas, Ray Serve and the services' own configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.app import build
from deploy.monitoring.__main__ import RULES
from tests.deploy.manifests import K8S, Manifests, config, container, kustomized, pod_templates, rendered, serve_config
from tests.deploy.test_compose import examples_fit

VARIANTS = ("cpu", "gpu", "chart", "chart on GPUs")
GPU = {"resources": {"limits": {"cpu": "4", "memory": "48Gi", "nvidia.com/gpu": 1}}, "nodeSelector": {"class": "big"}}
CHART_ON_GPUS: dict[str, Any] = {
    "image": "registry.example:5000/treeline:0.1.0-cuda",
    "config": {"verifier": {"target": {"device": "cuda"}, "resources": {"num_gpus": 1, "replicas": 3}}},
    "groups": {"verifier": GPU},
    "monitoring": True,
    "models": {"storageClassName": "shared"},
}
KUBERAY_KEYS = {
    "RayService": {"excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"},
    "cluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
"""The fields in use, as KubeRay 1.5 to 1.7 name them: no package registry has its schemas."""


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    match request.param:
        case "chart":
            return rendered()
        case "chart on GPUs":
            return rendered(**CHART_ON_GPUS)
        case overlay:
            return kustomized(overlay)


def test_manifests_follow_the_schemas_of_kubernetes(manifests):
    validator = pytest.importorskip("kubernetes_validate", reason="needs tests/deploy/tools.txt")
    templates = {"apiVersion": "v1", "kind": "PodTemplate"}
    core = [
        m for m in manifests.values() if m["apiVersion"].partition("/")[0] not in ("ray.io", "monitoring.coreos.com")
    ]
    assert {m["kind"] for m in core} >= {"Service", "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim"}
    for manifest in (*core, *({**templates, "template": t} for t in pod_templates(manifests).values())):
        validator.validate(manifest, "1.37", strict=True)


def test_a_wrong_field_would_be_seen():
    validator = pytest.importorskip("kubernetes_validate", reason="needs tests/deploy/tools.txt")
    template = json.loads(json.dumps(pod_templates(kustomized("cpu"))["verifier"]))
    container(template)["livenessProb"] = container(template).pop("livenessProbe")
    with pytest.raises(validator.ValidationError):
        validator.validate({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, "1.37", strict=True)


def test_the_ray_service_uses_known_fields(manifests):
    spec = manifests["RayService", "treeline"]["spec"]
    cluster = spec["rayClusterConfig"]
    assert spec.keys() == KUBERAY_KEYS["RayService"]
    assert cluster.keys() == KUBERAY_KEYS["cluster"]
    assert cluster["headGroupSpec"].keys() == KUBERAY_KEYS["head"]
    assert all(group.keys() == KUBERAY_KEYS["workers"] for group in cluster["workerGroupSpecs"])
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}


def test_ray_serve_takes_the_configuration(manifests):
    served = ServeDeploySchema.model_validate(serve_config(manifests))
    (app,) = served.applications
    assert served.proxy_location == "Disabled"
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    build(app.args)


def test_every_service_gets_the_pods_that_are_made_for_it(manifests):
    settings, templates = config(manifests), pod_templates(manifests)
    cluster = manifests["RayService", "treeline"]["spec"]["rayClusterConfig"]
    pods = {"planner": 1} | {group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"]}
    parts = {
        "planner": settings.planner,
        "front-door": settings.server,
        "verifier": settings.verifier,
        "drafter": settings.drafter,
    }
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    offers = {group.get("groupName", "planner"): group for group in groups}
    assert parts.keys() == templates.keys() == offers.keys()
    for name, part in parts.items():
        assert part.resources.custom == {name: 1}
        # KubeRay puts the value into a shell's command line.
        assert json.loads(yaml.safe_load(offers[name]["rayStartParams"]["resources"])) == part.resources.custom
        assert part.resources.replicas == pods[name], name
        assert offers[name].get("minReplicas", pods[name]) == offers[name].get("maxReplicas", pods[name]) == pods[name]
        limits = container(templates[name])["resources"]["limits"]
        assert part.resources.num_cpus <= int(limits["cpu"])
        assert part.resources.num_gpus == limits.get("nvidia.com/gpu", 0)


def test_services_reach_each_other_and_no_stranger_reaches_them(manifests):
    settings = config(manifests)
    assert settings.internal.host == settings.metrics.host == settings.server.host == "0.0.0.0"
    assert settings.internal.token_file
    policy = manifests["NetworkPolicy", "treeline"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "treeline"}
    for rule in policy["ingress"]:
        assert rule["from"], "an empty list would admit everybody"
    (open_rule,) = manifests["NetworkPolicy", "treeline-front-door"]["spec"]["ingress"]
    assert {entry["port"] for entry in open_rule["ports"]} == {settings.server.port, settings.server.http.port}


def test_the_services_follow_the_front_doors(manifests):
    settings, front_door = config(manifests), pod_templates(manifests)["front-door"]
    ports = {port["name"]: port["containerPort"] for port in container(front_door)["ports"]}
    expected = {"grpc": settings.server.port, "http": settings.server.http.port}
    for name in ("treeline", "treeline-grpc"):
        service = manifests["Service", name]["spec"]
        assert service["selector"].items() <= front_door["metadata"]["labels"].items()
        assert not any(label.startswith("ray.io/") for label in service["selector"]), "a cluster is replaced"
        for port in service["ports"]:
            assert port["port"] == ports[port["targetPort"]] == expected[port["name"]]
    assert manifests["Service", "treeline-grpc"]["spec"]["clusterIP"] == "None"
    ready = container(front_door)["readinessProbe"]["httpGet"]
    assert ready["scheme"] == ("HTTPS" if settings.server.tls else "HTTP")


def test_pods_are_watched_drained_and_locked_down(manifests):
    metrics = config(manifests).metrics
    for name, template in pod_templates(manifests).items():
        pod, only = template["spec"], container(template)
        assert pod["securityContext"]["runAsNonRoot"]
        assert only["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["automountServiceAccountToken"] is False
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert only[probe]["httpGet"]["port"], f"{name} {probe}"
        ports = {port["name"]: port["containerPort"] for port in only["ports"]}
        assert ports["replica-metrics"] == metrics.base_port, "one replica a pod: the first page's port"
        if name != "planner":
            command = only["lifecycle"]["preStop"]["exec"]["command"][-1]
            assert f"/dev/tcp/127.0.0.1/{metrics.base_port}" in command
            deadline_s = int(command.partition("--deadline-remaining-seconds ")[2].partition(";")[0])
            assert deadline_s < pod["terminationGracePeriodSeconds"]
    for name in ("front-door", "verifier"):
        budget = manifests["PodDisruptionBudget", f"treeline-{name}"]["spec"]
        assert budget["selector"]["matchLabels"].items() <= pod_templates(manifests)[name]["metadata"]["labels"].items()


def test_secrets_and_models_are_mounted_where_the_configuration_looks(manifests):
    settings = config(manifests)
    assert not any(kind == "Secret" for kind, _ in manifests), "secrets are the operator's"
    paths = [settings.internal.token_file, settings.server.token_file]
    paths += [settings.server.tls.certificate, settings.server.tls.private_key] if settings.server.tls else []
    for template in pod_templates(manifests).values():
        mounts = {mount["name"]: mount["mountPath"] for mount in container(template)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert all(str(path.parent) == mounts["secrets"] for path in paths if path)
        claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
        assert ("PersistentVolumeClaim", claim) in manifests
        assert mounts["models"] in (K8S.parent / "Dockerfile").read_text(), "where the image keeps its caches"


def test_the_gpu_overlay_has_a_group_for_each_accelerator():
    manifests = kustomized("gpu")
    settings, templates = config(manifests), pod_templates(manifests)
    examples_fit(settings)
    for name, part in (("verifier", settings.verifier), ("drafter", settings.drafter)):
        assert part.resources.accelerator_type in templates[name]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]
        assert templates[name]["spec"]["tolerations"]
    assert {container(template)["image"] for template in templates.values()} == {"treeline:0.1.0-cuda"}


@pytest.mark.parametrize("variant", ["gpu", "chart on GPUs"])
def test_prometheus_finds_every_page_and_knows_the_rules(variant):
    manifests = kustomized("gpu") if variant == "gpu" else rendered(**CHART_ON_GPUS)
    monitor = manifests["PodMonitor", "treeline"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for template in pod_templates(manifests).values():
        labels = template["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        assert labels[monitor["jobLabel"]] == "treeline", "alerts ask for this job"
        assert endpoint["port"] in {port["name"] for port in container(template)["ports"]}
    assert manifests["PrometheusRule", "treeline"]["spec"] == yaml.safe_load(RULES.read_text())


def test_the_dashboard_comes_as_a_config_map():
    board = kustomized("gpu")["ConfigMap", "treeline-dashboards"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["data"]["treeline.json"] == (K8S.parent / "grafana/dashboards/treeline.json").read_text()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_the_chart_is_clean():
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk (tests/deploy/tools.txt)")
    assert helm.lint(K8S / "treeline", CHART_ON_GPUS)["errors"] == []


def test_chart_values_reach_the_manifests():
    manifests = rendered(**CHART_ON_GPUS)
    settings, templates = config(manifests), pod_templates(manifests)
    assert {container(template)["image"] for template in templates.values()} == {CHART_ON_GPUS["image"]}
    assert settings.verifier.target.device == "cuda"
    assert settings.server == config(rendered()).server
    assert container(templates["verifier"])["resources"] == GPU["resources"]
    assert templates["verifier"]["spec"]["nodeSelector"] == GPU["nodeSelector"]
    assert manifests["PersistentVolumeClaim", "treeline-models"]["spec"]["storageClassName"] == "shared"
    assert not any("{{" in text for key, m in manifests.items() if key[0] != "PrometheusRule" for text in strings(m))
    assert not any(kind in ("PodMonitor", "PrometheusRule") for kind, _ in rendered())


@pytest.mark.parametrize(
    "values",
    [{"imagee": "x:1"}, {"image": "treeline"}, {"config": {"sever": {}}}, {"groups": {"verifier": {"cpu": 1}}}],
    ids=str,
)
def test_the_chart_refuses_values_that_its_schema_does_not_know(values):
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk (tests/deploy/tools.txt)")
    with pytest.raises(helm.HelmError):
        rendered(**values)
