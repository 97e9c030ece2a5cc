"""Servers of buckets in processes of their own (moto's of S3), and faults on the way to one."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

from est_ds.launch.placement import free_port

BUCKET = "tests"
SECRET = "secret-of-the-tests-0123456789"
REFUSALS = {
    "forbidden": (403, "AccessDenied", "Access Denied"),
    "full": (507, "InsufficientStorage", "There is no room left"),
}


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """Runs the server; gives its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, f"http://127.0.0.1:{port}/moto-api/data.json", log):
        yield port


@contextmanager
def _serving(command: list[str], url: str, log: Path) -> Iterator[None]:
    """Runs a server from when it answers."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def credentials(port: int) -> dict[str, str]:
    """The environment in which boto reaches a server on a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@dataclass
class Way:
    """An HTTP proxy before a server, which does wrong what it is told to.

    Attributes:
        fault: `cut`: connections end in the middle of a request that writes; a key of `REFUSALS`:
            such requests are refused; None: all is well.
        slow_s: what a request that writes takes longer.
        counts: requests by method.
    """

    server: int
    fault: str | None = None
    slow_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[int]:
        """Gives the port of the proxy."""
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                way.counts[self.command] = way.counts.get(self.command, 0) + 1
                length = int(self.headers.get("Content-Length") or 0)
                writes = self.command in ("PUT", "POST", "DELETE")
                if writes and way.fault == "cut":
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                body = self.rfile.read(length)
                if writes and way.fault in REFUSALS:
                    self.refuse(*REFUSALS[way.fault])
                    return
                if writes:
                    time.sleep(way.slow_s)
                onward = http.client.HTTPConnection("127.0.0.1", way.server, timeout=60)
                onward.request(self.command, self.path, body, dict(self.headers))
                answer = onward.getresponse()
                self.answer(answer.status, answer.getheaders(), answer.read())
                onward.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def refuse(self, status: int, code: str, text: str) -> None:
                xml = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
                self.answer(status, [("Content-Type", "application/xml")], xml)

            def answer(self, status: int, headers: list, body: bytes) -> None:
                self.send_response(status)
                length = str(len(body))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value  # of what HEAD asks about
                    elif name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *arguments) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
            proxy.daemon_threads = True
            proxy.handle_error = lambda *_: None  # a client that was killed
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield proxy.server_address[1]
            proxy.shutdown()


@contextmanager
def gcs_server(log: Path) -> Iterator[str]:
    """Runs a stand-in of Google Cloud Storage with a bucket; gives its address."""
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--port", str(port)]
    command += ["--in-memory", "--default-bucket", BUCKET]
    address = f"http://127.0.0.1:{port}"
    with _serving(command, f"{address}/storage/v1/b?project=tests", log):
        yield address
