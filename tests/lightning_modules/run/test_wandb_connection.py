"""wandb fails, before a run or in it, and training continues: the log stays, and how to send it."""

import json
import os
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from wandb.errors import CommError

from lightning_modules.cli.main import main
from lightning_modules.run.wandb_logger import FaultTolerantWandbLogger
from tests.helpers import command as helpers
from tests.helpers.command import error_of
from tests.helpers.processes import start_python, wait_for

FIT = [*helpers.FIT, *"--run.name w --report.samples 2 --wandb.mode online".split()]


@pytest.fixture(autouse=True)
def _online(here, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.delenv("WANDB_MODE", raising=False)  # Lightning sets it, offline
    # wandb's process of other tests
    wandb.teardown()
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


class Server(ThreadingHTTPServer):
    """Answers as wandb's does to what a run asks, until it is told to hang."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.hang, self.started, self.history = threading.Event(), threading.Event(), 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, query, values):
        if "upsertBucket" in query:
            self.started.set()
            project = {"id": "p", "name": "mobileone", "entity": {"id": "e", "name": "me"}}
            run = {"id": "r", "name": values["name"], "displayName": "r", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**run, "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/up/{n}"} for n in values["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}} if "serverInfo" in query else {}


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.hang.is_set():
            time.sleep(600)
        asked = json.loads(body) if self.path == "/graphql" else {}
        self.server.history += self.path.endswith("file_stream")
        values = asked.get("variables") or {}
        reply = json.dumps({"data": self.server.answer(asked.get("query", ""), values)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def start(url, epochs, *more):
    variables = {"WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3", "WANDB_BASE_URL": url}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = ["-m", "mobileone", *FIT, "--trainer.max_epochs", epochs, *more]
    return start_python(*command, variables=variables, **pipe)


def assert_kept(said, reason):
    """The last word is where the log is and how to send it; and all of it is there."""
    (line,) = [
        line for line in said.splitlines() if line.startswith("wandb has not received the complete")
    ]
    assert reason in line, line
    folder = Path(line.split("wandb sync ")[1])
    assert f"It is kept in {folder}; to send it" in line
    (log,) = folder.glob("run-*.wandb")
    wait_for(lambda: log.read_bytes().count(b"val/acc1") >= 2)  # wandb's own process writes it
    (run,) = [p for p in Path("runs/w").iterdir() if not p.is_symlink()]
    assert (run / "checkpoints/last/manifest.json").is_file()
    assert "val/acc1" in next(run.glob("metrics/*/metrics.csv")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listens", "parent"), [(True, "without"), (False, "with")], ids=["hangs", "refuses"]
)
def test_no_connection_at_the_start(listens, parent):
    """Started by a process that uses wandb as well, the run would share wandb's process with it."""
    if parent == "with":
        wandb.init(mode="offline").finish()
        assert "WANDB_SERVICE" in os.environ
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        port = silent.getsockname()[1]
        if not listens:
            silent.close()
        process = start(f"http://127.0.0.1:{port}", epochs=2)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert_kept(said, "it could not be reached")


@pytest.mark.slow
def test_connection_lost_within_the_run(server):
    process = start(server.url, epochs=3)
    try:
        wait_for(lambda: list(Path("runs").glob("w/*/checkpoints/last.ckpt")))
        assert server.started.is_set() and process.poll() is None
        server.hang.set()
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    assert_kept(said, "Timed out finishing run")
    assert "To send it later: wandb artifact put --type model --name mobileone/test_byobnet" in said


@pytest.mark.slow
def test_with_a_connection_nothing_is_said_and_the_log_is_sent(server):
    """That the server above is one to wandb, and hanging alone makes the difference."""
    process = start(server.url, 1, "--report.log_artifact", "none")  # the server takes none
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert "wandb has not received" not in said and "wandb does not take" not in said
    assert server.history > 1


def refusing(message):
    real = wandb.init

    def init(**options):
        if options["mode"] == "online":
            raise CommError(message)
        return real(**options)

    return init


def test_without_a_connection_the_run_is_logged_offline(monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", refusing("Run initialization has timed out after 90.0 sec"))
    with pytest.warns(UserWarning, match=r"could not be reached: Run init.*logged offline.*sync"):
        main(FIT)
    assert_kept(capsys.readouterr().out, "it could not be reached: Run initialization has timed")


def test_a_key_or_team_that_the_server_refuses_ends_it_before_training(monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", refusing("upsert failed: returned error 401: not logged in"))
    said = error_of(capsys, *FIT)
    assert "wandb refuses the run (upsert failed: returned error 401" in said
    assert "`wandb login`" in said and "--wandb.entity" in said and "`wandb sync`" in said


class Dead:
    """A run whose process has ended."""

    settings = wandb.Settings()
    calls = 0

    def log(self, *arguments):
        self.calls += 1
        raise ConnectionResetError("Connection lost")

    finish = log


def test_a_dead_wandb_process_is_said_once(tmp_path):
    run = Dead()
    logger = FaultTolerantWandbLogger(save_dir=tmp_path, experiment=run, offline=True)
    with pytest.warns(UserWarning, match="does not take everything.*Connection lost") as caught:
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
    assert run.calls == 3 and len(caught) == 1
    assert "wandb sync" in logger.finish()
