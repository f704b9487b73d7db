"""sample.py --serve speaks OpenAI's protocol, and bad or slow clients harm nobody."""
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

import sample
from chatlm import ChatLM, ChatLMConfig
from sample import ChatServer, GenerationConfig
from tokenizer import FIRST_CHAR, Tokenizer

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "今天天气很好"}]


@functools.cache
def make_model() -> tuple[ChatLM, Tokenizer]:
    """A model with random weights whose answer has several characters and no bytes."""
    tokenizer = Tokenizer.train(["今天天气很好，明天也很好。"] * 20, 300)
    config = ChatLMConfig.preset("demo", vocab_size=len(tokenizer), tie_word_embeddings=False)
    for seed in range(100):
        torch.manual_seed(seed)
        model = ChatLM(config).eval()
        with torch.no_grad():
            model.lm_head.weight[:FIRST_CHAR] = 0  # the other logits are random, some above 0
            model.lm_head.weight[FIRST_CHAR:] *= 3
        text = sample.answer(model, tokenizer, [QUESTION[0]["content"]], max_new_tokens=12)[0]
        if len(set(text)) > 3 and text.count(text[3:5]) == 1:
            return model, tokenizer
    raise AssertionError("no seed gives such an answer")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    model, tokenizer = make_model()
    options = vars(GenerationConfig(max_new_tokens=12, min_new_tokens=12))
    server = ChatServer(("127.0.0.1", 0), model, tokenizer, "tiny", 64, options, None)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: ChatServer, path: str = "") -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


def client(server: ChatServer, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=url(server, "/v1"), api_key=key, max_retries=0, timeout=60)


def expected(server: ChatServer) -> str:
    return sample.answer(server.model, server.tokenizer, [QUESTION[0]["content"]], 1, 64,
                         **server.options)[0]


def post(server: ChatServer, body: bytes, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url(server, "/v1/chat/completions"), body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_the_openai_client_gets_whole_answers_and_streams(server):
    chat, text = client(server).chat.completions, expected(server)
    assert [m.id for m in client(server).models.list()] == ["tiny"]
    assert client(server).models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 别的, only tiny"):
        client(server).models.retrieve("别的")
    whole = chat.create(model="tiny", messages=QUESTION)
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "length"
    prompt_tokens = len(server.tokenizer.encode(QUESTION[0]["content"]))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 12)
    events = list(chat.create(model="tiny", messages=QUESTION, stream=True,
                              stream_options={"include_usage": True}))
    parts = [e.choices[0].delta.content for e in events if e.choices]
    assert "".join(p or "" for p in parts) == text and len([p for p in parts if p]) > 1
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.total_tokens == prompt_tokens + 12


def test_options_of_a_request(server):
    chat, text = client(server).chat.completions, expected(server)
    several = chat.create(model="tiny", messages=QUESTION, n=3, temperature=1.5, max_tokens=8)
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert len({c.message.content for c in several.choices}) > 1
    stop = text[3:5]
    for stream in (False, True):
        found = chat.create(model="tiny", messages=QUESTION, stop=[stop, "没有"], stream=stream)
        if stream:
            said = "".join(e.choices[0].delta.content or "" for e in found)
        else:
            said = found.choices[0].message.content
            assert found.choices[0].finish_reason == "stop"
        assert said == text[:text.index(stop)]
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert chat.create(model="tiny", messages=parts).choices[0].message.content == text


@pytest.mark.parametrize(("body", "message"), [
    (b"{", "not JSON"), (b"[]", "not a JSON object"), (b"{}", "messages"), (b"[" * 9999, "not JSON"),
    (b'{"messages": [{"role": "user"}]}', "no text"), (b'{"messages": [1]}', "messages"),
    (b'{"messages": [{"content": "a"}], "n": 0}', "n must be"),
    (b'{"messages": [{"content": "a"}], "n": true}', "n must be"),
    (b'{"messages": [{"content": "a"}], "stop": [1]}', "stop"),
    (b'{"messages": [{"content": "a"}], "temperature": "hot"}', "temperature"),
    (b'{"messages": [{"content": "a"}], "top_p": 2}', "top_p"),
    (b'{"messages": [{"content": "a"}], "max_tokens": -1}', "max_tokens"),
    (b'{"messages": [{"content": "a"}], "max_tokens": "8"}', "max_tokens"),
    (b'{"messages": [{"content": "a"}], "max_completion_tokens": [8]}', "max_tokens"),
    (b'{"messages": [{"content": "a"}], "max_completion_tokens": null, "max_tokens": 0}', "max_tokens"),
    (b'{"messages": [{"content": "a"}], "temperature": NaN}', "temperature"),
    (b'{"messages": [1, {"content": "a"}]}', "messages")])
def test_a_bad_request_is_answered_with_what_is_wrong(server, body, message):
    status, answer = post(server, body)
    assert status == 400 and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert post(server, json.dumps({"messages": QUESTION}).encode())[0] == 200


def test_other_paths_large_bodies_and_keys(server):
    for path, status in (("/health", 200), ("/", 200), ("/v1/models", 200), ("/nothing", 404)):
        try:
            found = urllib.request.urlopen(url(server, path), timeout=60).status
        except urllib.error.HTTPError as e:
            found = e.code
        assert found == status, path
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as s:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
        assert b" 413 " in s.recv(1000)
    assert post(server, b'{"stream": "true", "messages": [{"role": "user", "content": "a"}]}')[0] == 400
    asked = urllib.request.Request(url(server, "/v1/chat/completions?api-version=1"), json.dumps({"messages": QUESTION}).encode())
    assert urllib.request.urlopen(asked, timeout=60).status == 200
    server.api_key = "密钥"
    status, _ = post(server, json.dumps({"messages": QUESTION}).encode(), Authorization="Bearer 密钥".encode().decode("latin-1"))
    assert status == 200
    server.api_key = "secret"
    with pytest.raises(openai.AuthenticationError):
        client(server, "wrong").chat.completions.create(model="tiny", messages=QUESTION)
    assert client(server, "secret").chat.completions.create(model="tiny", messages=QUESTION)


def test_a_client_is_noticed_with_more_open_files_than_select_can_take(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400:
        pytest.skip("too few files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    files = []
    try:
        with open(os.devnull) as null:
            files = [os.dup(null.fileno()) for _ in range(1100)]
        assert client(server).chat.completions.create(model="tiny", messages=QUESTION).choices[0].message.content
    finally:
        for number in files:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_ipv6_address(server):
    try:
        other = ChatServer(("::1", 0), server.model, server.tokenizer, "tiny", 64, server.options, None)
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=other.serve_forever, args=[0.02], daemon=True).start()
    assert urllib.request.urlopen(f"http://[::1]:{other.server_port}/health", timeout=60).status == 200
    other.shutdown()
    other.server_close()


def test_a_client_that_leaves_stops_its_answer(server, monkeypatch):
    decoded = []
    steps = sample.steps

    def counted(*args):
        for ids in steps(*args):
            decoded.append(1)
            time.sleep(0.02)
            yield ids

    monkeypatch.setattr(sample, "steps", counted)
    server.options |= {"max_new_tokens": 400, "min_new_tokens": 400}
    for stream in (True, False):
        decoded.clear()
        body = json.dumps({"messages": QUESTION, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                      + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while len(decoded) < 3:
                time.sleep(0.01)
        for _ in range(500):
            if not server.lock.locked():
                break
            time.sleep(0.01)
        assert not server.lock.locked() and len(decoded) < 300


def test_an_error_while_decoding_is_told_in_both_forms(server, monkeypatch):
    def broken(*args):
        yield torch.full((1, 2), FIRST_CHAR)
        raise ValueError("no token is left")

    monkeypatch.setattr(sample, "steps", broken)
    chat = client(server).chat.completions
    with pytest.raises(openai.InternalServerError, match="no token is left"):
        chat.create(model="tiny", messages=QUESTION)
    with pytest.raises(openai.APIError, match="no token is left"):
        list(chat.create(model="tiny", messages=QUESTION, stream=True))
    assert not server.lock.locked()


def test_too_many_requests_are_told_to_come_back(server, monkeypatch):
    monkeypatch.setattr(server, "room", threading.BoundedSemaphore(1))
    server.room.acquire()
    request = urllib.request.Request(url(server, "/v1/chat/completions"),
                                     json.dumps({"messages": QUESTION}).encode())
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(request, timeout=60)
    assert e.value.code == 503 and e.value.headers["Retry-After"] == "5"


def test_many_clients_and_half_open_connections(server):
    text = expected(server)
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(20)]
    for s in idle[:10]:
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
    body = json.dumps({"messages": QUESTION}).encode()

    def ask(_) -> str:
        for _ in range(500):
            status, found = post(server, body)
            if status == 200:
                return found["choices"][0]["message"]["content"]
            assert status == 503  # come back later
            time.sleep(0.1)
        return ""

    peaks_kb = []
    with ThreadPoolExecutor(50) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(50))) == [text] * 50
            peaks_kb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    for s in idle:
        s.close()
    assert peaks_kb[2] - peaks_kb[0] < 20_000, peaks_kb  # memory does not grow with requests
    assert client(server).chat.completions.create(model="tiny", messages=QUESTION)


def test_the_command_serves_and_ends_with_ctrl_c(tmp_path):
    model, tokenizer = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(tmp_path), "--serve"]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        address = process.stdout.readline().split("/ ")[0]
        assert json.loads(urllib.request.urlopen(address + "/health", timeout=60).read())
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
    done = subprocess.run([*command, "0", "--host", "0.0.0.0"], capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.returncode == 2 and "set --api_key" in done.stderr


@pytest.mark.quick
def test_text_before_a_stop():
    for parts in (["今天天", "气很好"], list("今天天气很好"), ["今天天气很好"]):
        assert "".join(sample.until_stop(parts, ["天气", "很"])) == "今天"
        assert "".join(sample.until_stop(parts, ["没有", "好了"])) == "今天天气很好"
        assert "".join(sample.until_stop(parts, [])) == "今天天气很好"


def test_multiple_choice_by_letter_and_by_text(tmp_path, monkeypatch, capsys):
    """A model that always prefers B, and short words; as C-Eval and CMMLU publish questions."""
    model, tokenizer = make_model()
    (tmp_path / "a_val.csv").write_text(
        "id,question,A,B,C,D,answer\n0,问,一,二,三,四,B\n1,问,一,二,三,四,A\n", "utf-8")
    (tmp_path / "b.csv").write_text(",Question,A,B,C,D,Answer\n0,问,1,2,3,4,B\n", "utf-8")
    files = sample.Rows(tmp_path).files

    def logps(model, tokenizer, prompts, responses, max_len):
        if responses[:4] == list("ABCD"):
            assert all("A. " in prompt and prompt.endswith("答案：") for prompt in prompts)
        return [1.0 if response in ("B", "一", "1") else 0.0 for response in responses]

    monkeypatch.setattr(sample, "response_logps", logps)
    result = sample.score_subjects(model, tokenizer, files, 64, 8)
    assert result == {"subjects": 2, "accuracy_letter": 0.75, "accuracy_text": 0.25,
                      "chance": 0.25}
    shown = capsys.readouterr().out
    assert "50.0 %   50.0 %  a_val" in shown and "chance: 25.0 %" in shown
    for wrong in ("E", "AB"):
        (tmp_path / "b.csv").write_text(f"question,A,B,C,D,answer\n问,1,2,3,4,{wrong}\n", "utf-8")
        with pytest.raises(ValueError, match=rf"b\.csv, row 1: answer '{wrong}' is not A, B, C or D"):
            sample.score_subjects(model, tokenizer, files, 64, 8)


def test_log_probabilities_of_responses_are_the_models_losses():
    model, tokenizer = make_model()
    prompts, responses = ["今天", "明天也好"], ["天气", "好", "很好", "也"]
    found = sample.response_logps(model, tokenizer, prompts, responses, 64)
    for i, response in enumerate(responses):
        ids, mask = sample.to_batch(tokenizer, [prompts[i // 2]], 64, "cpu")
        labels, _ = sample.to_batch(tokenizer, [response], 64, "cpu")
        with torch.no_grad():
            logits, _ = model(ids, mask, labels=labels)
        logps = logits.log_softmax(-1)[0].gather(1, labels[0][:, None])[:-1].sum()
        assert found[i] == pytest.approx(float(logps), rel=1e-4)


class Browser:
    """Headless Chromium, driven by chromedriver's WebDriver protocol (W3C): JSON over HTTP."""

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL)
        self.root, flags = f"http://127.0.0.1:{port}/session", [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder}"]
        for _ in range(100):
            try:
                options = {"goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")}}
                made = self.send("", {"capabilities": {"alwaysMatch": options}})
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(0.1)
        self.root += "/" + made["sessionId"]

    def send(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())["value"]

    def run(self, script: str):
        """What a script on the page returns."""
        return self.send("/execute/sync", {"script": script, "args": []})

    def find(self, selector: str) -> str:
        (path,) = self.send("/element", {"using": "css selector", "value": selector}).values()
        return f"/element/{path}"

    def wait(self, script: str):
        """Wait until a script returns something true."""
        for _ in range(300):
            if found := self.run(script):
                return found
            time.sleep(0.1)
        raise AssertionError(f"still false: {script}; the page says {self.run('return document.body.innerText')}")

    def close(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self.root, method="DELETE"), timeout=60)
        self.driver.terminate()
        self.driver.wait(20)


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")),
                    reason="needs Chromium and its driver")
def test_the_page_in_a_browser(server, tmp_path, monkeypatch):
    """A question is typed, its answer streams, a second one is stopped; nothing else is loaded. The
    page sends what the model can see."""
    browser, asked, server.turns = Browser(tmp_path), [], 2
    join = sample.with_history
    monkeypatch.setattr(sample, "with_history",
                        lambda tokenizer, texts, *rest: asked.append(texts) or join(tokenizer, texts, *rest))
    steps, pause = sample.steps, 0.0

    def slow_steps(*args):
        for row in steps(*args):
            time.sleep(pause)
            yield row

    monkeypatch.setattr(sample, "steps", slow_steps)
    try:
        browser.send("/url", {"url": url(server, "/")})
        assert "最近 2 个问题" in browser.run("return document.body.innerText")
        answers = "[...document.querySelectorAll('#log pre')].map(p => p.textContent)"
        browser.send(browser.find("#text") + "/value", {"text": QUESTION[0]["content"]})
        browser.send(browser.find("#go") + "/click", {})
        browser.wait(f"return !running && {answers}.length == 2")
        assert browser.run(f"return {answers}") == ["> " + QUESTION[0]["content"], expected(server)]

        server.options = server.options | {"max_new_tokens": 2000, "min_new_tokens": 2000}
        pause = 0.05  # 100 seconds in all: the answer cannot end before it is stopped
        browser.send(browser.find("#text") + "/value", {"text": "第二个问题\n"})  # Enter sends it
        browser.wait(f"return running && {answers}.length == 4 && {answers}[3].length > 5")
        assert browser.run("return go.textContent") == "停止"
        browser.send(browser.find("#go") + "/click", {})
        browser.wait(f"return !running && {answers}.at(-1) == '（已停止）'")
        length = browser.run(f"return {answers}[3].length")
        with server.lock:  # free again: the answer was cancelled
            assert browser.run(f"return {answers}[3].length") == length
        server.options, pause = server.options | {"max_new_tokens": 12, "min_new_tokens": 12}, 0.0
        browser.send(browser.find("#text") + "/value", {"text": "第三个问题\n"})
        browser.wait(f"return !running && {answers}.length == 7")
        first, stopped = expected(server), browser.run(f"return {answers}[3]")
        question = QUESTION[0]["content"]
        assert asked == [[question], [question, first, "第二个问题"], ["第二个问题", stopped, "第三个问题"]]
        loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert {address.removeprefix(url(server)) for address in loaded} <= {"/v1/chat/completions", "/favicon.ico"}
    finally:
        browser.close()


@pytest.mark.parametrize(("field", "value"), [
    ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}), ("logprobs", True),
    ("frequency_penalty", 1.0), ("logit_bias", {"1": 5}), ("num_beams", 4), ("seed", "x"),
    ("messages", [{"role": "tool", "content": "a"}]), ("messages", [{"role": "assistant", "content": "a"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])], ids=str)
def test_fields_that_would_change_the_answer_are_refused(server, field, value):
    status, answer = post(server, json.dumps({"messages": QUESTION, field: value}).encode())
    assert status == 400 and ("not supported" in answer["error"]["message"] or field[:4] in answer["error"]["message"]
                              or "is an answer" in answer["error"]["message"])


def test_fields_without_effect_pass_and_a_seed_repeats(server):
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False, "frequency_penalty": 0, "user": "u", "functions": None,
               "num_beams": 1, "best_of": 1, "top_k": -1, "skip_special_tokens": True, "verbosity": "medium"}
    body = {"messages": QUESTION, **neutral}
    assert post(server, json.dumps(body).encode())[1]["choices"][0]["message"]["content"] == expected(server)
    chat = client(server).chat.completions
    said = [chat.create(model="tiny", messages=QUESTION, temperature=2.0, seed=seed).choices[0].message.content for seed in (5, 6, 5, 7)]
    assert said[0] == said[2] and len(set(said)) > 1
    free = []
    for _ in range(4):  # a seed is for its own request
        chat.create(model="tiny", messages=QUESTION, temperature=2.0, seed=5)
        free.append(chat.create(model="tiny", messages=QUESTION, temperature=2.0).choices[0].message.content)
    assert len(set(free)) > 1
    assert post(server, json.dumps({"messages": [{"role": "system", "content": QUESTION[0]["content"]}]}).encode())[0] == 200
    only = chat.create(model="tiny", messages=QUESTION, temperature=2.0, extra_body={"top_k": 1})
    assert only.choices[0].message.content == expected(server)


def test_a_message_that_is_too_long_is_refused(server):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="and the server takes 64") as error:
            client(server).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "今" * 300}], stream=stream)
        assert error.value.code == "context_length_exceeded"


def test_a_stop_in_the_last_token_is_a_stop(server):
    text, chat = expected(server), client(server).chat.completions
    for n in range(1, 12):
        ids = server.tokenizer.encode(text)[:n]
        seen = server.tokenizer.decode(ids)
        if seen and text.startswith(seen):
            found = chat.create(model="tiny", messages=QUESTION, stop=[seen[-1]], max_tokens=n).choices[0]
            assert found.finish_reason == "stop", n


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("HEAD", "/", 200), ("HEAD", "/health", 200), ("OPTIONS", "/v1/chat/completions", 200),
    ("PUT", "/", 405), ("GET", "/nothing", 404), ("GET", "/v1/modelsx", 404), ("POST", "/nothing", 404), ("BREW", "/nothing", 404)])
def test_methods_and_paths(server, method, path, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as s:
        s.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: s.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert (b"Allow: POST" in head) == (path.endswith("completions"))
    if status >= 400:
        assert json.loads(body)["error"]["message"]
    if method == "HEAD":
        assert not body and b"Content-Length: 0" not in head


def test_bodies_that_are_not_read_are_not_the_next_request(server):
    for head in ("GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd",
                 "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n4\r\nabcd\r\n",
                 "GARBAGE\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as s:
            s.sendall(head.encode() + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            found = b"".join(iter(lambda: s.recv(1 << 16), b""))
        assert found.count(b'"error"') + found.count(b'"status"') == 1 and b"<html" not in found.lower(), found


@pytest.mark.quick
def test_the_length_of_a_body_is_one_number(server):
    """Otherwise the rest of a body could be taken for another request."""
    for lengths in ("Content-Length: 2\r\nContent-Length: 39", "Content-Length: 0_2", "Content-Length: +2"):
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as s:
            s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{lengths}\r\n\r\n{{}}GET /health HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            said = b""
            while part := s.recv(9999):
                said += part
        assert said.startswith(b"HTTP/1.1 400") and said.count(b"HTTP/1.1") == 1, said
