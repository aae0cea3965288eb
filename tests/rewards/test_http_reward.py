"""HTTPReward against a server on 127.0.0.1: scores, errors, tries and limits."""

from __future__ import annotations

import builtins
import email.utils
import logging
import socket
import threading
import time

import numpy as np
import pytest
from local_server import Answer, local_server
from tiny_trainer import one_line

pytest.importorskip("httpx")

from ppo_fast.rewards import calls
from ppo_fast.rewards.endpoint import MAX_BYTES, _seconds
from ppo_fast.rewards.http import HTTPReward

PROMPTS = ["The film", "She", "Nothing in this room"]
COMPLETIONS = [" was over", " thought", " was"]
KEY = "sk-secret-0123456789"
QUICK = {"backoff": 0.0, "retries": 2}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def lengths(body):
    return {"scores": [len(text) for text in body["completions"]]}


def in_turn(*answers):
    """Give one answer after the other, and the last one again and again."""
    rest = list(answers)
    return lambda body: rest.pop(0) if len(rest) > 1 else rest[0]


def failure(answer, error=RuntimeError, **options):
    """The message of what is raised, and the server."""
    with local_server(answer) as server:
        reward = HTTPReward(f"{server.url}/score?token={KEY}", **(QUICK | options))
        with pytest.raises(error) as caught:
            reward(PROMPTS, COMPLETIONS)
    assert one_line(caught)
    text = str(caught.value)
    assert text.startswith(f"HTTPReward('{server.url}/score') failed for 3 response(s), the first")
    assert KEY not in text
    return text, server


def test_one_request_for_a_batch():
    with local_server(lengths) as server:
        reward = HTTPReward(f"{server.url}/score", headers={"X-Team": "blue"})
        assert reward(PROMPTS, COMPLETIONS, unused=[1, 2, 3]) == [9.0, 8.0, 4.0]
        assert reward(PROMPTS[:1], COMPLETIONS[:1]) == [9.0]
        assert reward([], []) == []
    assert server.bodies[0] == {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert server.headers[0]["x-team"] == "blue"
    assert server.headers[0]["content-type"] == "application/json"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("form", [lambda s: s, lambda s: {"scores": s}, lambda s: {"rewards": s}])
def test_forms_of_an_answer(form):
    with local_server(lambda body: form([1, None, -2.5])) as server:
        assert HTTPReward(server.url)(PROMPTS, COMPLETIONS) == [1.0, None, -2.5]


def test_parts_of_a_batch_keep_their_order_and_the_bound():
    def slow_first(body):
        time.sleep(0.05 if body["completions"][0] == "a" else 0.01)
        return lengths(body)

    texts = ["a", "bb", "ccc", "dddd", "eeeee", "f", "gg"]
    with local_server(slow_first) as server:
        reward = HTTPReward(server.url, batch_size=1, max_in_flight=3)
        assert reward(texts, texts) == [1, 2, 3, 4, 5, 1, 2]
        assert server.most == 3
        server.most = 0
        assert HTTPReward(server.url, batch_size=3)(texts, texts) == [1, 2, 3, 4, 5, 1, 2]
    assert sorted(len(body["prompts"]) for body in server.bodies[-3:]) == [1, 3, 3]


def test_columns_are_sent():
    with local_server(lambda body: [float(a) for a in body["answer"]]) as server:
        reward = HTTPReward(server.url, columns=["answer", "messages"], batch_size=2)
        assert reward.needs == ("answer", "messages")
        chats = [[{"role": "user", "content": p}] for p in PROMPTS]
        columns = {"answer": [np.float32(1), np.int64(2), 3], "messages": chats, "more": [0]}
        assert reward(PROMPTS, COMPLETIONS, **columns) == [1.0, 2.0, 3.0]
        bodies = sorted(server.bodies, key=lambda body: -len(body["prompts"]))
        assert bodies[0]["messages"] == chats[:2]
        assert "more" not in bodies[0]
        with pytest.raises(ValueError, match="HTTPReward: got no column 'answer'"):
            reward(PROMPTS, COMPLETIONS, messages=chats)
        with pytest.raises(ValueError, match="column 'answer' cannot be written as JSON") as caught:
            reward(PROMPTS, COMPLETIONS, answer=[object()] * 3, messages=chats)
        assert one_line(caught)
        with pytest.raises(ValueError, match="column 'answer' cannot be written as JSON"):
            reward(PROMPTS, COMPLETIONS, answer=[float("nan")] * 3, messages=chats)


def test_any_text_arrives_as_it_is():
    texts = ["\0", "\ud800", "\u202eabc", '"}', "é\n\u2028"]
    with local_server(lengths) as server:
        assert HTTPReward(server.url)(texts, texts) == [1, 1, 4, 2, 3]
    assert server.bodies[0]["completions"] == texts


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        reward = HTTPReward(f"http://127.0.0.1:{port}", **QUICK)
        for call in (lambda: reward(PROMPTS, COMPLETIONS), reward.check):
            with pytest.raises(RuntimeError, match=r"after 3 tries: ConnectError.*running\?") as e:
                call()
            assert one_line(e)


def test_a_server_that_is_slow():
    gone = threading.Event()
    text, server = failure(lambda body: gone.wait(0.5) and [], TimeoutError, timeout=0.05)
    gone.set()
    assert text.endswith("after 3 tries: no answer in 0.05 s")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_server_that_recovers(status):
    answers = in_turn(Answer("busy", status), Answer("busy", status), [1, 2, 3])
    with local_server(answers) as server:
        assert HTTPReward(server.url, **QUICK)(PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]
    assert len(server.bodies) == 3


def test_a_server_that_stays_busy():
    text, server = failure(lambda body: Answer("try later", 503))
    assert "after 3 tries: answered 503 Service Unavailable with '\"try later\"', expected" in text
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 204])
def test_refusals_are_not_tried_again(status):
    text, server = failure(lambda body: Answer({"detail": "no\nkey"}, status))
    assert f"after 1 try: answered {status} " in text
    assert 'expected 200 with {"scores": [...]} with a number a response' in text
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>not here</html>", "'<html>not here</html>', expected {\"scores\": [...]}"),
        (b"", "answered 200 with '', expected"),
        (b"\xff\x00\x1b[31m", r"\x00\x1b[31m"),
        (b"[" * 10**5, "expected {"),
        (b"1" * 5000, "expected {"),
        ({"score": [1, 2, 3]}, "{'score': [1, 2, 3]}"),
        ({"scores": 3}, "{'scores': 3}"),
        ([1, 2], "expected 3 scores, not 2"),
        ([1, 2, 3, 4], "expected 3 scores, not 4"),
        ([1, "2", 3], "expected finite numbers, or null"),
        ([1, True, 3], "expected finite numbers, or null"),
        (b"[1, NaN, 3]", "expected finite numbers, or null"),
        (b"[1, 1e999, 3]", "expected finite numbers, or null"),
        (b"[1, 1" + b"0" * 400 + b", 3]", "expected finite numbers, or null"),
    ],
)
def test_answers_that_are_none(body, expected):
    text, server = failure(lambda _: Answer(body))
    assert expected in text
    assert len(text) < 600
    assert len(server.bodies) == 1


def test_an_answer_without_end():
    text, _ = failure(lambda _: Answer(b" " * (MAX_BYTES + 1)))
    assert "answered more than 16 MiB" in text
    text, _ = failure(lambda _: Answer(b"x" * 10**6, 400))
    assert len(text) < 600


def test_redirects_are_not_followed():
    with local_server(lengths) as other:
        text, server = failure(lambda _: Answer("", 307, {"Location": f"{other.url}/elsewhere"}))
    assert f"answered 307 Temporary Redirect to '{other.url}/elsewhere'; redirects are" in text
    assert len(server.bodies) == 1
    assert other.bodies == []


def test_retry_after_is_heeded(monkeypatch):
    waits = []
    real = calls.Limits.seconds
    monkeypatch.setattr(
        calls.Limits, "seconds", lambda *a: waits.append(real(*a)) or waits[-1] / 1000
    )
    answers = in_turn(
        Answer("", 429, {"Retry-After": "7"}), Answer("", 503, {"Retry-After": "9999"}), [1, 2, 3]
    )
    with local_server(answers) as server:
        assert HTTPReward(server.url)(PROMPTS, COMPLETIONS) == [1.0, 2.0, 3.0]
    assert waits == [7.0, 60.0]


def test_values_of_retry_after():
    assert _seconds("3") == 3.0
    assert _seconds(email.utils.formatdate(time.time() + 100, usegmt=True)) == pytest.approx(
        99, 0.1
    )
    for value in (None, "", "soon", "-3", "nan", "inf", "0", "Wed, 99 Foo 2026 99:00:00 GMT"):
        assert _seconds(value) is None
    assert _seconds(email.utils.formatdate(0, usegmt=True)) is None


def test_secrets_are_in_no_error_repr_or_log(caplog):
    headers = {"Authorization": f"Bearer {KEY}", "X-Key": KEY[::-1]}
    echo = Answer({"you sent": [f"Bearer {KEY}", KEY[::-1]]}, 401)
    caplog.set_level(logging.DEBUG)
    with local_server(lambda body: echo) as server:
        reward = HTTPReward(server.url, headers=headers, **QUICK)
        with pytest.raises(RuntimeError) as caught:
            reward(PROMPTS, COMPLETIONS)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    shown = [repr(reward), caplog.text]
    error = caught.value
    while error is not None:
        shown.append(repr(error))
        error = error.__cause__ or error.__context__
    assert "answered 401" in shown[2]
    for text in shown:
        assert KEY not in text
        assert KEY[::-1] not in text


@pytest.mark.parametrize("value", [f"{KEY}\n", f"a\r\nb: {KEY}", f"é{KEY}", f" {KEY}", "", 3])
def test_headers_that_http_does_not_allow(value):
    with pytest.raises(ValueError, match="HTTPReward: the header 'X-Key'") as caught:
        HTTPReward("http://127.0.0.1", headers={"X-Key": value})
    assert KEY not in str(caught.value)
    assert one_line(caught)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/x", "http://", "", "http://a:b", 3])
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match=r"HTTPReward: (got )?the URL") as caught:
        HTTPReward(url)
    assert one_line(caught)


def test_other_arguments_that_are_refused():
    with pytest.raises(ValueError, match="user name or password") as caught:
        HTTPReward(f"http://me:{KEY}@host/x")
    assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        HTTPReward("http://host", batch_size=0)
    with pytest.raises(ValueError, match="columns: got the text 'answer', expected a list"):
        HTTPReward("http://host", columns="answer")
    with pytest.raises(ValueError, match="timeout: got -1"):
        HTTPReward("http://host", timeout=-1)


def test_check_asks_for_one_score(caplog):
    with local_server(lengths) as server:
        HTTPReward(server.url, columns=["answer"]).check()
    assert server.bodies == [{"prompts": ["Hello"], "completions": [" world"], "answer": ["0"]}]
    with local_server(lambda body: Answer("bad answer", 422)) as server:
        HTTPReward(server.url, columns=["answer"], **QUICK).check()
        (record,) = caplog.records
        assert "answered 422" in record.getMessage()
        with pytest.raises(RuntimeError, match="answered 422"):
            HTTPReward(server.url, **QUICK).check()
    with (
        local_server(lambda body: Answer("who are you", 401)) as server,
        pytest.raises(RuntimeError, match="answered 401"),
    ):
        HTTPReward(server.url, columns=["answer"]).check()


def test_httpx_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "httpx":
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"HTTPReward needs httpx.*'ppo_fast\[http\]'"):
        HTTPReward("http://127.0.0.1")
