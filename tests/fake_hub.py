"""A hub on 127.0.0.1 that serves one repository from a directory, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    directory: Path
    repository: str = "tiny/model"
    endpoint: str = ""
    status: int = 200  # of every answer; not 200 is an error for all
    cut_after: int | None = None  # bytes of the weights after which the connection breaks
    wrong_sha256: bool = False
    token: str | None = None  # asked for
    delay: threading.Event | None = None  # the weights wait for it
    ranges: list[str] = field(default_factory=list)  # of requests for the weights; "" for all
    requests: int = 0

    def listing(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.directory.iterdir()):
            entry: dict[str, object] = {"rfilename": path.name, "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                sha256 = self.sha256(path)
                entry["lfs"] = {"sha256": sha256, "size": entry["size"], "pointerSize": 134}
            siblings.append(entry)
        siblings.append({"rfilename": "pytorch_model.bin", "size": 10**9})
        return {"id": self.repository, "sha": COMMIT, "siblings": siblings}

    def sha256(self, path: Path) -> str:
        if self.wrong_sha256:
            return "0" * 64
        return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving(directory: Path) -> Iterator[Hub]:
    hub = Hub(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests += 1
            if hub.status != 200 or not self._allowed():
                self._answer(hub.status if hub.status != 200 else 401, b"{}", {})
                return
            path = self.path.split("?")[0]
            if path in [f"/api/models/{hub.repository}/revision/{r}" for r in ("main", COMMIT)]:
                body = json.dumps(hub.listing()).encode()
                self._answer(200, body, {"Content-Type": "application/json"})
                return
            match = re.fullmatch(rf"/{hub.repository}/resolve/\w+/([\w.-]+)", path)
            if match is None or not (hub.directory / match[1]).is_file():
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            self._file(hub.directory / match[1])

        def _allowed(self) -> bool:
            return hub.token is None or self.headers["Authorization"] == f"Bearer {hub.token}"

        def _file(self, path: Path) -> None:
            body, sha256 = path.read_bytes(), hub.sha256(path)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
            asked = self.headers["Range"]
            weights = path.suffix == ".safetensors"
            if self.command == "GET" and weights:
                hub.ranges.append(asked or "")
                if hub.delay is not None:
                    hub.delay.wait(30)
            if asked:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self._answer(206, body[start:], headers)
            elif weights and hub.cut_after is not None and self.command == "GET":
                self._answer(200, body, headers, cut_after=hub.cut_after)
            else:
                self._answer(200, body, headers)

        def _answer(
            self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut_after])
            if cut_after is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
