"""Published weights: folders as the library writes them, and a Hub that has one or takes one."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

from est_ds.slicing.families import family_of


def publish(folder: Path, section: dict, **how) -> Path:
    """A folder as the library writes it, of a model that the library draws, wider than it would."""
    config = transformers.AutoConfig.for_model(**section)
    torch.manual_seed(11)
    auto = getattr(transformers, family_of(config.model_type).auto_class)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, **how)
    return folder


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface by which a repository's files are fetched."""

    files: Path
    commit = "c" * 40

    def do_GET(self) -> None:
        headers = {"X-Repo-Commit": self.commit}
        if self.path.startswith("/api/models/someone/small"):
            files = sorted(self.files.iterdir())
            found = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "b" * 40}
                     for f in files]  # fmt: skip
            whole = {"id": "someone/small", "sha": self.commit, "siblings": []}
            body = json.dumps(found if "/tree/" in self.path else whole).encode()
        elif self.path.startswith("/someone/small/resolve/"):
            body = (self.files / self.path.rpartition("/")[2]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


class WritableHub(Hub):
    """The part by which a folder is put into the repository: as huggingface_hub calls it, with what
    the Hub checks. Weights take the way of large files, all else stands in the commit.

    Attributes:
        files: what is in the repository; the folder is there once the repository is.
        large: contents of large files by their SHA-256, before and after a commit names them.
        said: of every request its line and body, in order.
    """

    token = "hf_" + "s" * 30
    large: dict[str, bytes]
    said: list[tuple[str, bytes]]
    takes_commits = True

    def do_GET(self) -> None:
        if self._is_known():
            if self.path.startswith("/api/whoami-v2"):
                self._answer({"type": "user", "name": "someone"})
            elif self.files.is_dir():
                super().do_GET()
            else:
                self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        repository = "/api/models/someone/small"
        if not self._is_known():
            return
        if self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif self.path == "/api/repos/create":
            is_there = self.files.is_dir()
            self.files.mkdir(exist_ok=True)
            url = f"http://{self.headers['Host']}/someone/small"
            self._answer({"url": url}, 409 if is_there else 200)
        elif self.path == f"{repository}/preupload/main":
            found = [{"path": file["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if self._is_large(file["path"]) else "regular"}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer({"files": found})
        elif self.path == "/someone/small.git/info/lfs/objects/batch":
            url = f"http://{self.headers['Host']}/large"
            found = [{**one, "actions": {"upload": {"href": f"{url}/{one['oid']}"}}}
                     for one in json.loads(body)["objects"]]  # fmt: skip
            self._answer({"transfer": "basic", "objects": found})
        elif self.path == f"{repository}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        """A large file; the address itself is the permission, as of a store."""
        body, oid = self._body(), self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.send_error(400)
            return
        self.large[oid] = body
        self._answer({})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        if not self.takes_commits:
            self._answer({"error": f"no room, said to {self.headers['Authorization']}"}, 403)
            return
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                assert value["encoding"] == "base64" and not self._is_large(value["path"])
                (self.files / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                (self.files / value["path"]).write_bytes(self.large[value["oid"]])
            elif kind == "deletedFile":
                (self.files / value["path"]).unlink()
        url = f"http://{self.headers['Host']}/someone/small/commit/{self.commit}"
        self._answer({"commitUrl": url, "commitOid": self.commit})

    def _is_large(self, path: str) -> bool:
        return path.endswith(".safetensors")

    def _is_known(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {self.token}":
            return True
        self._answer({"error": f"Invalid {self.headers['Authorization']}"}, 401)
        return False

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.said.append((self.requestline, body))
        return body

    def _answer(self, tree: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status >= 400:
            self.send_header("X-Error-Message", str(tree.get("error", "")))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def writable_hub(files: Path, monkeypatch, **how: Any) -> Iterator[type[WritableHub]]:
    """A Hub that this process is logged in to, and that is the Hub for it."""
    from huggingface_hub import constants

    handler = type("_", (WritableHub,), {"files": files, "large": {}, "said": [], **how})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has no such store
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", handler.token)
        yield handler
        server.shutdown()
