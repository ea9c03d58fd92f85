"""A stand-in of the Hugging Face hub: the part of its HTTP interface that its client uses.

It keeps repositories of models with their commits, refuses what the hub refuses, and remembers the
requests. Large files go through the LFS protocol, as on the hub for clients without xet.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "other"}
LARGE = (".safetensors", ".bin", ".png")
OWNERS = {"writer": "ada", "reader": "ben"}  # by token


class Repository:
    """Files by name of each commit, the last one being the current one."""

    def __init__(self, private):
        self.private, self.commits, self.messages = private, {}, []
        self.commit("initial commit", {})

    @property
    def head(self):
        return list(self.commits)[-1]

    @property
    def files(self):
        return self.commits[self.head]

    def commit(self, message, files):
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)


class LocalHub(ThreadingHTTPServer):
    """A server on a free port of this machine.

    Attributes:
        repositories: Repositories by name.
        requests: Method and path of every request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.blobs, self.requests = {}, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Refusal(Exception):
    """An answer with an error status; headers and body say why."""

    def __init__(self, status, body=None, **headers):
        self.status, self.body = status, body or {}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        path = unquote(self.path.split("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        body = self.read_body()
        self.user = OWNERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        try:
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    answer = method(self, body, *match.groups())
                    break
            else:
                raise Refusal(404)
            status, headers = 200, {}
        except Refusal as refusal:
            answer, status, headers = refusal.body, refusal.status, refusal.headers
        if isinstance(answer, tuple):
            answer, headers = answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def repository(self, name):
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            raise Refusal(404, X_Error_Code="RepoNotFound")
        return found

    def commit_of(self, name, revision):
        repository = self.repository(name)
        sha = repository.head if revision in (None, "main") else revision
        if sha not in repository.commits:
            raise Refusal(404, X_Error_Code="RevisionNotFound")
        return sha, repository.commits[sha]

    def check_writer(self, owner):
        if self.user is None:
            raise Refusal(401, X_Error_Message="Invalid credentials in Authorization header")
        if self.user != owner:
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            raise Refusal(403, {"error": message}, X_Error_Message=message)

    def whoami(self, body):
        if self.user is None:
            raise Refusal(401, X_Error_Message="Invalid credentials in Authorization header")
        return {"type": "user", "name": self.user, "orgs": []}

    def create(self, body):
        given = json.loads(body)
        owner = given["organization"] or self.user
        self.check_writer(owner)
        name = f"{owner}/{given['name']}"
        if name in self.server.repositories:
            raise Refusal(409, {"url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository(given.get("visibility") == "private")
        return {"url": f"{self.server.url}/{name}"}

    def validate(self, body):
        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        if metadata.get("license", "mit") not in LICENSES:
            raise Refusal(400, {"errors": [{"message": '"license" must be one of [...]'}]})
        return {"errors": [], "warnings": []}

    def preupload(self, body, name, revision):
        self.check_writer(name.split("/")[0])
        self.repository(name)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        return {
            "files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in modes.items()
            ]
        }

    def batch(self, body, name):
        self.check_writer(name.split("/")[0])
        return {
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
        }

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400)
        self.server.blobs[oid] = body
        return {}

    def commit(self, body, name, revision):
        self.check_writer(name.split("/")[0])
        repository = self.repository(name)
        files, message = dict(repository.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository.commit(message, files)
        url = f"{self.server.url}/{name}/commit/{repository.head}"
        return {"commitUrl": url, "commitOid": repository.head}

    def info(self, body, name, revision=None):
        sha, files = self.commit_of(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.repository(name).private
        return {"id": name, "sha": sha, "private": private, "siblings": siblings}

    def tree(self, body, name, revision):
        _, files = self.commit_of(name, revision)
        return [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            for path, content in files.items()
        ]

    def resolve(self, body, name, revision, path):
        sha, files = self.commit_of(name, revision)
        if path not in files:
            raise Refusal(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return files[path], {"X-Repo-Commit": sha, "ETag": f'"{git_hash(files[path])}"'}

    def log_message(self, *arguments):
        pass


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)/?", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
