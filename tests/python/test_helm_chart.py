"""The chart renders with a real Helm for every values file of tests/helm, into objects that Kubernetes takes and that are as
saved; values that it does not know are refused."""
import copy
import difflib
import json
import pathlib
import sys

import helm_python as helm
import kubernetes_validate
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helm"))

import render  # noqa: E402  (the path above comes first)

MATRIX = render.matrix()
# The oldest version that the chart takes, the newest that the validator knows, and two between.
VERSIONS = ["1.28", "1.31", "1.34", "1.37"]
# Objects of other projects' controllers: Kubernetes itself has no schema of them.
CUSTOM = {"LeaderWorkerSet", "Certificate", "ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="module")
def rendered():
    return {name: render.render(values) for name, values in MATRIX.items()}


def pod_templates(document):
    """Pods that an object stands for, as objects of their own."""
    spec = document.get("spec", {})
    if document["kind"] == "Pod":
        return [document]
    sources = [spec.get("template"), spec.get("leaderWorkerTemplate", {}).get("workerTemplate")]
    return [{"apiVersion": "v1", "kind": "Pod", **source} for source in sources if source]


def pods(manifests):
    return [pod for document in render.documents(manifests) for pod in pod_templates(document)]


@pytest.mark.parametrize("name", MATRIX)
def test_helm_lint_finds_nothing(name):
    report = helm.lint(render.CHART, MATRIX[name], strict=True)
    assert not report["errors"]
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MATRIX)
def test_kubernetes_takes_every_object(name, version, rendered):
    documents = render.documents(rendered[name])
    assert len(documents) >= 9
    for document in documents:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)
        # Also those inside objects of other controllers.
        for pod in pod_templates(document):
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("name", MATRIX)
def test_output_is_as_saved(name, rendered):
    expected = (render.EXPECTED / f"{name}.yaml").read_text()
    found = render.as_text(rendered[name])
    difference = difflib.unified_diff(expected.splitlines(), found.splitlines(), "saved", "rendered", lineterm="")
    assert found == expected, "\n".join(difference) + "\nif this is meant: .venv/bin/python tests/helm/render.py"


def test_the_config_map_has_the_dashboard_as_it_is(rendered):
    found = [document for document in render.documents(rendered["monitoring"]) if document["kind"] == "ConfigMap"]
    assert len(found) == 1
    assert json.loads(found[0]["data"]["perigee.json"]) == json.loads((render.CHART / "files/dashboard.json").read_text())


def test_nothing_else_is_saved():
    assert {path.stem for path in render.EXPECTED.iterdir()} == set(MATRIX)


@pytest.mark.parametrize("name", MATRIX)
def test_pods_are_restricted_and_have_no_token(name, rendered):
    found = pods(rendered[name])
    assert len(found) >= 3
    for pod in found:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
        # A folder of the node is the one volume that the standard refuses, and is asked for by name.
        host_paths = [volume for volume in spec.get("volumes", []) if "hostPath" in volume]
        assert not host_paths or MATRIX[name]["model"]["hostPath"]


@pytest.mark.parametrize("name", MATRIX)
def test_what_is_mounted_is_there(name, rendered):
    for pod in pods(rendered[name]):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("name", MATRIX)
def test_a_pod_outlives_its_drain(name, rendered):
    for pod in pods(rendered[name]):
        for container in pod["spec"]["containers"]:
            grace = [int(word[8:]) for word in container.get("args", []) if word.startswith("--grace=")]
            if container["name"] in ("router", "worker"):
                # preStop, and the 5 s that followers stay longer than their leader's grace.
                assert grace and grace[0] + 15 <= pod["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", MATRIX)
def test_replicas_drain_before_they_are_told_to_end(name, rendered):
    hooks = [container["lifecycle"]["preStop"]["exec"]["command"] for pod in pods(rendered[name])
             for container in pod["spec"]["containers"] if container["name"] == "worker"]
    assert hooks == [["perigee-ranks", "drain"]]


def test_traces_go_where_the_values_say(rendered):
    for pod in pods(rendered["everything"]):
        for container in pod["spec"]["containers"]:
            if container["name"] in ("router", "worker"):
                assert {"--otlp-endpoint=http://collector.observability:4317", "--otlp-sample=0.1"} <= set(container["args"])
    policies = [document["spec"] for document in render.documents(rendered["everything"])
                if document["kind"] == "NetworkPolicy"]
    assert sum({"ports": [{"port": 4317}]} in policy["egress"] for policy in policies) == 2


@pytest.mark.parametrize(("name", "cards"), [("gpu-tp8", 8), ("machines-2", 8), ("everything", 4), ("defaults", 2),
                                             ("cpu", None)])
def test_a_pod_asks_for_a_card_for_each_of_its_ranks(name, cards, rendered):
    workers = [container for pod in pods(rendered[name]) for container in pod["spec"]["containers"]
               if container["name"] == "worker"]
    assert len(workers) == 1
    assert workers[0]["resources"]["limits"].get("nvidia.com/gpu") == cards
    if cards:
        assert workers[0]["args"][0] == str(cards)
        assert f"--device=cuda:{','.join(map(str, range(cards)))}" in workers[0]["args"]


@pytest.mark.parametrize("name", MATRIX)
def test_selectors_find_pods_and_ports(name, rendered):
    documents = render.documents(rendered[name])
    found = [pod for document in documents for pod in pod_templates(document)]
    for document in documents:
        if document["kind"] not in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            continue
        spec = document["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        selector = selector.get("matchLabels", selector)
        chosen = [pod for pod in found if selector.items() <= pod["metadata"]["labels"].items()]
        assert len(chosen) == 1, document["metadata"]["name"]
        open_ports = {port["name"] for container in chosen[0]["spec"]["containers"] for port in container["ports"]}
        if document["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= open_ports


def changed(path, value):
    """The chart's own values with one changed."""
    values = {}
    place = values
    *parents, last = path.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return values


@pytest.mark.parametrize(("path", "value"), [
    ("replicas", 2), ("router.replica", 2), ("worker.gpu", 2), ("model.init.images", "a"), ("etcd.endpoint", "a:1"),
    ("tls.issuer", "a"), ("monitoring.alerts", True), ("networkPolicy.enable", True), ("image.pullPolicy", "Always"),
    ("router.autoscaling.target", 80), ("router.service.port", 1), ("router.resources.request", {}),
    ("router.replicas", "2"), ("router.replicas", 0), ("worker.tp", 0), ("worker.tp", 1.5), ("worker.machines", "two"),
    ("worker.device", "gpu"), ("worker.dtype", "fp16"), ("worker.extraArgs", "--threads=1"),
    ("worker.extraArgs", ["threads"]), ("worker.terminationGracePeriodSeconds", 10), ("worker.tolerations", {}),
    ("worker.nodeSelector", []), ("model.path", "models"), ("model.random", "huge"), ("model.hostPath", "srv"),
    ("model.pvc", "A_B"), ("etcd.endpoints", []), ("etcd.endpoints", "etcd:2379"), ("etcd.endpoints", ["etcd://e:1"]),
    ("etcd.bundled", "yes"), ("etcd.auth.user", "perigee"), ("tls.enabled", True), ("tls.secretName", 1),
    ("monitoring.rules", "on"), ("networkPolicy.enabled", 1), ("image.tag", 1.2), ("router.service.type", "Headless"),
])
def test_the_schema_refuses(path, value):
    with pytest.raises(helm.HelmError, match=f"(?s)schema.*{path.split('.')[0]}"):
        render.render(changed(path, value))


@pytest.mark.parametrize(("values", "reason"), [
    ({"worker": {"tp": 6, "machines": 4}}, "worker.tp .6. must be a multiple of worker.machines .4."),
    ({"model": {"pvc": "a", "random": "tiny"}}, "one of pvc, hostPath"),
    ({"etcd": {"endpoints": ["https://etcd:2379"]}}, "etcd.tls.secretName"),
    ({"router": {"autoscaling": {"enabled": True, "min": 5, "max": 2}}}, "min is greater than max"),
])
def test_contradictions_are_told(values, reason):
    with pytest.raises(helm.HelmError, match=reason):
        render.render(values)


def test_the_schema_has_every_default_and_the_defaults_every_key():
    with helm.Chart.load(render.CHART) as chart:
        defaults, schema = copy.deepcopy(chart.values), chart.schema

    def compare(values, part, path):
        known = set(part["properties"]) - {"global"}
        assert known == set(values), path
        for key, value in values.items():
            below = part["properties"][key]
            if isinstance(value, dict) and "properties" in below:
                compare(value, below, f"{path}.{key}")

    compare(defaults, schema, "values")


def test_notes_name_the_first_request(rendered):
    for name, manifests in rendered.items():
        notes = next(text for path, text in manifests.items() if path.endswith("NOTES.txt"))
        assert "perigee generate" in notes and "helm test" in notes, name
