"""The image server: OpenAI's images API, a part of A1111's, a page to draw on, health and figures."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from fewstep import __version__
from fewstep.serve import api, reference, shim
from fewstep.serve.door import AsciiJSON, Door, answer, knows, of_http, of_validation
from fewstep.serve.queue import LONGEST_WAIT_S, Hand, Line
from fewstep.serve.service import Refusal, Service, Settings
from fewstep.serve.workers import Draws, InProcess

PAGE = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
MOST_CONNECTIONS, OTHER_FILES = 4096, 128
HERE = Path(__file__).parent


def app(models: Mapping[str, Draws | Sequence[Hand]], settings: Settings | None = None) -> FastAPI:
    """A server of some models, as an ASGI application; its lifespan opens and ends them.

    Args:
        models: by the name that requests use; the first is the default. An engine draws in a thread of this process; a list of
            `workers.Process` in as many processes.
        settings: limits and the key.

    Raises:
        ValueError: no model, or a name that is no name.
    """
    settings = settings or Settings()
    if not models:
        raise ValueError("a server needs a model: give one")
    for name in models:
        if not name or not name.isprintable() or len(name) > 200 or "/" in name:
            raise ValueError(f"model name {name[:80]!r}: give 1 to 200 letters without /")
    service = Service({}, settings)
    for name, model in models.items():
        hands = list(model) if isinstance(model, Sequence) else [InProcess(model)]
        told = partial(service.figures.batch_done, name)
        wait_s = settings.batch_wait_ms / 1000
        service.lines[name] = Line(name, hands, bound=settings.queue, batch=settings.batch, wait_s=wait_s, on_batch=told)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await start(made)
        yield
        for line in service.lines.values():
            await line.close()

    made = FastAPI(
        title="fewstep serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        default_response_class=AsciiJSON,
    )
    made.state.service, made.state.chosen = service, None
    made.include_router(api.router)
    made.include_router(shim.router)
    _own_routes(made)
    _errors(made)
    _describe(made, settings)
    made.add_middleware(Door, service=service)
    return made


async def start(made: FastAPI) -> None:
    """Open the models of a server, all at once; the lifespan does it too, but cannot say so well what is wrong.

    Raises:
        ValueError: a model that cannot be opened.
    """
    service: Service = made.state.service
    opening = [asyncio.ensure_future(line.start()) for line in service.lines.values()]
    try:
        await asyncio.gather(*opening)
    except BaseException:
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        await asyncio.gather(*(line.close() for line in service.lines.values()))
        raise


def listener(
    made: FastAPI, host: str, port: int, keep_alive_s: int = LONGEST_WAIT_S + 10, forwarded: str = ""
) -> uvicorn.Server:
    """What serves an application at an address, quietly.

    Addresses of clients are those of their connections; `forwarded` names proxies, by comma, that are believed about theirs
    (X-Forwarded-For). Above `_connections` a request is answered 503 and its connection closed.

    A connection is kept for longer than a client may be told to wait: one that is closed just as it is used again breaks the
    request on it.
    """
    return uvicorn.Server(
        uvicorn.Config(
            made,
            host,
            port,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=4096,
            proxy_headers=bool(forwarded),
            forwarded_allow_ips=forwarded or None,
            limit_concurrency=_connections(),
            timeout_keep_alive=keep_alive_s,
            timeout_graceful_shutdown=5,
        )
    )


def _connections() -> int:
    """How many there may be: less than this process may open files."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, allowed - OTHER_FILES))


def _own_routes(made: FastAPI) -> None:
    files = {name: (HERE / name).read_bytes() for name in PAGE}

    def serve(name: str) -> Response:
        return Response(files[name], media_type=PAGE[name], headers={"Cache-Control": "no-cache"})

    @made.get("/", include_in_schema=False)
    async def page() -> Response:
        return serve("page.html")

    @made.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return serve("page.css")

    @made.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return serve("page.js")

    @made.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @made.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return HTMLResponse(reference.page(made.openapi(), str(request.base_url)))

    @made.get("/healthz", summary="Whether every model has a worker that can draw")
    async def health(request: Request) -> JSONResponse:
        service = api.service_of(request)
        lines, ready = service.lines, service.ready()
        models: dict[str, dict[str, Any]] = {
            name: {"alive": line.alive(), "waiting": line.depth, "restarts": line.restarts} for name, line in lines.items()
        }
        if knows(service.settings, request.headers.get("authorization", "")):  # the reason may name folders
            for name, line in lines.items():
                models[name] |= {"broken": line.broken} if line.broken else {}
        return AsciiJSON({"status": "ready" if ready else "starting", "models": models}, 200 if ready else 503)

    @made.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics(request: Request) -> Response:
        service = api.service_of(request)
        return Response(service.figures.text(service.lines), media_type="text/plain; version=0.0.4")


def _describe(made: FastAPI, settings: Settings) -> None:
    """The description's bound of images is this server's own."""
    described = made.openapi

    def openapi() -> dict[str, Any]:
        found = described()
        schemas = found["components"]["schemas"]
        for name, field in (("ImageRequest", "n"), ("Txt2Img", "batch_size"), ("Txt2Img", "n_iter")):
            schemas[name]["properties"][field]["anyOf"][0]["maximum"] = settings.max_n
        return found

    made.openapi = openapi  # type: ignore[method-assign]


def _errors(made: FastAPI) -> None:
    service: Service = made.state.service

    def said(request: Request, refused: Refusal) -> JSONResponse:
        service.figures.errors.labels(refused.code).inc()
        return answer(refused, request.url.path)

    @made.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> JSONResponse:
        return said(request, error)

    @made.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        return said(request, of_validation(error))

    @made.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return said(request, of_http(error))

    @made.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return said(request, Refusal(500, "the server failed; its log says why", "server_error"))
