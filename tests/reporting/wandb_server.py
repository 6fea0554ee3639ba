"""As much of a W&B server on this machine as a client needs to log online: GraphQL by the names of operations, the file stream, uploads."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

KEY = "0123456789" * 4
ENTITY = "somebody"


@dataclass
class Stored:
    """An artifact as the server knows it."""

    id: str
    name: str
    kind: str
    metadata: dict[str, Any]
    client: str
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


class Server:
    """Answers on a free port of 127.0.0.1 until it is killed, and keeps what came.

    Attributes:
        seen: method and path, or the name of the GraphQL operation, of every request in order; a path by its last part.
        keys: what clients said they were, as ``Authorization`` has it.
        unknown: GraphQL that there is no answer to here.
        runs: what was upserted, by run: the last value of every argument that was given.
        lines: what a file of a run has in the file stream: its lines by number, as text.
        files: what was uploaded for runs, by run and name.
        artifacts: by id.
        made, used: ids of a run's output and input artifacts.
        finished: exit codes of runs that said they were complete.
        fault: a status that everything is answered with; 0 leaves requests without an answer.
        faults_from: requests that switch a fault on, by name.
        refused: operations that are answered with an error of GraphQL's.
        killed_by: the request that is its last.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.keys: set[str] = set()
        self.unknown: list[dict[str, Any]] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.lines: dict[tuple[str, str], dict[int, str]] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.artifacts: dict[str, Stored] = {}
        self.made: dict[str, list[str]] = {}
        self.used: dict[str, list[str]] = {}
        self.finished: dict[str, int] = {}
        self.fault: int | None = None
        self.faults_from: dict[str, int] = {}
        self.refused: set[str] = set()
        self.killed_by = ""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                server.handle(self)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, *parts: object) -> None:
                pass

        self.http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """Closes the port, and leaves what is being answered. Once is enough."""
        if self.closing.is_set():
            return
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """History rows."""
        lines = self.lines.get((run, "wandb-history.jsonl"), {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def summary(self, run: str) -> dict[str, Any]:
        """The last summary."""
        lines = self.lines[run, "wandb-summary.json"]
        return json.loads(lines[max(lines)])

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = request.path.partition("?")[0]
        operation = ""
        if path == "/graphql":
            asked = json.loads(body)
            operation = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]).group(1)
        name = operation or f"{request.command} {path.rpartition('/')[2]}"
        with self.lock:
            self.seen.append(name)
            self.keys.add(_key_of(request.headers.get("Authorization", "")))
            self.fault = self.faults_from.get(name, self.fault)
        if name == self.killed_by:
            self.kill()
            request.close_connection = True
            return
        if self.fault == 0:
            self.closing.wait()
            request.close_connection = True
            return
        if self.fault is not None:
            return _reply(
                request, self.fault, {"error": f"fault {self.fault}", "errors": [{"message": f"fault {self.fault}"}]}
            )
        with self.lock:
            if operation:
                answer = self.graphql(operation, asked.get("variables") or {}, asked["query"])
            elif request.command == "PUT":
                answer = self.upload(path, body)
            elif path.endswith("/file_stream"):
                answer = self.stream(path.split("/")[-2], json.loads(body))
            else:
                answer = None
        _reply(request, 404 if answer is None else 200, answer or {})

    def graphql(self, operation: str, values: dict[str, Any], query: str) -> dict[str, Any]:
        if operation in self.refused:
            return {"data": {}, "errors": [{"message": f"{operation} is refused"}]}
        known: Callable[..., dict[str, Any]] | None = getattr(self, f"on_{operation}", None)
        if known is None:
            self.unknown.append({"operation": operation, "values": values, "query": query})
            return {"data": {}, "errors": [{"message": f"{operation} isn't known here"}]}
        return {"data": known(values.get("input") or values)}

    def on_Viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    def on_ServerFeaturesQuery(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_ArtifactType(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def on_UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values["name"]
        fresh = name not in self.runs
        kept = self.runs.setdefault(name, {})
        kept |= {key: value for key, value in values.items() if value is not None}
        entity = {"id": "1", "name": ENTITY}
        bucket = {
            "id": f"bucket-{name}",
            "name": name,
            "displayName": kept.get("displayName") or name,
            "config": kept.get("config", "{}"),
            "project": {"id": "1", "name": kept["project"], "entity": entity},
            "historyLineCount": 0,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def on_CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        run = values["run"]
        files = [{"name": name, "uploadUrl": self.address("run", run, name)} for name in values["files"]]
        return {"createRunFiles": {"runID": f"bucket-{run}", "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values
        made = Stored(
            id=f"artifact-{len(self.artifacts)}",
            name=given["artifactCollectionName"],
            kind=given["artifactTypeName"],
            metadata=json.loads(given.get("metadata") or "{}"),
            client=given["clientID"],
        )
        self.artifacts[made.id] = made
        if given.get("runName"):
            self.made.setdefault(given["runName"], []).append(made.id)
        return {
            "createArtifact": {
                "artifact": {"id": made.id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            }
        }

    def on_CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        url = self.address("artifact", values["artifactID"], values["name"])
        return {
            "createArtifactManifest": {
                "artifactManifest": {"id": "1", "file": {"id": "1", "uploadUrl": url, "uploadHeaders": []}}
            }
        }

    def on_CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": None,
                "uploadUrl": self.address("artifact", file["artifactID"], file["name"]),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in values["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[values["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": ""}}}

    def on_ArtifactByID(self, values: dict[str, Any]) -> dict[str, Any]:
        made = self.artifacts[values["id"]]
        project = {"id": "1", "internalId": "1", "name": "gradloc", "entity": {"name": ENTITY}}
        answer = {
            "__typename": "Artifact",
            "id": made.id,
            "artifactSequence": {"__typename": "ArtifactSequence", "name": made.name, "project": project},
            "versionIndex": 0,
            "artifactType": {"name": made.kind},
            "metadata": json.dumps(made.metadata),
            "ttlDurationSeconds": 0,
            "ttlIsInherited": True,
            "tags": [],
            "state": "COMMITTED",
            "size": sum(map(len, made.files.values())),
            "digest": "",
            "fileCount": len(made.files),
            "createdAt": "2000-01-01T00:00:00",
            "aliases": [],
        }
        unused = ("description", "historyStep", "commitHash", "updatedAt")
        return {"artifact": answer | dict.fromkeys(unused)}

    def on_UseArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values
        self.used.setdefault(given["runName"], []).append(given["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def address(self, what: str, owner: str, name: str) -> str:
        return f"{self.url}/put/{what}/{owner}/{quote(name)}"

    def upload(self, path: str, body: bytes) -> dict[str, Any]:
        _, _, what, owner, name = unquote(path).split("/", 4)
        if what == "artifact":
            self.artifacts[owner].files[name] = body
        else:
            self.files[owner, name] = body
        return {}

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        for name, part in (body.get("files") or {}).items():
            lines = self.lines.setdefault((run, name), {})
            for number, line in enumerate(part["content"], part["offset"]):
                lines[number] = line
        if body.get("complete"):
            self.finished[run] = body["exitcode"]
        return {}


def _key_of(header: str) -> str:
    scheme, _, value = header.partition(" ")
    return base64.b64decode(value).decode().partition(":")[2] if scheme == "Basic" else header


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that go away are what they are; anything else is a fault of the test's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


def _reply(request: BaseHTTPRequestHandler, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
