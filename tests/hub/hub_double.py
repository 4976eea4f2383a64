"""A Hub on loopback: enough of its HTTP interface for the real huggingface_hub client to push to and load from."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


USER = "ada"
TOKEN = "hf_loopbacktokenofada"
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    changed: list[str]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit.oid == revision), None)

    def commit(self, branch: str, message: str, files: dict[str, bytes], changed: list[str]) -> Commit:
        history = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{id(self)} {branch} {len(history)}".encode()).hexdigest()
        history.append(Commit(oid, message, files, changed))
        return history[-1]


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    query: dict[str, list[str]]
    token: str | None
    body: bytes


@dataclass(frozen=True)
class Answer:
    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message, "errors": [{"message": message}]}, status, headers)


class HubDouble:
    """Serves repositories that live in memory, for one user, and records every request.

    Large files lie under another host name than the rest, as on the Hub, where they come from a content network.

    Attributes:
        repos: the repositories, by name.
        requests: every request so far, in order.
        blobs: large files by their SHA-256.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"

    def __enter__(self) -> HubDouble:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on the Hub cannot be reached; stopping twice is as good as once."""
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", "initial commit", files, sorted(files))
        return repo

    def sent(self, method: str, pattern: str) -> list[Request]:
        """The requests whose path matches the whole pattern."""
        return [each for each in self.requests if each.method == method and re.fullmatch(pattern, each.path)]

    # one method per route

    def whoami(self, request: Request) -> Any:
        self._require_token(request)
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self, request: Request) -> Any:
        content = json.loads(request.body)["content"]
        if re.search(r"^base_model: [./~]", content, re.MULTILINE):
            raise Refusal(400, '"base_model" must be the id of a model')
        return {"errors": [], "warnings": []}

    def create(self, request: Request) -> Any:
        self._require_token(request)
        wanted = json.loads(request.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name.split("/")[0] != USER:
            raise Refusal(403, f"You have no rights to create a model under {name.split('/')[0]}")
        if name in self.repos:
            return Answer({"error": "You already created it", "url": f"{self.endpoint}/{name}"}, status=409)
        self.add_repo(
            name,
            {".gitattributes": b"*.safetensors filter=lfs\n"},
            private=wanted.get("visibility") == "private" or wanted.get("private") is True,
        )
        return {"url": f"{self.endpoint}/{name}"}

    def preupload(self, request: Request, name: str, revision: str) -> Any:
        self._require_token(request)
        self._repo(request, name)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(request.body)["files"]
            ]
        }

    def lfs_batch(self, request: Request, name: str) -> Any:
        self._require_token(request)
        self._repo(request, name)
        return {
            "transfer": "basic",
            "objects": [
                {
                    **wanted,
                    "actions": {
                        "upload": {"href": f"{self.storage}/lfs/{wanted['oid']}"},
                        "verify": {"href": f"{self.endpoint}/{name}.git/info/lfs/objects/verify"},
                    },
                }
                for wanted in json.loads(request.body)["objects"]
            ],
        }

    def lfs_put(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.blobs[oid] = request.body
        return {}

    def lfs_get(self, request: Request, oid: str) -> Any:
        return self.blobs[oid]

    def lfs_verify(self, request: Request, name: str) -> Any:
        wanted = json.loads(request.body)
        if len(self.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(400, "the upload is not whole")
        return {}

    def commit(self, request: Request, name: str, revision: str) -> Any:
        self._require_token(request)
        repo = self._repo(request, name)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        files = dict(self._commit(repo, revision).files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        branch = f"refs/pr/{len(repo.branches)}" if request.query.get("create_pr") else revision
        changed = sorted(operation["value"]["path"] for operation in operations)
        made = repo.commit(branch, header["value"]["summary"], files, changed)
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.endpoint}/{name}/commit/{made.oid}",
            "pullRequestUrl": f"{self.endpoint}/{name}/discussions/1" if branch != revision else None,
        }

    def model(self, request: Request, name: str, revision: str = "main") -> Any:
        repo = self._repo(request, name)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"_id": name, "id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}

    def tree(self, request: Request, name: str, revision: str) -> Any:
        return [_entry(path, data) for path, data in self._commit(self._repo(request, name), revision).files.items()]

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Any:
        commit = self._commit(self._repo(request, name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        if not path.endswith(LFS_SUFFIXES):
            return Answer(data, headers=headers | {"ETag": f'"{_git_hash(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.blobs[oid] = data
        links = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{self.storage}/lfs/{oid}"}
        return Answer(b"", 302, headers | links)

    def may_write(self, request: Request, name: str) -> Any:
        self._repo(request, name)
        if name.split("/")[0] != USER:
            raise Refusal(403, f"You have no right to write to {name}")
        return {}

    ROUTES = (
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/repos/create", create),
        ("POST", "/api/models/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        ("POST", "/api/models/([^/]+/[^/]+)/commit/([^/]+)", commit),
        ("GET", "/api/models/([^/]+/[^/]+)", model),
        ("GET", "/api/models/([^/]+/[^/]+)/auth-check/write", may_write),
        ("GET", "/api/models/([^/]+/[^/]+)/revision/([^/]+)", model),
        ("GET", "/api/models/([^/]+/[^/]+)/tree/([^/]+)", tree),
        ("POST", "/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", lfs_batch),
        ("POST", "/([^/]+/[^/]+)[.]git/info/lfs/objects/verify", lfs_verify),
        ("PUT", "/lfs/([0-9a-f]{64})", lfs_put),
        ("GET", "/lfs/([0-9a-f]{64})", lfs_get),
        ("HEAD|GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    )

    def answer(self, request: Request) -> Any:
        """What the matching route says; a token that nobody has is refused on every route."""
        self.requests.append(request)
        if request.token not in (None, TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for methods, pattern, route in self.ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and re.fullmatch(methods, request.method):
                return route(self, request, *map(unquote, match.groups()))
        raise Refusal(501, f"The double has no route {request.method} {request.path}")

    def _require_token(self, request: Request) -> None:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")

    def _repo(self, request: Request, name: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.token is None):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.blobs:
                raise Refusal(400, f"{value['path']} was committed before it was uploaded")
            files[value["path"]] = self.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(501, f"The double knows no operation {key}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = self.headers["Host"].split(":")[0]
        request = Request(self.command, host, url.path, parse_qs(url.query), token, body)
        try:
            answer = self.server.hub.answer(request)
        except Refusal as refusal:
            answer = refusal.answer
        self._send(answer if isinstance(answer, Answer) else Answer(answer))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, answer: Answer) -> None:
        binary = isinstance(answer.content, bytes)
        data = answer.content if binary else json.dumps(answer.content).encode()
        kind = "application/octet-stream" if binary else "application/json"
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        """Says nothing: `HubDouble.requests` holds it all."""


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def client_environment(endpoint: str, hf_home: str | Path, **variables: str) -> dict[str, str]:
    """The environment of a new process whose Hub is `endpoint`: huggingface_hub reads that when it is imported.

    Args:
        endpoint: address of the Hub.
        hf_home: folder of the cache and of a stored token, if any.
        variables: further environment variables, such as `HF_TOKEN`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(hf_home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "60",  # a busy machine must not look like a Hub that is away
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run_client(
    code: str, *arguments: str | Path, endpoint: str, hf_home: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process, in `client_environment`; `arguments` are its `sys.argv[1:]`."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=client_environment(endpoint, hf_home, **variables),
        cwd=hf_home,
        capture_output=True,
        text=True,
        timeout=600,
    )
