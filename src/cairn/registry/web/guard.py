"""Who may ask for what: the host that is named, where a form was sent from, the token, and what a page may load.

A page on the loopback can be reached by every page that the same browser shows. So a foreign name that resolves to this machine is
refused by its Host header, a form sent from elsewhere by its Origin, and pages are told to load nothing but what lies here.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from cairn.errors import InputError

COOKIE = "cairn-token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_FORM = 64 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,256}")

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer a browser says of our own forms, too, that they come from nowhere
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Wraps an application; whatever may not pass is answered here, in one sentence."""

    def __init__(self, app: Any, *, hosts: Collection[str] | None, token: str | None) -> None:
        """`hosts` are the names by which it may be asked (None: any, only with a token); `token` must be shown where one is set.

        Raises `InputError` where anybody could ask without one.
        """
        self.app, self.hosts, self.token = app, hosts, checked_token(token)
        if self.token is None and (hosts is None or not set(hosts) <= set(LOOPBACK)):
            raise InputError("Pages that others on the network can reach need a token.")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        if self.token is not None and not _same(_cookie(headers).get(COOKIE), self.token):
            await self._admit(scope, headers, send, receive)
            return
        await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        host = host_of(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return 421, "This page is not known under that name."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "Only GET and POST are answered."
        if scope["method"] != "POST":
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "This form was sent from another site."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return 403, "This form was sent from another site."
        if headers.get("content-type", "").split(";")[0].strip() != "application/x-www-form-urlencoded":
            return 415, "Only forms are taken."
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > LARGEST_FORM:
            return 413, f"A form has at most {LARGEST_FORM} bytes and says how many."
        return None

    async def _admit(self, scope: Any, headers: dict[str, str], send: Any, receive: Any) -> None:
        """The token comes once in the address, or as a bearer; a browser then keeps it in a cookie that scripts cannot read."""
        bearer = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if _same(bearer, self.token):
            await self.app(scope, receive, _with_headers(send))
            return
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = next((value for name, value in asked if name == "token"), "")
        if scope["method"] == "GET" and _same(shown, self.token):
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            rest = urlencode([(name, value) for name, value in asked if name != "token"])
            await _answer(send, 303, "", {"location": own_path(scope["path"]) + (f"?{rest}" if rest else ""), "set-cookie": cookie})
            return
        await _answer(send, 401, "Open the address with the token that `cairn serve` printed.")


def checked_token(token: str | None) -> str | None:
    """A token as it can be held against a visitor's; an empty one is none. Raises `InputError` for one that is guessed or does not fit an address."""
    token = (token or "").strip()
    if not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise InputError("A token has 8 to 256 letters, digits, '-', '_', '.' and '~'; without --token the server makes one.")
    return token


def own_path(path: str) -> str:
    """A path of this server to redirect to: two slashes at its beginning, or a backslash, would name another host."""
    return "/" + quote(path.lstrip("/\\"), safe="/")


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def form_token() -> str:
    """A secret that every form of this process carries, so that nobody else can write one."""
    return secrets.token_urlsafe(24)


def _same(given: str | None, wanted: str | None) -> bool:
    return given is not None and wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def _cookie(headers: dict[str, str]) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in there)]
        await send(message)

    return sending


async def _answer(send: Any, status: int, sentence: str, more: dict[str, str] | None = None) -> None:
    headers = {**HEADERS, "content-type": "text/plain; charset=utf-8", **(more or {})}
    await send({"type": "http.response.start", "status": status, "headers": [(n.encode(), v.encode("latin-1", "replace")) for n, v in headers.items()]})
    await send({"type": "http.response.body", "body": sentence.encode()})
