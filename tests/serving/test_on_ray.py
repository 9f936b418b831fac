"""Ray Serve runs replicas of the server, which answer as the server does, and come back when they are lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.generation.opening import load
from coreinfer_sim.serving import on_ray

pytest.importorskip("grpc")
ASKED = {"prompt": "Stars form when", "max_tokens": 6, "temperature": 0}


@pytest.fixture
def replicas(wide_index, wide_checkpoint, monkeypatch):
    """Two replicas behind Ray Serve, and their address."""
    import ray
    from ray import serve

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in map(str, _places()) if path))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"index": str(wide_index.folder), "model": str(wide_checkpoint), "name": "tiny", "replicas": "2"}
        serve.run(on_ray.app(arguments), logging_config={"log_level": "ERROR"})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def _places() -> list[Path | str]:
    return [Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH", "")]


def processes() -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter(["cmdline"]):
        if " ".join(each.info["cmdline"] or ()).startswith("ray::ServeReplica:default:coreinfer_sim"):
            found.append(each)
    return found


@pytest.mark.slow  # Ray and two replicas take half a minute to start
def test_replicas_answer_alike_and_come_back(replicas, wide_index, wide_checkpoint):
    with load(wide_index, str(wide_checkpoint)) as generator:
        expected = generator.generate(ASKED["prompt"], max_new_tokens=6, temperature=0).text
    texts = {
        httpx.post(f"{replicas}/v1/completions", json=ASKED, timeout=60).json()["choices"][0]["text"] for _ in range(8)
    }
    assert texts == {expected} and httpx.get(f"{replicas}/health").json()["status"] == "ok"
    with httpx.stream("POST", f"{replicas}/v1/completions", json={**ASKED, "stream": True}, timeout=60) as stream:
        parts = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == expected
    before = processes()
    assert len(before) == 2
    os.kill(before[0].pid, signal.SIGKILL)
    answers, until = [], time.monotonic() + 60
    while time.monotonic() < until and len({each.pid for each in processes()} | {before[0].pid}) < 3:
        answers.append(httpx.post(f"{replicas}/v1/completions", json=ASKED, timeout=60))
        time.sleep(0.2)
    assert len(processes()) == 2, "the lost replica did not come back"
    good = [each.json()["choices"][0]["text"] for each in answers if each.status_code == 200]
    assert set(good) == {expected} and len(answers) - len(good) <= 2


def test_wrong_arguments_are_named():
    with pytest.raises(
        ConfigError, match=r"port is no argument, expected one of index, model, profile, name, replicas"
    ):
        on_ray.app({"port": "8000"})
    with pytest.raises(ConfigError, match="no index was named, expected index=NAME"):
        on_ray.app({"replicas": "2"})
    with pytest.raises(ConfigError, match="replicas is 'two', expected a whole number from 1"):
        on_ray.app({"index": "demo", "replicas": "two"})


def test_the_deployment_for_kubernetes_names_options_and_addresses_that_there_are(served):
    """The manifest is read as Kubernetes would read it, and what it names is there."""
    from coreinfer_sim_cli.serve import serve as command

    place = Path(__file__).resolve().parents[2] / "docs" / "guide" / "kubernetes.yaml"
    deployment, service = yaml.safe_load_all(place.read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    name, *options = container["args"]
    known = {option for parameter in command.params for option in parameter.opts}
    assert name == command.name and {each for each in options if each.startswith("--")} <= known
    for probe in ("startupProbe", "readinessProbe"):
        assert httpx.get(f"{served.url}{container[probe]['httpGet']['path']}").status_code == 200
        assert container[probe]["httpGet"]["port"] == container["ports"][0]["containerPort"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["spec"]["volumes"]}
