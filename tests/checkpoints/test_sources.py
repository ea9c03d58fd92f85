"""Weights are read from folders, a state dict, and a hub with and without network."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file

from segformer_pl.checkpoints import load_weights, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models import mit_b0

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def error_of(source):
    with pytest.raises(UserError) as error:
        read_weights(source)
    return str(error.value)


def test_a_folder_is_read_with_its_config(tmp_path):
    state = {"a": torch.ones(2)}
    (tmp_path / "config.json").write_text('{"id2label": {"1": "b", "0": "a"}}')
    assert "holds neither model.safetensors nor pytorch_model.bin" in error_of(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    weights = read_weights(tmp_path)
    assert torch.equal(weights.tensors["a"], state["a"])
    assert weights.task == {"class_names": ["a", "b"]}
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert torch.equal(read_weights(str(tmp_path)).tensors["a"], torch.zeros(2))
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is not valid JSON" in error_of(tmp_path)


def test_a_missing_source_is_refused():
    for source in ("nowhere.pth", "weights/nowhere.safetensors", "/nowhere/at/all", "b0"):
        assert f"there is no file or folder '{source}'" in error_of(source)


def test_a_commit_that_is_given_is_not_asked_for_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = error_of(f"owner/mit@{COMMIT}")
    assert f"cannot be reached for 'owner/mit@{COMMIT}'" in message
    assert "check the name and the network" in message
    assert message.endswith(f"hf download owner/mit --revision {COMMIT}")
    assert error_of("owner/mit@main").endswith("hf download owner/mit --revision COMMIT")


# Runs in its own process, because huggingface_hub reads its environment when it is imported.
PROGRAM = """
import os
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
for key in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
    os.environ.pop(key, None)
from segformer_pl.models import mit_b0
from segformer_pl.checkpoints import load_weights
from segformer_pl.errors import UserError
for name in sys.argv[1:]:
    try:
        line = load_weights(mit_b0(), name)
    except UserError as error:
        line = f"refused: {error}"
    sys.stdout.write(str(line).splitlines()[0] + chr(10))
"""


@pytest.fixture
def load_from_hub(start_command, tmp_path):
    """Function (URL, names) that loads each; returns the first line of each report or refusal."""
    program = tmp_path / "load.py"
    program.write_text(PROGRAM)
    environment = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }

    def load(endpoint, *names):
        process = start_command(names, program=program, HF_ENDPOINT=endpoint, **environment)
        assert process.wait() == 0, process.output
        return re.findall("^.*(?:set from|refused:).*$", process.output, re.MULTILINE)

    return load


def whole(tensors):
    return {"model.safetensors": save(tensors)}


def shards(tensors):
    names = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    place = {key: names[n % 2] for n, key in enumerate(tensors)}
    files = {
        name: save({key: tensor for key, tensor in tensors.items() if place[key] == name})
        for name in names
    }
    index = json.dumps({"weight_map": place}).encode()
    return files | {"model.safetensors.index.json": index}


def variant(tensors):
    return {"model.fp16.safetensors": save({key: t.half() for key, t in tensors.items()})}


@pytest.fixture
def hub(request):
    """URL of a hub with one repository at one commit."""
    state = {name: tensor.contiguous() for name, tensor in mit_b0().state_dict().items()}
    files = {"config.json": b"{}"} | getattr(request, "param", whole)(state)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):  # http.server calls methods by these names
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/owner/mit/tree/{COMMIT}"):
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
                self.send(200, json.dumps(tree).encode(), with_body, {})
            elif path.startswith("/api/models/owner/mit"):
                siblings = ",".join(f'{{"rfilename": "{name}"}}' for name in files)
                body = f'{{"id": "owner/mit", "sha": "{COMMIT}", "siblings": [{siblings}]}}'
                self.send(200, body.encode(), with_body, {"Content-Type": "application/json"})
            elif (name := path.removeprefix(f"/owner/mit/resolve/{COMMIT}/")) in files:
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
                self.send(200, files[name], with_body, headers)
            else:
                self.send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

        def send(self, status, body, with_body, headers):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_hub_names_are_pinned(hub, load_from_hub):
    pinned, missing = f"owner/mit@{COMMIT}", f"owner/other@{COMMIT}"
    lines = load_from_hub(hub, pinned, "owner/mit", "owner/mit@main", missing)
    assert f"set from '{pinned}': segformer_pl encoder" in lines[0]
    for name, line in zip(("owner/mit", "owner/mit@main"), lines[1:]):
        assert line.startswith(f"refused: hub name '{name}' pins no commit")
        assert f"write '{pinned}'" in line
    assert f"refused: the hub has no '{missing}'" in lines[3]
    # Without network, a pinned commit comes from the cache.
    lines = load_from_hub("http://127.0.0.1:9", pinned, missing)
    assert f"set from '{pinned}'" in lines[0]
    assert f"refused: the hub cannot be reached for '{missing}'" in lines[1]
    assert "give a local file or folder" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("hub", [shards, variant], indirect=True)
def test_hub_repositories_of_shards_and_variants(hub, load_from_hub):
    pinned = f"owner/mit@{COMMIT}"
    for endpoint in (hub, "http://127.0.0.1:9"):  # then from the cache
        (line,) = load_from_hub(endpoint, pinned)
        assert f"set from '{pinned}': segformer_pl encoder" in line


def test_a_state_dict_in_memory_is_a_source():
    encoder = mit_b0()
    assert load_weights(mit_b0(), encoder.state_dict()).source == "the state dict"
