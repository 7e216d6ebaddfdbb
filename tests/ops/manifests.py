"""Checks the files in config/ that other programs read: Compose, Kubernetes, the Helm chart, the container, the Debian package.

    target/python/bin/python tests/ops/manifests.py [PROGRAM]        (tests/run.sh installs target/python)

PROGRAM, target/debug/afterimage by default, is started with the variables of the rendered chart. Takes some ten seconds.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request

import compose_spec
import helm_python as helm
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
CHART = CONFIG / "charts/afterimage"
PROGRAM = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/afterimage")
# The oldest version of Kubernetes that Chart.yaml allows, and the newest whose schemas there are.
VERSIONS = ["1.25", kubernetes_validate.latest_version()]
SETTINGS = tomllib.loads((CONFIG / "afterimage.toml").read_text())


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def validate(manifests, where):
    kinds = []
    for manifest in manifests:
        kinds.append(manifest["kind"])
        # Of the Prometheus operator, so no schema of Kubernetes has it.
        if manifest["kind"] == "ServiceMonitor":
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                raise SystemExit(f"{where}: Kubernetes {version} has no {manifest['kind']} of {manifest['apiVersion']}")
    return kinds


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|min)", text).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "min": 60}[unit]


def is_setting(variable):
    """Tells if a variable of the environment is the one of a setting."""
    known = {f"AFTERIMAGE_{section}_{name}".upper() for section, names in SETTINGS.items() for name in names}
    return variable in known or variable in ("AFTERIMAGE_CONFIG", "REDIS_URL_FILE")


def check_deployment(manifests, where):
    """Probes, ports, files and times that belong together."""
    [pod] = [it["spec"]["template"]["spec"] for it in manifests if it["kind"] == "Deployment"]
    [container] = pod["containers"]
    variables = {it["name"]: it.get("value") for it in container["env"]}
    for name in variables:
        assert is_setting(name) or not name.startswith("AFTERIMAGE_"), f"{where}: {name} is no setting"
    delay = variables["AFTERIMAGE_HTTP_SHUTDOWN_DELAY"]
    timeout = variables.get("AFTERIMAGE_HTTP_SHUTDOWN_TIMEOUT", SETTINGS["http"]["shutdown_timeout"])
    assert pod["terminationGracePeriodSeconds"] > seconds(delay) + seconds(timeout), f"{where}: killed too soon"
    # Two failed probes and the news of them must fit into the delay.
    readiness = container["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < seconds(delay) + 5, where
    ports = {it["name"]: it["containerPort"] for it in container["ports"]}
    own = tomllib.loads((CONFIG / "container.toml").read_text())
    for name, section in (("http", "http"), ("admin", "admin")):
        assert own[section]["listen"].endswith(f":{ports[name]}"), f"{where}: port {name}"
    for service in (it for it in manifests if it["kind"] == "Service"):
        assert all(port["targetPort"] in ports for port in service["spec"]["ports"]), where
    # Each file that a variable names is in a volume.
    mounts = [it["mountPath"] for it in container["volumeMounts"]]
    for name, value in variables.items():
        if name.endswith("_FILE"):
            assert any(value.startswith(f"{mount}/") for mount in mounts), f"{where}: {value} is in no volume"
    return variables


def check_kubernetes():
    manifests = documents((CONFIG / "kubernetes.yaml").read_text())
    kinds = validate(manifests, "kubernetes.yaml")
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= set(kinds)
    check_deployment(manifests, "kubernetes.yaml")
    commented = (CONFIG / "kubernetes.yaml").read_text().split("# ---\n")[1]
    [monitor] = documents(re.sub(r"^# ?", "", commented, flags=re.M).split("\n", 1)[1])
    assert monitor["kind"] == "ServiceMonitor"


EVERYTHING = {
    "image": {"repository": "registry.example/afterimage", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "redis": {"existingSecret": "redis", "existingSecretKey": "url"},
    "writes": {"enabled": False, "existingSecret": "tokens"},
    "settings": {
        "http": {"max_age": "10m", "cors_origins": ["https://app.example"], "trusted_proxies": ["10.0.0.0/8"]},
        "cache": {"images": 500, "bytes": "400MiB", "index_entries": 5000000},
        "pictures": {"avif": True, "dprs": [1, 2]},
    },
    "env": [{"name": "AWS_REGION", "value": "eu-north-1"}],
    "envFrom": [{"secretRef": {"name": "aws"}}],
    "shutdown": {"delaySeconds": 20, "timeoutSeconds": 30},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "ingress": {"enabled": True, "className": "nginx", "hosts": ["a.example", "b.example"], "tlsSecret": "tls"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "serviceAccount": {"create": False},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "images"},
    "nodeSelector": {"kubernetes.io/arch": "arm64"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
}


def render(chart, values, name="images"):
    files = chart.render(values, name=name, namespace="web")
    notes = [text for path, text in files.items() if path.endswith("NOTES.txt")]
    manifests = [it for path, text in files.items() if path.endswith(".yaml") for it in documents(text)]
    return manifests, notes[0]


def check_chart():
    """Returns the variables of the chart with every value set."""
    least = {"redis": {"url": "redis://redis:6379"}}
    for values in (least, EVERYTHING):
        report = helm.chart.lint(CHART, values, strict=True)
        assert not report["errors"] and all(it["severity"] < 2 for it in report["messages"]), report
    chart = helm.Chart.load(CHART)

    manifests, notes = render(chart, least)
    kinds = validate(manifests, "the chart")
    assert sorted(kinds) == sorted(
        ["Deployment", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Secret", "Service", "Service", "ServiceAccount"]
    ), kinds
    check_deployment(manifests, "the chart")
    [secret] = [it for it in manifests if it["kind"] == "Secret"]
    assert secret["stringData"]["redis-url"] == "redis://redis:6379"
    assert re.fullmatch(r"\w{48}", secret["stringData"]["write-tokens"])
    assert "helm test images --namespace web" in notes and "{{index .data" in notes, notes

    manifests, notes = render(chart, EVERYTHING)
    kinds = validate(manifests, "the chart with everything")
    assert {"HorizontalPodAutoscaler", "Ingress", "ServiceMonitor"} <= set(kinds) and "Secret" not in kinds, kinds
    variables = check_deployment(manifests, "the chart with everything")
    assert "https://a.example" in notes and "trusted_proxies" not in notes, notes
    _, notes = render(chart, least | {"ingress": {"enabled": True}})
    assert "trusted_proxies" in notes, notes

    for wrong, expected in (
        ({}, "set redis.url"),
        ({"redis": {"url": "localhost:6379"}}, "redis"),
        (least | {"replica": 3}, "replica"),
        (least | {"writes": {"tokens": ["short"]}}, "tokens"),
        (least | {"settings": {"chache": {"images": 1}}}, "chache"),
    ):
        try:
            chart.validate_schema(wrong)
            render(chart, wrong)
        except helm.errors.HelmError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(f"accepted: {wrong}")
    sections = set(json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["propertyNames"]["enum"])
    assert set(SETTINGS) <= sections, set(SETTINGS) - sections
    return variables


def check_program(variables):
    """Starts the program with what the chart gives it."""
    with tempfile.TemporaryDirectory() as folder:
        files = pathlib.Path(folder)
        (files / "tokens").write_text("0123456789abcdef\n")
        with socket.create_server(("127.0.0.1", 0)) as public, socket.create_server(("127.0.0.1", 0)) as admin:
            ports = [it.getsockname()[1] for it in (public, admin)]
        # The embedded store stands in for Redis.
        environment = {name: value for name, value in variables.items() if name != "REDIS_URL_FILE"} | {
            "AFTERIMAGE_WRITES_TOKENS_FILE": str(files / "tokens"),
            "AFTERIMAGE_EMBEDDED_DIR": folder,
            "AFTERIMAGE_HTTP_LISTEN": f"127.0.0.1:{ports[0]}",
            "AFTERIMAGE_ADMIN_LISTEN": f"127.0.0.1:{ports[1]}",
            "AFTERIMAGE_HTTP_SHUTDOWN_DELAY": "0s",
        }
        with (files / "log").open("w+") as log:
            server = subprocess.Popen([PROGRAM], env=environment, stdout=subprocess.DEVNULL, stderr=log)
            try:
                deadline = time.monotonic() + 30
                while True:
                    try:
                        urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/readyz", timeout=5).read()
                        break
                    except OSError:
                        assert server.poll() is None and time.monotonic() < deadline, (files / "log").read_text()
                        time.sleep(0.02)
            finally:
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0


def check_compose():
    text = (CONFIG / "compose.yaml").read_text()
    compose = compose_spec.PyCompose.from_yaml(text)
    compose.validate()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"afterimage", "redis", "demo"} and services["demo"]["profiles"] == ["demo"]
    stop = seconds(SETTINGS["http"]["shutdown_delay"]) + seconds(SETTINGS["http"]["shutdown_timeout"])
    assert seconds(services["afterimage"]["stop_grace_period"]) > stop


def check_container():
    subprocess.run([pathlib.Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], check=True)
    text = (ROOT / "Dockerfile").read_text()
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    assert f"ARG VERSION={version}\n" in text, "the version of the image"
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version, "the version of the chart"
    changelog = (CONFIG / "debian/changelog").read_text()
    assert changelog.startswith(f"afterimage ({version}-1) "), "the version of the Debian package"
    # What .dockerignore leaves out can't be copied.
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, flags=re.M):
        for source in line.split():
            assert any(pathlib.PurePath(source).match(it) or source.startswith(f"{it}/") for it in allowed), source
    # Without its benches the manifest says the same.
    [pattern] = re.findall(r"sed -i '([^']*)' Cargo.toml", text)
    stripped = subprocess.run(["sed", pattern, ROOT / "Cargo.toml"], check=True, capture_output=True, text=True).stdout
    whole = tomllib.loads((ROOT / "Cargo.toml").read_text())
    whole.pop("bench")
    assert tomllib.loads(stripped) == whole


check_kubernetes()
print("kubernetes.yaml fits Kubernetes", " and ".join(VERSIONS))
environment = check_chart()
print("the chart passes helm lint, and renders what Kubernetes takes")
check_program(environment)
print("the program takes the chart's settings")
check_compose()
print("compose.yaml fits the specification")
check_container()
print("the Dockerfile passes hadolint, and versions agree")
