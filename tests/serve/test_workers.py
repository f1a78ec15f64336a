"""The processes: signals, reload, workers that die, and nothing acknowledged that the audit log does not have."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from davylamp.core.errors import InputError
from davylamp.serve.config import read_policy
from davylamp.serve.workers import run_serve
from tests.serve import upstream as up
from tests.serve.running import use

ROOT = Path(__file__).parent.parent.parent
MAIN = """import sys
from pathlib import Path
from davylamp.serve.workers import run_serve
if __name__ == "__main__":  # the workers import the main module again
    run_serve(policy=Path(sys.argv[1]))
"""


class Process:
    """A gateway as `davylamp serve` runs it."""

    def __init__(self, folder, policy):
        self.policy, script = folder / "policy.toml", folder / "main.py"
        self.policy.write_text(policy)
        script.write_text(MAIN)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), str(self.policy)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = []
        self._reader = threading.Thread(
            target=lambda: self.said.extend(iter(self.process.stderr.readline, "")), daemon=True
        )
        self._reader.start()
        self.port = int(self.wait(r"serving http://[\d.]+:(\d+)/v1")[1])

    def wait(self, pattern, seconds=90):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.said):
                if match := re.search(pattern, line):
                    return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"it did not say {pattern!r}: {self.said}")

    def ask(self, body, path="/v1/chat/completions", *, verdicts=False):
        """(status, outcome, id, body) of one request, and its verdicts' ids if asked; None if the connection broke."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(
                "POST" if body else "GET",
                path,
                json.dumps(body) if body else None,
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            data = answer.read()
            found = answer.status, answer.headers["X-Davylamp-Outcome"], answer.headers["X-Davylamp-Id"], data
            return (*found, answer.headers["X-Davylamp-Verdicts"]) if verdicts else found
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def chat(self, text):
        return self.ask({"messages": [{"role": "user", "content": text}]})

    def end(self, name=signal.SIGTERM):
        self.process.send_signal(name)
        code = self.process.wait(60)
        self.close()
        return code

    def close(self):
        """Once it has ended: its workers may hold the pipe a moment longer."""
        self._reader.join(60)
        self.process.stderr.close()


@pytest.fixture
def behind():
    with up.Upstream() as server:
        yield server


@contextlib.contextmanager
def process(folder, behind, more="", guards=('word"',)):
    policy = f'{more}\n[upstream]\nurl = "{behind.url}"\n' + "".join(
        f'[[guard]]\nuse = "{use(name)}\n' for name in guards
    )
    running = Process(folder, policy)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end()
        running.close()


def children(pid):
    return [int(item) for item in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(pid):
    """The worker processes; Python's resource tracker is a child too."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def settled(gateway, total, seconds=60):
    """Requests by worker, once their sum is `total` whichever worker is asked: each leaves its counts for the others every second, so that
    twelve equal answers in a row mean that no worker holds any that a kill would lose."""
    end, agreed = time.monotonic() + seconds, 0
    while True:
        text = gateway.ask(None, "/metrics")[3].decode()
        found = re.findall(r'davylamp_requests_total\{endpoint="chat",outcome="allowed",worker="(\d)"\} (\d+)', text)
        agreed = agreed + 1 if sum(int(number) for _, number in found) == total else 0
        if agreed == 12:
            return dict(found)
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_sigterm_lets_requests_finish_and_sighup_takes_a_new_policy_on(behind, tmp_path):
    behind.answer = up.say("bread " * 100, size=60, pause=0.05)
    with process(tmp_path, behind, "[server]\nport = 0\n") as gateway:
        assert gateway.chat("forbidden")[1] == "blocked" and gateway.chat("other")[1] == "allowed"
        text = gateway.policy.read_text()
        gateway.policy.write_text(text.replace('word"', 'word:word=other"'))
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait("policy taken on")
        assert gateway.chat("forbidden")[1] == "allowed" and gateway.chat("other")[1] == "blocked"
        gateway.policy.write_text(text + "[wrong]\n")
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait("was not taken on, the old one stays: no key in policy.toml named 'wrong'")
        assert gateway.chat("other")[1] == "blocked"
        got = []
        body = {"messages": [{"role": "user", "content": "slow"}], "stream": True}
        thread = threading.Thread(target=lambda: got.append(gateway.ask(body)))
        count = len(behind.seen)
        thread.start()
        while len(behind.seen) == count:
            time.sleep(0.01)
        assert gateway.end() == 0
        thread.join()
        assert got[0] is not None and got[0][3].endswith(b"data: [DONE]\n\n"), "the stream came to its end"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_start_that_fails_says_why_and_leaves_nothing(behind, tmp_path, workers):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'[server]\nport = 0\nworkers = {workers}\n[upstream]\nurl = "{behind.url}"\n[[guard]]\nuse = "{use("no_start")}"\n'
    )
    done = subprocess.run(
        [sys.executable, str(script), str(policy)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0 and "InputError" in done.stderr and "the weights are not there" in done.stderr


@pytest.mark.slow
def test_killed_in_the_middle_nothing_acknowledged_is_missing_from_the_audit_log(behind, tmp_path):
    log = tmp_path / "audit.jsonl"
    answered, lock = [], threading.Lock()
    for _ in range(3):
        with process(tmp_path, behind, f'[server]\nport = 0\n[audit]\npath = "{log}"\n') as gateway:
            stop = threading.Event()

            def ask(gateway=gateway, stop=stop):
                while not stop.is_set():
                    if (answer := gateway.chat("Hi")) is None:
                        return
                    with lock:
                        answered.append(answer[2])

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            count, end = len(answered), time.monotonic() + 60
            while len(answered) < count + 30 and time.monotonic() < end:
                time.sleep(0.01)
            gateway.process.kill()
            stop.set()
            for thread in threads:
                thread.join()
            gateway.process.wait()
            gateway.close()
    logged, torn = set(), 0
    for line in log.read_text().splitlines():
        try:
            logged.add(json.loads(line)["id"])
        except ValueError:
            torn += 1
    assert len(answered) >= 90 and len(set(answered)) == len(answered)
    assert set(answered) <= logged
    assert torn <= 3


@pytest.mark.slow
def test_killed_in_the_middle_no_label_that_was_acknowledged_is_forgotten(behind, tmp_path):
    """Two workers learn on one state; after SIGKILL a new gateway knows every label it said it had taken."""
    spec = f"aegis:experts={use('word')}+{use('severity')},state={tmp_path / 'state.sqlite'}"
    policy = (
        f'[server]\nport = 0\nworkers = 2\n[upstream]\nurl = "{behind.url}"\n[[guard]]\nuse = "{spec}"\non = "input"\n'
    )
    gateway = Process(tmp_path, policy)
    taken, lock = [], threading.Lock()

    def teach(number):
        for step in range(1000):
            question = {"messages": [{"role": "user", "content": f"{number} {step} " + "forbidden" * (step % 2)}]}
            answer = gateway.ask(question, verdicts=True)
            if answer is None:
                return
            label = gateway.ask({"id": answer[4], "label": step % 2}, "/v1/feedback")
            if label is None:
                return
            if label[0] == 200:
                with lock:
                    taken.append(answer[4])

    threads = [threading.Thread(target=teach, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while len(taken) < 40 and time.monotonic() < end:
        time.sleep(0.01)
    for pid in [gateway.process.pid, *workers_of(gateway.process.pid)]:
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    gateway.process.wait()
    gateway.close()
    assert len(taken) >= 40
    again = Process(tmp_path, policy)
    try:
        for id in taken:
            status, _, _, data, _ = again.ask({"id": id, "label": 1}, "/v1/feedback", verdicts=True)
            assert status == 409, (id, data)
    finally:
        again.end()


@pytest.mark.slow
def test_workers_share_the_port_count_together_and_start_again(behind, tmp_path):
    log = tmp_path / "audit.jsonl"
    with process(tmp_path, behind, f'[server]\nport = 0\nworkers = 2\n[audit]\npath = "{log}"\n') as gateway:
        before = workers_of(gateway.process.pid)
        assert len(before) == 2
        answers = [gateway.chat("Hi") for _ in range(40)]
        assert all(answer and answer[1] == "allowed" for answer in answers)
        assert len({answer[2][:12] for answer in answers}) == 2, "both took some"
        assert len(settled(gateway, 40)) == 2
        os.kill(before[0], signal.SIGKILL)
        gateway.wait(r"worker \d ended with code -9 and is started again")
        end = time.monotonic() + 60
        while len(workers_of(gateway.process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        answers += [answer for answer in (gateway.chat("Hi") for _ in range(40)) if answer]
        assert len(answers) == 80
        assert len(settled(gateway, 80)) == 2, "the new worker went on counting where the old one was"
        assert b"2 workers" in gateway.ask(None, "/")[3]
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait("policy taken on")
        pids = workers_of(gateway.process.pid)
        assert gateway.end() == 0
    assert len({json.loads(line)["id"] for line in log.read_text().splitlines()}) == 80
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_workers_end_with_their_supervisor_and_a_worker_that_stands_still_is_replaced(behind, tmp_path):
    more = "[server]\nport = 0\nworkers = 2\nstuck_seconds = 2.5\n"
    with process(tmp_path, behind, more) as gateway:
        pids = workers_of(gateway.process.pid)
        os.kill(pids[0], signal.SIGSTOP)
        gateway.wait(r"worker \d stood still for 2.5 s and is started again")
        end = time.monotonic() + 60
        while len(workers_of(gateway.process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        pids = workers_of(gateway.process.pid)
        gateway.process.kill()
        gateway.process.wait()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        gateway.close()


def test_check_loads_and_ends(behind, tmp_path, capsys):
    run_serve(upstream=behind.url, guards=[use("word")], check=True)
    assert "the policy is usable: guards word (both)" in capsys.readouterr().err
    with pytest.raises(InputError, match="does not load"):
        run_serve(upstream=behind.url, guards=[use("no_start")], check=True)
    assert read_policy(upstream=behind.url, guards=["refusal"], port=0).server.port == 0
