"""The process that serves: binds a socket, keeps the index fresh in the background, tells where it is."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cairn.device import computes
from cairn.errors import CairnError, InputError
from cairn.registry.index import Index
from cairn.registry.web import guard
from cairn.registry.web.app import REFRESH, Freshness, create_app


@computes
def serve(
    folders: Iterable[str | Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8420,
    token: str | None = None,
    index: str | Path | None = None,
    refresh: float = REFRESH,
    device: Any = None,
    ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Index the folders and serve the pages until interrupted, looking for what is new every `refresh` seconds.

    On another host than the loopback a token is needed: the one given, or one that is drawn and told to `ready` with the address.
    `device` is where the prompt box computes, as `cairn.device.choose`.
    """
    _run(list(folders), host=host, port=port, token=token, index=index, refresh=refresh, device=device, ready=ready)


def _run(
    folders: Sequence[str | Path],
    *,
    host: str,
    port: int,
    token: str | None,
    index: str | Path | None,
    refresh: float,
    device: Any,
    ready: Callable[[str], object],
) -> None:
    """Index, bind, serve. Raises `InputError` where the port is taken or the host is none of this machine's."""
    try:
        import uvicorn
    except ImportError:
        raise InputError("The pages need the extra 'serve': pip install 'cairn-lm[serve]'.") from None
    loopback = host in guard.LOOPBACK
    token = guard.checked_token(token)
    if not loopback and token is None:
        token = secrets.token_urlsafe(24)  # an empty token, as a failed command gives, is none
    with Index(index) as opened:
        for folder in folders:
            opened.add(folder)
        if not folders:
            opened.refresh()
    bound = _bind(host, port)
    any_name = host in ("0.0.0.0", "::", "")
    freshness = Freshness()
    app = create_app(index, hosts=None if any_name else {*(guard.LOOPBACK if loopback else ()), host}, token=token, freshness=freshness, device=device)
    shown = f"[{host}]" if ":" in host else "localhost" if any_name else host
    address = f"http://{shown}:{bound.getsockname()[1]}/{f'?token={token}' if token else ''}"
    stop = threading.Event()
    keeper = threading.Thread(target=_keep_fresh, args=(index, refresh, stop, freshness), daemon=True)
    keeper.start()
    ready(address)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)).run(sockets=[bound])
    finally:
        stop.set()
        keeper.join(timeout=10)
        bound.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"{host}:{port} cannot be used: {error.strerror or error}; choose another one with --port (0: any that is free).") from None
    return bound


def _keep_fresh(index: str | Path | None, every: float, stop: threading.Event, freshness: Freshness) -> None:
    """Look through the folders again and again. A look that fails is said on every page, and the next one is made all the same."""
    while not stop.wait(every):
        try:
            with Index(index) as opened:
                opened.refresh()
            freshness.seen()
        except Exception as error:  # nothing that lies in a folder may end the looking
            freshness.problem = str(error) if isinstance(error, CairnError) else f"{type(error).__name__}: {error}"
