"""Doctor and a hub that answers over HTTP: a process of its own, for the hub's address is read when it is imported."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

REPOSITORY = "someone/a-model"
REVISION = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """What the hub answers about one repository, the files of the server's folder."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            files = sorted(self.server.folder.iterdir())
            entries = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "1"} for file in files]
            self.answer(200, json.dumps(entries).encode())
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            self.answer(200, json.dumps({"id": REPOSITORY, "sha": REVISION, "siblings": []}).encode())
        elif (match := re.match(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", self.path)) and self.file(match[1]).is_file():
            self.send_part(self.file(match[1]))
        else:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION})

    def file(self, name):
        return self.server.folder / name

    def send_part(self, file):
        data, status = file.read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(match[1]) : int(match[2]) + 1], 206
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(data)
        self.answer(status, data, ETag='"1"', **{"X-Repo-Commit": REVISION})

    def answer(self, status, data, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(model, key_biases):
    weights = {f"model.layers.{layer}.mlp.weight": torch.zeros(1024, 512) for layer in range(3)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.sent = model("qwen2", weights | key_biases(80, 0.5, 0.5)), {}
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_headers_and_biases_are_fetched_and_a_hub_that_is_gone_is_named(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    script = "from turboquant_core.cli import main; main()"
    command = [sys.executable, "-c", script, "doctor", REPOSITORY, "--json", "-"]

    def doctor():
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    outcome = doctor()
    assert outcome.returncode == 0, outcome.stderr
    data = json.loads(outcome.stdout)
    assert data["weights_bytes"] == 3 * (1024 * 512 * 4 + 512)
    assert data["key_bias"]["alarm"]
    assert 0 < hub.sent["model.safetensors"] < hub.folder.joinpath("model.safetensors").stat().st_size / 3

    # The configuration is in the cache by now, the headers are not.
    hub.shutdown()
    hub.server_close()
    outcome = doctor()
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    assert f"cannot read {REPOSITORY}" in outcome.stderr
    assert "HF_HUB_OFFLINE=1" in outcome.stderr
