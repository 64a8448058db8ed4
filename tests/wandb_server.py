"""A server on this machine that takes what `wandb sync` sends, as far as W&B's own does: it keeps each run's history by line."""

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        asked = json.loads(content or b"{}")
        self.answer(self.graphql(asked) if self.path == "/graphql" else self.stream(asked))

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer({})

    def graphql(self, asked):
        name, given = asked.get("operationName"), asked.get("variables", {})
        self.server.asked.append(name)
        entity = {"id": "e", "name": "me"}
        if name == "RunResumeStatus":
            run = self.server.runs.get(given["name"])
            known = run and {
                "id": "r", "name": given["name"], "summaryMetrics": json.dumps(run["summary"]), "displayName": "", "logLineCount": 0,
                "historyLineCount": len(run["history"]), "eventsLineCount": 0, "historyTail": json.dumps(run["history"][-1:]),
                "eventsTail": "[]", "config": json.dumps(run["config"]), "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1})}
            return {"model": {"id": "m", "name": given["project"], "entity": entity, "bucket": known}}
        if name == "UpsertBucket":
            run = self.server.runs.setdefault(given["name"], {"history": [], "summary": {}, "config": {}})
            if given.get("config"):
                run["config"] = json.loads(given["config"])
            project = {"id": "p", "name": given["project"], "entity": entity}
            return {"upsertBucket": {"inserted": True, "bucket": {
                "id": "r", "name": given["name"], "displayName": "", "description": "", "config": "{}", "sweepName": None,
                "project": project, "historyLineCount": len(run["history"])}}}
        if name == "CreateRunFiles":
            urls = [{"name": f, "uploadUrl": f"http://127.0.0.1:{self.server.server_port}/put/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        return {}

    def stream(self, asked):
        run = self.server.runs[self.path.split("/")[-2]]
        for name, part in asked.get("files", {}).items():
            if name == "wandb-history.jsonl":
                run["history"][part["offset"]:] = part["content"]  # lines from the offset on
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        if "exitcode" in asked:
            run["exitcode"] = asked["exitcode"]
        return None

    def answer(self, data):
        content = json.dumps({} if data is None else {"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.asked = {}, []

    @property
    def environment(self):
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}


@contextmanager
def wandb_server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
