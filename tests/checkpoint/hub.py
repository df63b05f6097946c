"""A hub of our own: the few addresses that an upload asks, and the files that came."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """One account and its repositories.

    Args:
        role: of the only token, ``hf_right``.
        files: by repository and path.
        requests: method and path of each, in order.
    """

    role: str = "write"
    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        self.requests.append((method, path))
        if token != "hf_right":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            organisations = [{"name": "lab", "type": "org"}]
            return 200, {"name": "me", "orgs": organisations, "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            present = name in self.files
            self.files.setdefault(name, {".gitattributes": b""})
            self.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
            return (409 if present else 200), {"url": f"{self.endpoint}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        owner, repository, action, *_ = path.removeprefix("/api/models/").split("/")
        held = self.files[f"{owner}/{repository}"]
        if action == "tree":
            return 200, [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in held]
        if action == "preupload":
            asked = json.loads(body)["files"]
            return 200, {
                "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            }
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del held[line["value"]["path"]]
            return 200, {
                "commitUrl": f"{self.endpoint}/{owner}/{repository}/commit/0",
                "commitOid": "0",
                "success": True,
            }
        if action == "revision":
            return 200, {"id": f"{owner}/{repository}", "sha": "0", "siblings": [{"rfilename": file} for file in held]}
        return 404, {"error": "not here"}


@contextmanager
def running_hub(role: str = "write") -> Iterator[FakeHub]:
    """A hub at a port of this machine."""
    hub = FakeHub(role)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, values = hub.answer(self.command, self.path.partition("?")[0], token, body)
            text = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
