"""A server on this machine that speaks as much of the Hub's API as its real client needs to publish and to load."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".png", ".bin")  # what goes through LFS, as the Hub's .gitattributes says


@dataclass
class Repository:
    """A model repository: its files, and one message for each commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class LocalHub:
    """
    What the server knows, and how it is to misbehave.

    Attributes:
        url: Its endpoint.
        repositories: By their names.
        objects: LFS objects by their SHA-256.
        requests: `METHOD path` of all it was asked.
        faults: `METHOD path` patterns, each with what is answered in its place, once: a status, or "drop" to close the
            connection in the middle.
        part_size: Larger LFS objects are uploaded in parts of so many bytes.
    """

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[tuple[str, int | str]] = field(default_factory=list)
    part_size: int = 4_000_000
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, pattern: str) -> list[str]:
        """The requests that match a pattern from their start."""
        return [request for request in self.requests if re.match(pattern, request)]

    def take_fault(self, request: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if re.match(fault[0], request):
                    self.faults.remove(fault)
                    return fault[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format, *args):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.take_fault(request)
        if fault == "drop":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if fault is not None:
            self._send(fault, {"error": "as the test wants it"})
            return
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                method(self, *match.groups(), body)
                return
        self._send(404, {"error": f"no such route: {request}"}, {"X-Error-Code": "EntryNotFound"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: dict | bytes = b"", headers: dict | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, repository: str | None = None) -> bool:
        """Whether the request has the token, and the repository is there; answers the client where not."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif repository is not None and repository not in self.hub.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    # ---- repositories

    def create(self, body):
        if not self._may():
            return
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, name, _, body):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        card = repository.files.get("README.md", b"").decode()
        found = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
        metadata = dict(line.split(": ", 1) for line in found[1].splitlines() if ": " in line) if found else None
        self._send(
            200,
            {
                "id": name,
                "sha": repository.sha,
                "private": repository.private,
                "cardData": metadata,
                "siblings": [{"rfilename": path} for path in sorted(repository.files)],
            },
        )

    def tree(self, name, revision, body):
        if self.hub.repositories.get(name) is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.hub.repositories[name].files
        listed = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
            for path in sorted(files)
        ]
        self._send(200, json.dumps(listed).encode())

    def validate(self, body):
        self._send(200, {"errors": [], "warnings": []})

    # ---- uploads

    def preupload(self, name, _, body):
        if not self._may(name):
            return
        there, files = self.hub.repositories[name].files, []
        for item in json.loads(body)["files"]:
            path, large = item["path"], item["path"].endswith(LARGE)
            oid = None
            if path in there:
                git = hashlib.sha1(b"blob %d\0" % len(there[path]) + there[path])
                oid = (hashlib.sha256(there[path]) if large else git).hexdigest()
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def lfs_batch(self, name, body):
        if not self._may(name):
            return
        answers = []
        for item in json.loads(body)["objects"]:
            oid, size, answer = item["oid"], item["size"], dict(item)
            if oid not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    upload["header"] = {"chunk_size": str(self.hub.part_size)} | {
                        str(number): f"{self.hub.url}/lfs/{oid}/{number}" for number in range(1, count + 1)
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            answers.append(answer)
        self._send(200, {"transfer": "multipart", "objects": answers})

    def lfs_put(self, oid, body):
        self._keep(oid, body)

    def lfs_part(self, oid, number, body):
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self._send(200, headers={"ETag": hashlib.sha256(body).hexdigest()})

    def lfs_join(self, oid, body):
        parts = self.hub.parts[oid]
        for part in json.loads(body)["parts"]:
            assert part["etag"] == hashlib.sha256(parts[part["partNumber"]]).hexdigest()
        self._keep(oid, b"".join(parts[number] for number in sorted(parts)))

    def _keep(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            self._send(400, {"error": "the content is another"})
            return
        self.hub.objects[oid] = content
        self._send(200)

    def lfs_verify(self, body):
        item = json.loads(body)
        self._send(200 if len(self.hub.objects[item["oid"]]) == item["size"] else 400)

    def commit(self, name, _, body):
        if not self._may(name):
            return
        repository = self.hub.repositories[name]
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repository.sha) != repository.sha:
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        repository.files = files
        repository.commits.append(header["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self._send(200, {"commitUrl": url, "commitOid": repository.sha, "hookOutput": ""})

    # ---- downloads

    def resolve(self, name, revision, path, body):
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        headers = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            self._send(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[path]
        self._send(200, content, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{NAME}(/revision/[\w.-]+)?", _Handler.info),
    (rf"GET /api/models/{NAME}/tree/([\w.-]+)", _Handler.tree),
    (rf"POST /api/models/{NAME}/preupload/([\w.-]+)", _Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", _Handler.lfs_put),
    (r"PUT /lfs/(\w+)/(\d+)", _Handler.lfs_part),
    (r"POST /lfs/(\w+)", _Handler.lfs_join),
    (r"POST /lfs-verify", _Handler.lfs_verify),
    (rf"POST /api/models/{NAME}/commit/([\w.-]+)", _Handler.commit),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([\w.-]+)/(.+)", _Handler.resolve),
]


@contextlib.contextmanager
def serve() -> Iterator[LocalHub]:
    """Runs a hub on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
