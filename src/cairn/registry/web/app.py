"""The application: an address for each page, errors as pages, one process for all of it."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from cairn.device import using
from cairn.errors import CairnError, InputError, NotFoundError
from cairn.registry.index import Index, default_path
from cairn.registry.web import guard, pages, words

STATIC = {"cairn.css": "text/css", "cairn.js": "text/javascript", "cairn.svg": "image/svg+xml"}
REFRESH = 5.0
"""Seconds between two looks through the folders."""


@dataclass
class Freshness:
    """Whether the pages show what lies in the folders: what went wrong at the last look, and when the last one went well."""

    problem: str = ""
    since: float = field(default_factory=time.time)

    def seen(self) -> None:
        """The folders were looked through."""
        self.problem, self.since = "", time.time()

    def sentence(self) -> str:
        """What a page says above all else; empty where there is nothing to say."""
        return f"These pages show how it was at {words.when(self.since)} UTC: {self.problem}" if self.problem else ""


def create_app(
    index: str | Path | None = None,
    *,
    hosts: Iterable[str] | None = guard.LOOPBACK,
    token: str | None = None,
    freshness: Freshness | None = None,
    device: Any = None,
) -> Any:
    """The pages of an index as an ASGI application. Raises `InputError` where the extra `serve` is not installed."""
    try:
        import jinja2
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError:
        raise InputError("The pages need the extra 'serve': pip install 'cairn-lm[serve]'.") from None
    desk = _Desk(Path(index) if index is not None else default_path(), _templates(jinja2), freshness or Freshness(), device)
    asked: dict[str, Callable[[Index, Any], Any]] = {
        "/": lambda index, _: ("overview.html", pages.overview(index)),
        "/runs": lambda index, _: ("runs.html", pages.runs(index)),
        "/run/{key}": lambda index, request: ("run.html", pages.run(index, _key(request))),
        "/run/{key}/live": lambda index, request: ("live.html", pages.live(index, _key(request))),
        "/checkpoints": lambda index, request: ("checkpoints.html", pages.checkpoints(index, request.query_params.get("q", ""))),
        "/checkpoint/{key}": lambda index, request: ("checkpoint.html", pages.checkpoint(index, _key(request))),
        "/checkpoint/{key}/card": lambda index, request: ("card.html", pages.card_of(index, _key(request))),
        "/checkpoint/{key}/risks": lambda index, request: ("risks.html", pages.risks_of(index, _key(request))),
        "/lineage/{key}": lambda index, request: ("lineage.html", pages.lineage(index, _key(request))),
        "/compare": lambda index, request: ("compare.html", pages.comparison(index, _keys(request), "weights" in request.query_params)),
    }
    routes = [Route(path, desk.page(make), methods=["GET"]) for path, make in asked.items()]
    routes += [Route("/checkpoint/{key}/generate", desk.generate, methods=["POST"]), Route("/static/{name}", desk.static, methods=["GET"])]
    app = Starlette(routes=routes, exception_handlers={404: desk.not_found, 405: desk.not_found})
    return guard.Guard(app, hosts=None if hosts is None else {host.lower() for host in hosts}, token=token)


def _key(request: Any) -> str:
    return str(request.path_params["key"])


def _keys(request: Any) -> list[str]:
    keys = list(dict.fromkeys(request.query_params.getlist("c")))
    if not 2 <= len(keys) <= 6:
        raise InputError("Choose two to six checkpoints to compare.")
    return keys


class _Desk:
    """Answers requests: opens the index for each, renders, turns errors into pages."""

    def __init__(self, index: Path, templates: Any, freshness: Freshness, device: Any) -> None:
        self.index, self.templates, self.freshness, self.device = index, templates, freshness, device
        self.form_token = guard.form_token()
        self.writing = threading.Lock()

    def page(self, make: Callable[[Index, Any], tuple[str, pages.Values]]) -> Any:
        def answer(request: Any) -> Any:
            return self._answer(request, lambda index: make(index, request))

        return answer

    async def generate(self, request: Any) -> Any:
        """The prompt box: one model writes at a time."""
        from starlette.concurrency import run_in_threadpool

        form = await request.form(max_fields=20, max_files=0)

        def field(name: str) -> str:
            value = form.get(name)
            return value if isinstance(value, str) else ""

        def write(index: Index) -> tuple[str, pages.Values]:
            key = _key(request)
            if not secrets.compare_digest(field("form").encode(), self.form_token.encode()):
                raise _Forbidden("This form was not written by this page; open the checkpoint's page again.")
            try:
                with self.writing, using(self.device):
                    written = pages.generate(index, key, field)
            except InputError as error:
                written = {"prompt": field("prompt"), "text": None, "refused": str(error), "chat": bool(field("chat"))}
            asked = {name: field(name) for name in ("new_tokens", "temperature", "seed")}
            return "checkpoint.html", {**pages.checkpoint(index, key), "written": written, "asked": asked}

        return await run_in_threadpool(lambda: self._answer(request, write))

    def static(self, request: Any) -> Any:
        from starlette.responses import Response

        name = request.path_params["name"]
        if name not in STATIC:
            return self._error(404, "There is no such file.")
        data = resources.files("cairn.registry.web").joinpath("static", name).read_bytes()
        return _cached(request, Response(data, media_type=STATIC[name]), data)

    def not_found(self, request: Any, error: Any) -> Any:
        return self._error(error.status_code, "There is no such page.")

    def _answer(self, request: Any, make: Callable[[Index], tuple[str, pages.Values]]) -> Any:
        from starlette.responses import HTMLResponse

        try:
            with Index(self.index, readonly=True) as index:
                name, values = make(index)
                text = self.templates.get_template(name).render(**values, form_token=self.form_token, path=request.url.path, stale=self.freshness.sentence())
        except NotFoundError as error:
            return self._error(404, str(error))
        except _Forbidden as error:
            return self._error(403, str(error))
        except CairnError as error:
            return self._error(400, str(error))
        except (sqlite3.Error, UnicodeError, OverflowError) as error:
            # What an index cannot be asked: characters that are none, numbers beyond its own.
            return self._error(400, f"This cannot be asked for ({type(error).__name__}).")
        return _cached(request, HTMLResponse(text), text.encode())

    def _error(self, status: int, sentence: str) -> Any:
        from starlette.responses import HTMLResponse

        return HTMLResponse(
            self.templates.get_template("error.html").render(status=status, sentence=sentence, path="", stale=self.freshness.sentence()), status_code=status
        )


class _Forbidden(CairnError):
    """A form that was not ours."""


def _cached(request: Any, response: Any, data: bytes) -> Any:
    """The same page twice is told in one line, so that polling costs little."""
    from starlette.responses import Response

    mark = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    if request.headers.get("if-none-match") == mark:
        return Response(status_code=304, headers={"etag": mark, "cache-control": "no-cache"})
    response.headers["etag"] = mark
    response.headers["cache-control"] = "no-cache"
    return response


def _templates(jinja2: Any) -> Any:
    from cairn.registry.web import charts

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cairn.registry.web"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": words.number,
        "size": words.size,
        "short": words.short,
        "when": words.when,
        "plain": words.plain,
        "spark": charts.sparkline,
    }
    environment.globals["written"] = None
    environment.globals["asked"] = {"new_tokens": "64", "temperature": "0.8", "seed": "0"}
    return environment
