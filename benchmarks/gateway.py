"""The gateway beside bare proxies and peers: CPU a request of the proxy's processes, and the time it adds.

All arms in turn in each round, on loopback, before the same upstream, at concurrency 64: the upstream asked directly, a proxy that moves
bytes, an aiohttp pass-through, ours with a guard on input and output (`ours`: with `lamp`; `gateway`: with one that looks for a word), and
on request LiteLLM's proxy with a trivial guardrail of its own and the NeMo Guardrails server with its simplest rail. Every answer is
checked against its question. Ratios are medians over rounds.

    python benchmarks/gateway.py [--rounds 5] [--guard SPEC] [--peers litellm,nemo] [--json]
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy
from gateway_ends import Plan, load

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
PEERS = {"litellm": ["litellm[proxy]"], "nemo": ["nemoguardrails[server]", "langchain-openai"]}
GUARDRAIL = """
from litellm.integrations.custom_guardrail import CustomGuardrail

class Keyword(CustomGuardrail):
    async def async_pre_call_hook(self, user_api_key_dict, cache, data, call_type):
        for message in data.get("messages", []):
            if "forbidden" in str(message.get("content")):
                raise ValueError("withheld")
        return data

    async def async_post_call_success_hook(self, data, user_api_key_dict, response):
        for choice in response.choices:
            if "forbidden" in str(choice.message.content):
                raise ValueError("withheld")
"""
LITELLM = """
model_list:
  - model_name: mock
    litellm_params: {model: openai/mock, api_base: "%s", api_key: sk-x}
guardrails:
  - guardrail_name: keyword
    litellm_params: {guardrail: keyword_guardrail.Keyword, mode: [pre_call, post_call], default_on: true}
litellm_settings: {drop_params: true, telemetry: false}
"""
NEMO = """
models:
  - type: main
    engine: openai
    model: mock
    parameters: {base_url: "%s", api_key: sk-x}
rails:
  input: {flows: [check forbidden]}
"""
FLOW = """
define flow check forbidden
  $bad = execute is_forbidden
  if $bad
    stop
"""
ACTION = """
from nemoguardrails.actions import action

@action(is_system_action=True)
async def is_forbidden(context=None):
    return "forbidden" in str((context or {}).get("user_message"))
"""


class Process:
    """A server in a process of its own. port: where it listens; left out: what it prints says so, and `pattern` finds it there."""

    def __init__(self, words, *, port=None, pattern=rb"^(\d+)$", log=None, **more):
        output = {"stdout": log, "stderr": log} if port else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, **output, **more)
        self.port, said = port, b""
        while self.port is None:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"{words[:4]} did not start: {said.decode()}")
            said += line
            if found := re.search(pattern, line.strip()):
                self.port = int(found[1])

    def cpu(self):
        """CPU seconds, user and system, of the process and its children so far."""
        return sum(_cpu(pid) for pid in _family(self.process.pid))

    def memory(self):
        """Resident bytes of the process and its children."""
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in _family(self.process.pid))

    def end(self):
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


def _family(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(other for child in children for other in _family(int(child)))]


def _cpu(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def ends(pieces=8):
    """The upstream's process."""
    process = Process([sys.executable, str(HERE / "gateway_ends.py"), "upstream", str(pieces)])
    try:
        yield process
    finally:
        process.end()


def ours(url, folder, guard, **more):
    """Our gateway as anybody starts it; it says on standard error where it listens."""
    words = [sys.executable, "-m", "davylamp", "serve", "--upstream", url, "--guard", guard, "--port", "0"]
    return Process(words, pattern=rb"http://127\.0\.0\.1:(\d+)", cwd=folder, **more)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def peer(name, url, folder, environments):
    """A peer in an environment of its own, installed if it is not there."""
    home = environments / name
    if not (home / "done").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "-q", *PEERS[name]], check=True)
        (home / "done").touch()
    port = _free_port()
    if name == "litellm":
        (folder / "keyword_guardrail.py").write_text(GUARDRAIL, encoding="utf-8")
        (folder / "config.yaml").write_text(LITELLM % url, encoding="utf-8")
        words = [str(home / "bin" / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    else:
        config = folder / "config" / "mock"
        config.mkdir(parents=True)
        for file, text in (("config.yml", NEMO % url), ("rails.co", FLOW), ("actions.py", ACTION)):
            (config / file).write_text(text, encoding="utf-8")
        words = [str(home / "bin" / "nemoguardrails"), "server", "--config", "config", "--port", str(port)]
        words += ["--default-config-id", "mock"]
    settings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "sk-x"}
    settings |= {"LITELLM_MASTER_KEY": "sk-bench", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = (folder / f"{name}.log").open("wb")
    process = Process(words, port=port, cwd=folder, env={**environment, **settings}, log=log)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.process.poll() is None:
        with contextlib.suppress(OSError):
            if b"<1>" not in ask_once(port, "Hello <1>"):
                raise SystemExit(f"{name} does not pass an answer on")
            with contextlib.suppress(urllib.error.HTTPError):
                if b"<1>" in ask_once(port, "forbidden <1>"):
                    raise SystemExit(f"{name} does not use its guardrail")
            return process
        time.sleep(0.5)
    process.end()
    raise SystemExit(f"{name} did not start: {(folder / f'{name}.log').read_text()[-2000:]}")


def ask_once(port, text):
    body = {"model": "mock", "messages": [{"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return answer.read()


def measure(process, *, requests, concurrency=64, stream=False, **more):
    """CPU microseconds a request of the process, and the seconds of each request. Fails if an answer is missing or not its own."""
    before = process.cpu()
    start = time.perf_counter()
    plan = asyncio.run(load(process.port, Plan(requests=requests, stream=stream, **more), concurrency=concurrency))
    wall = time.perf_counter() - start
    if plan.counts["good"] != requests:
        raise SystemExit(f"port {process.port}: {dict(plan.counts)} of {requests}")
    return 1e6 * (process.cpu() - before) / requests, plan.seconds, requests / wall


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="a round and arm; peers get fewer")
    parser.add_argument("--pieces", type=int, default=8, help="writes that a streamed reply comes in")
    parser.add_argument("--guard", default="lamp:encoder=hashed", help="a spec, as davylamp serve takes it")
    parser.add_argument("--peers", default="", help="litellm,nemo: installed in environments of their own")
    parser.add_argument("--environments", type=Path, default=HERE.parent / "build" / "peers", help="where these lie")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    costs, rates = defaultdict(list), defaultdict(list)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        far = stack.enter_context(ends(args.pieces))
        url = f"http://127.0.0.1:{far.port}/v1"
        proxy = [sys.executable, str(HERE / "gateway_ends.py")]
        arms = {"direct": far, "bare": Process([*proxy, "bare", url]), "passthrough": Process([*proxy, "aiohttp", url])}
        stack.callback(lambda: [arm.end() for name, arm in arms.items() if name != "direct"])
        arms["ours"] = ours(url, folder, args.guard)
        arms["gateway"] = ours(url, folder, str(HERE / "word_guard.py"))
        for name in filter(None, args.peers.split(",")):
            arms[name] = peer(name, url, folder, args.environments)
        for arm in arms.values():
            measure(arm, requests=20, concurrency=4)
        for number in range(args.rounds):
            for stream in (False, True):
                for name, arm in arms.items():
                    requests = args.requests
                    if name in PEERS:  # slow and steady: two short rounds tell enough
                        if number > 1 or (stream and name == "nemo"):
                            continue
                        requests = 100
                    cost, _, rate = measure(arm, requests=requests, stream=stream)
                    costs[name, stream].append(cost)
                    rates[name, stream].append(rate)
        waits = defaultdict(list)  # at concurrency 8, in short turns so that all arms see the same machine
        for _ in range(max(args.rounds, 2) * 2):
            for name in ("direct", "passthrough", "gateway", "ours"):
                waits[name] += measure(arms[name], requests=400, concurrency=8)[1]

    def ratio(a, b, stream=False):
        return statistics.median(x / y for x, y in zip(costs[a, stream], costs[b, stream], strict=False))

    figures = {"ours_over_passthrough": ratio("ours", "passthrough")}
    figures["ours_over_passthrough_streaming"] = ratio("ours", "passthrough", True)
    figures["gateway_over_passthrough"] = ratio("gateway", "passthrough")
    figures["gateway_over_passthrough_streaming"] = ratio("gateway", "passthrough", True)
    figures["gateway_over_bare"] = ratio("gateway", "bare")
    for name in (name for name in PEERS if name in arms):
        figures[f"{name}_over_ours"] = ratio(name, "ours")
        figures[f"{name}_over_gateway"] = ratio(name, "gateway")
        if (name, True) in costs:
            figures[f"{name}_over_ours_streaming"] = ratio(name, "ours", True)
    for name in ("ours", "gateway", "passthrough"):
        for percent in (50, 99):
            added = numpy.percentile(waits[name], percent) - numpy.percentile(waits["direct"], percent)
            figures[f"{'' if name == 'ours' else name + '_'}added_p{percent}_ms"] = added * 1e3
    for (name, stream), values in costs.items():
        if name != "direct":
            figures[f"{name}{'_streaming' * stream}_cpu_us"] = statistics.median(values)
    for (name, stream), values in rates.items():
        figures[f"{name}{'_streaming' * stream}_per_s"] = statistics.median(values)
    figures = {name: round(float(value), 3 if value < 100 else 0) for name, value in figures.items()}
    if args.json:
        print(json.dumps({"figures": figures}))
    else:
        print(f"guard {args.guard} on input and output, median of {args.rounds} rounds of {args.requests} requests\n")
        print("\n".join(f"| {name} | {value:,} |" for name, value in figures.items()))


if __name__ == "__main__":
    main()
