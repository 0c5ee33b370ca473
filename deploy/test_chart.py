"""deploy/helm as Kubernetes would take it: rendered, validated, judged, and a part of it run.

`make chart-check` runs this, in an environment of its own (requirements/chart.txt): Helm itself,
as a library; Kubernetes' schemas; KEDA's and Prometheus Operator's. There is no cluster: what the
scheduler, KEDA and a network plugin make of the objects is not seen here. `podman play kube` runs
the rendered Deployments of the composer and of one runner.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudcoil.models.keda.v1alpha1 as keda
import cloudcoil.models.prometheus_operator.v1 as prometheus_operator
import helm_python.chart as helm
import httpx
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from helm_python.errors import HelmError

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/helm"
PROFILES = ("cpu", "gpu", "small")
KUBERNETES = ("1.28", "1.37")
"""The oldest that Chart.yaml allows, and the newest whose schemas are known."""

STAGES = (
    "separate_stems",
    "transcribe_notes",
    "generate_notes",
    "convert_voice",
    "synthesize_audio",
)

CUSTOM = {
    "ScaledObject": keda.ScaledObject,
    "ServiceMonitor": prometheus_operator.ServiceMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}

PRE_STOP_S = 5
PLAY_S = 240.0

Object = dict[str, Any]


def profile(name: str) -> Object:
    values: Object = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return values


def render(values: Object, release: str = "remix") -> list[Object]:
    """The objects that a release has."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=release, namespace="music")
    return [
        document
        for path, text in sorted(files.items())
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


@pytest.fixture(params=PROFILES, scope="module")
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(profile(request.param))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def pods(objects: list[Object]) -> list[tuple[str, Object]]:
    """Name and template of what makes pods."""
    makers = of_kind(objects, "Deployment", "Job")
    return [(each["metadata"]["name"], each["spec"]["template"]) for each in makers]


def selected(selector: Object, labels: Object) -> bool:
    """Whether a label selector takes these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", ()):
        if (labels.get(term["key"]) in term["values"]) != (term["operator"] == "In"):
            return False
    return True


# --- lint, schemas --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_chart_passes_lint(name: str) -> None:
    report = helm.lint(CHART, profile(name), strict=True)
    assert not report["errors"]
    assert [found for found in report["messages"] if found["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid(objects: list[Object], version: str) -> None:
    assert len(objects) > 5
    for each in objects:
        if each["kind"] in CUSTOM:
            schema = closed(CUSTOM[each["kind"]].model_json_schema(by_alias=True))
            jsonschema.validate(each, schema)
        else:
            kubernetes_validate.validate(each, version, strict=True)


def closed(schema: Any) -> Any:
    """A schema that refuses what it does not name."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        if "(?i)" in str(schema.get("pattern")):  # Go's way to write it
            del schema["pattern"]
        for value in schema.values():
            closed(value)
    elif isinstance(schema, list):
        for value in schema:
            closed(value)
    return schema


def test_validation_notices_a_wrong_name() -> None:
    objects = render(profile("cpu"))
    of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containerz"] = []
    of_kind(objects, "ScaledObject")[0]["spec"]["triggerz"] = []
    of_kind(objects, "ServiceMonitor")[0]["spec"]["endpoints"][0]["pathh"] = "/"
    for kind in ("Deployment", "ScaledObject", "ServiceMonitor"):
        with pytest.raises(jsonschema.ValidationError):
            test_every_object_is_valid(
                objects=[*of_kind(objects, kind)[:1], *objects], version="1.37"
            )


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "latest"}},
        {"keys": "perhaps"},
        {"composer": {"replica": 2}},
        {"runners": {"separate_stems": {"device": "tpu"}}},
        {"runners": {"separate_stems": {"cpu": 0}}},
        {"database": {"secretName": "Not A Name"}},
        {"composer": {"environment": {"PHILHARMONICS_KEYS": True}}},
        {"autoscaling": {"kind": "magic"}},
        {"nonsense": 1},
        {"composer": {"replicas": 2}},  # on SQLite
    ],
)
def test_wrong_values_are_refused(values: Object) -> None:
    with pytest.raises(HelmError):
        render(values)


def test_schema_names_every_value() -> None:
    def compare(schema: Object, values: Object, path: str) -> None:
        assert set(schema["properties"]) - {"global"} == set(values), path
        for name, value in values.items():
            part = schema["properties"][name]
            if "$ref" in part:
                part = root["definitions"][part["$ref"].rpartition("/")[2]]
            if "properties" in part:
                compare(part, value, f"{path}.{name}")

    root = json.loads((CHART / "values.schema.json").read_text())
    compare(root, yaml.safe_load((CHART / "values.yaml").read_text()), "values")


# --- policies -------------------------------------------------------------------------------------


def test_no_pod_is_root_or_writes_its_root_or_has_a_say(objects: list[Object]) -> None:
    for name, template in pods(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume], name
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert not context.get("privileged"), name


def test_every_container_has_limits_and_a_version(objects: list[Object]) -> None:
    for name, template in pods(objects):
        spec = template["spec"]
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            resources = container["resources"]
            for kind in ("cpu", "memory", "ephemeral-storage"):
                assert resources["requests"][kind], name
                assert resources["limits"][kind], name
            assert resources["requests"]["memory"] == resources["limits"]["memory"], name
            tag = container["image"].rpartition(":")[2]
            assert re.fullmatch(r"[0-9][\w.-]*", tag), container["image"]
        for volume in spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], name


def test_every_server_has_probes_and_time_to_drain(objects: list[Object]) -> None:
    for deployment in of_kind(objects, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        names = {port["name"] for port in server["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["port"] in names
        assert (
            server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"]
            >= 120
        )
        assert server["livenessProbe"]["httpGet"]["path"] == "/livez"
        assert server["lifecycle"]["preStop"]
        drain_s = {row["name"]: row.get("value") for row in server["env"]}["PHILHARMONICS_DRAIN_S"]
        assert spec["terminationGracePeriodSeconds"] >= PRE_STOP_S + int(drain_s) + 10


def test_every_server_is_spread_and_protected(objects: list[Object]) -> None:
    budgets = of_kind(objects, "PodDisruptionBudget")
    for deployment in of_kind(objects, "Deployment"):
        template = deployment["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert selected(deployment["spec"]["selector"], labels)
        assert len([each for each in budgets if selected(each["spec"]["selector"], labels)]) == 1
        spread = template["spec"]["topologySpreadConstraints"]
        assert all(selected(each["labelSelector"], labels) for each in spread)
        assert {each["topologyKey"].rpartition("/")[2] for each in spread} == {"hostname", "zone"}


def test_services_monitors_and_scalers_find_what_they_name(objects: list[Object]) -> None:
    templates = dict(pods(objects))
    services = of_kind(objects, "Service")
    for service in services:
        selector = {"matchLabels": service["spec"]["selector"]}
        (found,) = [t for t in templates.values() if selected(selector, t["metadata"]["labels"])]
        names = {port["name"] for port in found["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    seen = []
    for monitor in of_kind(objects, "ServiceMonitor"):
        for service in services:
            if selected(monitor["spec"]["selector"], service["metadata"]["labels"]):
                names = {port["name"] for port in service["spec"]["ports"]}
                assert {end["port"] for end in monitor["spec"]["endpoints"]} <= names
                seen.append(service["metadata"]["name"])
    if of_kind(objects, "ServiceMonitor"):
        assert sorted(seen) == sorted(service["metadata"]["name"] for service in services)
    deployments = {each["metadata"]["name"]: each for each in of_kind(objects, "Deployment")}
    for scaler in of_kind(objects, "ScaledObject"):
        # Helm would undo what KEDA has done, at every upgrade.
        assert "replicas" not in deployments[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    for name, template in pods(objects):
        for volume in template["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims, name


def test_composers_call_the_runners_that_there_are(objects: list[Object]) -> None:
    (composer,) = [d for d in of_kind(objects, "Deployment") if "composer" in d["metadata"]["name"]]
    services = {each["metadata"]["name"] for each in of_kind(objects, "Service")}
    env = composer["spec"]["template"]["spec"]["containers"][0]["env"]
    hosts = [
        re.fullmatch(r"dns:///([\w-]+)\.music\.svc:4001", row["value"])
        for row in env
        if row["name"].startswith("PHILHARMONICS_RUNNER_")
    ]
    assert {host and host[1] for host in hosts} == {
        name for name in services if "composer" not in name
    }


def may_reach(objects: list[Object], source: Object, target: Object, port: str) -> bool:
    """Whether policies let one pod's labels reach another's port, in one namespace."""
    policies = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if selected(policy["spec"]["podSelector"], target["metadata"]["labels"])
    ]
    names = {
        p["name"]: p["containerPort"] for p in target["spec"]["containers"][0].get("ports", ())
    }

    def admits(rule: Object) -> bool:
        ports = [each["port"] for each in rule.get("ports", ())]
        peers = rule.get("from")
        return (not ports or port in ports or names.get(port) in ports) and (
            peers is None
            or any(
                "namespaceSelector" not in peer
                and selected(peer.get("podSelector", {}), source["metadata"]["labels"])
                for peer in peers
            )
        )

    return not policies or any(admits(rule) for spec in policies for rule in spec["ingress"])


def test_only_composers_reach_runners_and_runners_reach_nobody(objects: list[Object]) -> None:
    templates = dict(pods(objects))
    stranger = {"metadata": {"labels": {"app": "else"}}}
    for name, template in templates.items():
        labels = template["metadata"]["labels"]
        policies = [
            policy["spec"]
            for policy in of_kind(objects, "NetworkPolicy")
            if selected(policy["spec"]["podSelector"], labels)
        ]
        assert policies, name
        assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies), name
        component = labels["app.kubernetes.io/component"]
        if component in STAGES:
            assert all(policy["egress"] == [] for policy in policies), name
            reached = {
                other
                for other, each in [*templates.items(), ("stranger", stranger)]
                if may_reach(objects, each, template, "inference")
                or may_reach(objects, each, template, "http")
            }
            assert reached == {other for other in templates if "composer" in other}, name
        else:  # nobody may go just anywhere
            assert all(rule.get("ports") for policy in policies for rule in policy["egress"]), name


def test_gpu_pods_ask_for_one_and_go_where_they_are() -> None:
    for deployment in of_kind(render(profile("gpu")), "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        is_gpu = "runner-cuda:" in server["image"]
        component = deployment["metadata"]["labels"]["app.kubernetes.io/component"]
        assert is_gpu == (component in STAGES and component != "synthesize_audio")
        assert ("nvidia.com/gpu" in server["resources"]["limits"]) == is_gpu
        env = {row["name"]: row["value"] for row in server["env"]}
        if is_gpu:
            assert env["PHILHARMONICS_DEVICE"] == "cuda"
            assert spec["nodeSelector"]
            assert spec["tolerations"]


def test_other_models_have_another_folder_and_no_image_changes() -> None:
    manifest = (ROOT / "models.toml").read_text()

    def facts(models: Object) -> tuple[set[str], set[str], set[str]]:
        objects = render({**profile("cpu"), "models": models})
        containers = [
            container
            for _, template in pods(objects)
            for container in template["spec"]["containers"]
        ]
        mounts = [mount for each in containers for mount in each["volumeMounts"]]
        folders = {
            mount["subPath"]
            for mount in mounts
            if mount["mountPath"] == "/models" and "subPath" in mount
        }
        jobs = {job["metadata"]["name"] for job in of_kind(objects, "Job")}
        return {each["image"] for each in containers}, folders, jobs

    images, folders, jobs = facts({})
    images_then, folders_then, jobs_then = facts({"manifest": manifest + "\n# another\n"})
    assert images == images_then
    assert len(folders) == len(folders_then) == len(jobs) == len(jobs_then) == 1
    assert folders != folders_then
    assert jobs != jobs_then


def test_a_second_release_shares_the_runners_that_it_does_not_have() -> None:
    values = profile("cpu")
    others = {
        stage: {"address": f"dns:///remix-{stage.replace('_', '-')}.music.svc:4001"}
        for stage in STAGES
        if stage != "generate_notes"
    }
    volumes = {
        volume: {"volume": {"persistentVolumeClaim": {"claimName": f"remix-{volume}"}}}
        for volume in ("data", "models")
    }
    objects = render({**values, **volumes, "runners": others, "image": {"tag": "0.2.0"}}, "next")
    deployments = {each["metadata"]["name"] for each in of_kind(objects, "Deployment")}
    assert deployments == {"next-composer", "next-generate-notes"}
    assert not of_kind(objects, "PersistentVolumeClaim")
    # The first release's policies let the second one's composers in.
    first = render(values)
    templates, then = dict(pods(first)), dict(pods(objects))
    assert may_reach(first, then["next-composer"], templates["remix-convert-voice"], "inference")


def test_queries_parse_and_name_metrics_that_there_are(objects: list[Object]) -> None:
    documented = set(
        re.findall(r"^\| `(philharmonics_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.M)
    )
    assert documented
    queries = [
        trigger["metadata"]["query"]
        for scaler in of_kind(objects, "ScaledObject")
        for trigger in scaler["spec"]["triggers"]
    ]
    queries += [
        rule["expr"]
        for each in of_kind(objects, "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
    ]
    for query in queries:
        promql_parser.parse(query)
        named = {
            re.sub("_(sum|count|bucket)$", "", name)
            for name in re.findall(r"philharmonics_\w+", query)
        }
        assert named <= documented, named - documented


def test_dashboards_and_alerts_are_those_of_compose() -> None:
    objects = render(profile("cpu"))
    (boards,) = [each for each in of_kind(objects, "ConfigMap") if "dashboards" in str(each)]
    files = (ROOT / "docker/grafana/dashboards").glob("*.json")
    assert boards["data"] == {file.name: file.read_text() for file in files}
    (rules,) = of_kind(objects, "PrometheusRule")
    text = (ROOT / "docker/prometheus/alerts.yml").read_text()
    ours = 'up{namespace="music",release="remix"} == 0'  # a cluster's Prometheus asks others too
    assert "up == 0" in text
    assert rules["spec"] == yaml.safe_load(text.replace("up == 0", ours))


# --- run ------------------------------------------------------------------------------------------


CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""For podman where there is no systemd, and no right to raise limits."""


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    conf = tmp_path_factory.mktemp("podman") / "containers.conf"
    conf.write_text(CONTAINERS_CONF)
    environment = {**os.environ, "CONTAINERS_CONF": str(conf)}
    environment.pop("DOCKER_CONFIG", None)  # podman would look for a file in it

    def run(*arguments: str, stdin: Any = None, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *arguments],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0 or not check, f"podman {arguments}: {done.stderr[-2000:]}"
        return done.stdout.strip()

    return run


def await_that(what: str, is_so: Callable[[], bool], limit_s: float = PLAY_S) -> None:
    until_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < until_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.5)


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5.0).status_code
    except httpx.TransportError:
        return 0


@pytest.fixture(scope="module")
def tag(podman: Callable[..., str]) -> str:
    """Of the images, which are carried from Docker to podman."""
    for command in ("podman", "docker"):
        if shutil.which(command) is None:
            pytest.fail(f"{command} is not installed: the Deployments cannot be run.")
    version = "0.0.1"
    for role in ("composer", "runner"):
        source, target = f"philharmonics/{role}:latest", f"philharmonics/{role}:{version}"
        subprocess.run(["docker", "tag", source, target], check=True)
        with subprocess.Popen(["docker", "save", target], stdout=subprocess.PIPE) as save:
            podman("load", "--quiet", stdin=save.stdout)
        assert save.returncode == 0
    return version


@pytest.fixture
def play(tmp_path: Path, podman: Callable[..., str]) -> Iterator[Callable[[Object], str]]:
    """Runs a rendered Deployment; its pod's address."""
    played: list[Path] = []

    def run(deployment: Object) -> str:
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        # podman would publish each port on this machine, and probe with a systemd that may not
        # be here and a curl that is not in the image; the test asks what the probes ask.
        for key in ("ports", "startupProbe", "livenessProbe", "readinessProbe"):
            del server[key]
        name = deployment["metadata"]["name"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(deployment))
        played.append(path)
        podman("play", "kube", str(path))
        infra = json.loads(podman("pod", "inspect", f"{name}-pod-0"))["InfraContainerID"]
        networks = json.loads(podman("inspect", infra))[0]["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    yield run
    for path in reversed(played):
        podman("play", "kube", "--down", str(path), check=False)


def test_composer_and_a_runner_run_as_rendered(
    tag: str, play: Callable[[Object], str], podman: Callable[..., str], tmp_path: Path
) -> None:
    song = ROOT / ".cache/demo_song.mp3"
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o777)  # a node's folder stands for the volumes; podman knows no fsGroup
    models = shutil.copytree(ROOT / ".models", tmp_path / "models")  # of links, what they name
    values: Object = {
        "image": {"repository": "localhost/philharmonics", "tag": tag, "pullPolicy": "Never"},
        "keys": "off",
        "autoscaling": {"kind": "none"},
        "models": {"fill": False, "volume": {"hostPath": {"path": str(models)}}},
        "data": {"volume": {"hostPath": {"path": str(data)}}},
    }

    def deployment(name: str) -> Object:
        (found,) = [
            d for d in of_kind(render(values), "Deployment") if d["metadata"]["name"] == name
        ]
        return found

    runner = play(deployment("remix-separate-stems"))
    await_that("the runner is ready", lambda: status(f"http://{runner}:3000/readyz") == 200)
    values["runners"] = {"separate_stems": {"address": f"{runner}:4001"}}
    composer = play(deployment("remix-composer"))
    await_that("the composer is alive", lambda: status(f"http://{composer}:3000/livez") == 200)
    assert status(f"http://{composer}:3000/readyz") == 503  # four runners are away
    with song.open("rb") as file:
        answer = httpx.post(
            f"http://{composer}:3000/v1/separate",
            files={"song": file},
            timeout=PLAY_S,
        )
    assert answer.status_code == 200, answer.text
    assert answer.content[:2] == b"PK"
    refused = httpx.post(
        f"http://{composer}:3000/v1/remix", files={"song": song.read_bytes()}, timeout=60.0
    )
    assert refused.status_code == 503
    for container in ("remix-composer-pod-0-composer", "remix-separate-stems-pod-0-runner"):
        facts = json.loads(podman("inspect", container))[0]
        assert facts["HostConfig"]["ReadonlyRootfs"]
        assert facts["HostConfig"]["Memory"] > 0
        status_of = Path(f"/proc/{facts['State']['Pid']}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status_of.splitlines() if ":\t" in line)
        assert set(lines["Uid"].split()) == {"10001"}
        assert int(lines["CapEff"], 16) == 0
