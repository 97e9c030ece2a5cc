"""Published weights to begin with: folders as the library writes them, and a Hub that has one."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

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
