"""Post JSON to a server and read JSON from it, with errors that tell what came and hide secrets."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ppo_fast.rewards.calls import CallError, TryAgain

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 16 * 2**20
"""Max size of an answer."""
READ_OF_ERRORS, SHOWN = 10_000, 200
"""Bytes that are read of an answer with an error, and characters of it that are shown."""
TRIED_AGAIN = {408, 425, 429}
"""Statuses below 500 after which a request is tried again."""
SCHEMES = {"apikey", "basic", "bearer", "digest", "key", "token"}
"""Words of headers that are no secrets."""
SHORT = 3
"""Max characters of secrets that are hidden only where they are whole words."""


class Refused(CallError):
    """An answer that is not the expected one; ``status`` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(TryAgain):
    """An answer of a server that may give another one later."""

    def __init__(self, message: str, status: int, after: float | None) -> None:
        super().__init__(message, after)
        self.status = status


class Endpoint:
    """A URL that JSON is posted to.

    Redirects are not followed. An answer has at most 16 MiB.

    Args:
        who: the reward, for errors.
        url: http or https; errors show it without its query.
        headers: more headers of the requests. Their values are in no error.

    Raises:
        ModuleNotFoundError: httpx is not installed.
        ValueError: the URL or a header cannot be used.
    """

    def __init__(self, who: str, url: str, headers: Mapping[str, str] | None = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{who} needs httpx, which is not installed: pip install 'ppo_fast[http]'"
            ) from error
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"{who}: the URL cannot be read ({error})") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(
                f"{who}: got the URL of scheme {parsed.scheme!r} and host {parsed.host!r}, "
                "expected one like http://localhost:8000/score"
            )
        if parsed.userinfo:
            raise ValueError(
                f"{who}: the URL of {parsed.host} has a user name or password, which httpx logs; "
                "give them as a header, headers={'Authorization': ...}"
            )
        self.url, self.shown = url, str(parsed.copy_with(query=None, fragment=None))
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        for name, value in (headers or {}).items():
            _check_header(who, name, value)
            self._headers[name] = value
        self._secrets = _pattern_of_secrets((headers or {}).values())

    def client(self) -> httpx.AsyncClient:
        """Return a client for one batch of requests, to be closed after it.

        What has no end here has one in the time limit of a try.
        """
        import httpx

        return httpx.AsyncClient(
            headers=self._headers,
            verify=_ssl_context(),
            timeout=None,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def post(self, client: httpx.AsyncClient, body: bytes, expected: str) -> Any:
        """Return the JSON of the answer.

        Raises:
            TryAgain: no connection, or a status of 408, 425, 429, 500 or above.
            Refused: another status than 200, or an answer that is too long or no JSON.
        """
        import httpx

        try:
            async with client.stream("POST", self.url, content=body) as response:
                ok = response.status_code == 200
                text = await self._read(response, MAX_BYTES if ok else READ_OF_ERRORS)
        except httpx.HTTPError as error:
            text = self.hidden(f"{type(error).__name__}: {error}")
            if isinstance(error, httpx.TransportError):
                raise TryAgain(f"{text}; is the server running?") from None
            raise CallError(text) from None
        if not ok:
            self._raise_for_status(response, text, expected)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self.refused(text, expected) from None

    def refused(self, answer: Any, expected: str) -> Refused:
        """Return the error for an answer of status 200 that is not ``expected``."""
        return Refused(f"answered 200 with {self.excerpt(answer)}, expected {expected}", 200)

    def excerpt(self, answer: Any) -> str:
        """Return the beginning of an answer in one line, without secrets."""
        text = answer if isinstance(answer, str) else repr(answer)
        text = self.hidden(text[:READ_OF_ERRORS])
        return repr(text[:SHOWN] + ("..." if len(text) > SHOWN else ""))

    def hidden(self, text: str) -> str:
        """Return ``text`` without the headers' values, escaped as in JSON or not."""
        return text if self._secrets is None else self._secrets.sub("***", text)

    async def _read(self, response: httpx.Response, limit: int) -> str:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > limit:
                if response.status_code != 200:
                    break
                raise Refused(f"answered more than {limit >> 20} MiB", response.status_code)
        return body[:limit].decode("utf-8", "replace")

    def _raise_for_status(self, response: httpx.Response, text: str, expected: str) -> None:
        status = response.status_code
        said = f"answered {status} {self.hidden(response.reason_phrase)}".rstrip()
        if 300 <= status < 400:
            to = self.excerpt(response.headers.get("location", ""))
            raise Refused(f"{said} to {to}; redirects are not followed: give the final URL", status)
        message = f"{said} with {self.excerpt(text)}, expected 200 with {expected}"
        if status >= 500 or status in TRIED_AGAIN:
            after = _seconds(response.headers.get("retry-after"))
            raise Unavailable(message, status, after)
        raise Refused(message, status)


@cache
def _ssl_context() -> ssl.SSLContext:
    """Return the context of all clients: reading the certificates takes tens of milliseconds."""
    import httpx

    return httpx.create_ssl_context()


def is_private(url: str) -> bool:
    """Return whether a URL is encrypted (https) or leads to this machine."""
    try:
        parsed = urlsplit(url)
        host = parsed.hostname or ""
    except ValueError:
        return False
    if parsed.scheme == "https" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _pattern_of_secrets(values: Iterable[str]) -> re.Pattern[str] | None:
    """Return what finds headers' values and the words in them; None: there are none."""
    words = {w for v in values for w in (v, *v.split(), *re.split(r"[\s;,=]+", v))}
    words = {word for word in words if word and word.lower() not in SCHEMES}
    patterns = []
    for word in sorted(words, key=len, reverse=True):
        pattern = _escaped_or_not(word)
        whole = len(word) <= SHORT
        patterns.append(rf"(?<![^\W_]){pattern}(?![^\W_])" if whole else pattern)
    return re.compile("|".join(patterns)) if patterns else None


def _escaped_or_not(secret: str) -> str:
    """Return a pattern of a text that finds it with backslashes before its characters too.

    JSON and Python write ``\\"`` for a quote, some servers ``\\/`` or ``\\u002B``. Each part of the
    pattern begins with a character of its own, so that the time is linear.
    """
    parts = []
    for i, part in enumerate(re.findall(r"\\+|[^\\]", secret)):
        code = f"(?i:u{ord(part[0]):04x})"
        if part[0] == "\\":
            parts.append(rf"(?:\\{code}?)+")
        elif i and parts[-1].endswith(")+"):  # its backslashes are read
            parts.append(rf"(?:{re.escape(part)}|{code})")
        else:
            parts.append(rf"\\*(?:{re.escape(part)}|(?<=\\){code})")
    return "".join(parts).removeprefix(r"\\*")


def _check_header(who: str, name: str, value: Any) -> None:
    """Refuse what is no header here: the errors of libraries below would show its value."""
    if not (isinstance(value, str) and value.isascii() and value.isprintable() and value.strip()):
        raise ValueError(
            f"{who}: the header {name!r} has a value that HTTP does not allow: expected printable "
            "ASCII characters, without line breaks"
        )
    if value != value.strip() or not (isinstance(name, str) and name.isascii() and name.strip()):
        raise ValueError(f"{who}: the header {name!r} has spaces around its value, or a bad name")


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
