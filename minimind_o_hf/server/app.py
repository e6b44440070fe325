"""The server's application: its routes, and who may ask for what."""

import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind_o_hf.modeling import MiniMindOForConditionalGeneration
from minimind_o_hf.processing import MiniMindOProcessor
from minimind_o_hf.voices import Voice

from . import chat_completions, realtime, speech
from .service import ApiError, Service, new_id
from .settings import ServerSettings

PAGE = Path(__file__).parent / "page"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
KEY_PROTOCOL = "openai-insecure-api-key."
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; "
    "media-src 'self' blob:; worker-src 'self' blob:; style-src 'self'; script-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(self)",
    "Cross-Origin-Resource-Policy": "same-origin",
}
logger = logging.getLogger("minimind_o_hf.server")


class Guard:
    """
    Looks at every request before anything else does: where it comes from, its key, its size, and how many there were.

    A page of another site can have a browser send requests here: they are refused by their `Origin`, and requests to
    other names than this server's by their `Host`.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, service: Service):
        self.app, self.settings, self.service = app, settings, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            self.service.metrics.refused.labels(str(error.status)).inc()
            await _refuse(scope, receive, send_with_headers, error)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, self._limited(receive), send_with_headers)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.service.metrics.requests.labels(path, str(status)).inc()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        settings, path = self.settings, scope["path"]
        host = headers.get("host", "")
        if settings.is_local and _name(host) not in (*LOCAL_NAMES, settings.host, *settings.host_names):
            raise ApiError("This server has another name.", 421)
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host and (scope["type"] == "websocket" or scope["method"] != "GET"):
            raise ApiError("Pages of other sites cannot use this server.", 403)
        if not (path.startswith("/v1/") or path == "/metrics"):
            return
        if settings.api_key and not hmac.compare_digest(_key(headers).encode(), settings.api_key.encode()):
            raise ApiError("Show the server's API key (Authorization: Bearer KEY).", 401, "invalid_api_key")
        client = scope.get("client") or ("", 0)
        if wait := self.service.limit.take(client[0]):
            raise ApiError(f"Too many requests: wait {wait:.0f} s.", 429, "rate_limit_exceeded")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body:
            raise _too_large(settings.max_body)

    def _limited(self, receive: Receive) -> Receive:
        """The body, as long as it is not too long: its stated length may be wrong or missing."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self.settings.max_body:
                    # FastAPI lets this one through where it reads a body, and turns others into a 400.
                    raise HTTPException(413, _too_large(self.settings.max_body).message)
            return message

        return limited


def _too_large(limit: int) -> ApiError:
    return ApiError(f"A request can have {limit} bytes at most.", 413, "request_too_large")


def _name(host: str) -> str:
    """A `Host` header without its port."""
    return host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _key(headers: dict[str, str]) -> str:
    """What a client shows: browsers cannot give a websocket other headers than its protocols."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    protocols = (part.strip() for part in headers.get("sec-websocket-protocol", "").split(","))
    return next((part[len(KEY_PROTOCOL) :] for part in protocols if part.startswith(KEY_PROTOCOL)), "")


def _response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "2"} if error.status in (429, 503) else {}
    return JSONResponse({"error": error.body}, error.status, headers=headers)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    if scope["type"] == "http":
        await _response(error)(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        body = json.dumps({"error": error.body}).encode()
        start = {"status": error.status, "headers": [(b"content-type", b"application/json")]}
        await send({"type": "websocket.http.response.start", **start})
        await send({"type": "websocket.http.response.body", "body": body})
    else:
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})


def create_app(
    model: MiniMindOForConditionalGeneration,
    processor: MiniMindOProcessor,
    settings: ServerSettings | None = None,
    described: Mapping[str, Voice] | None = None,
) -> FastAPI:
    """
    Makes the application that `minimind-o serve` runs.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`MiniMindOProcessor`]): Its processor, with a codec.
        settings ([`ServerSettings`], *optional*): The limits; the defaults listen on this machine alone.
        described (`dict`, *optional*): The checkpoint's voices as [`Voice`]s, which say whose they are.

    Returns:
        `FastAPI`: `app.state.service` holds the [`Service`]. Its engine runs while the application does.

    Raises:
        ValueError: The checkpoint has no codec; settings that cannot be.
    """
    settings = settings or ServerSettings()
    service = Service(model, processor, settings, described)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(title="MiniMind-O", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings, service=service)
    app.include_router(chat_completions.router)
    app.include_router(speech.router)
    app.include_router(realtime.router)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return _response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return _response(ApiError(f"{field or 'The body'}: {first['msg']}.", param=field or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = "request_too_large" if error.status_code == 413 else None
        return _response(ApiError(str(error.detail), error.status_code, code))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # What went wrong stays here: clients get a number to ask after.
        number = new_id("error")
        logger.error("%s: %s %s", number, request.method, request.url.path, exc_info=error)
        response = _response(ApiError(f"The server failed ({number}).", 500, "server_error"))
        response.headers.update(HEADERS)  # it is sent from outside of the guard
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        if name != settings.model_name:
            raise ApiError(f"There is no model {name!r:.100}: there is {settings.model_name}.", 404, "model_not_found")
        return _model(service)

    @app.get("/health")
    async def health() -> Response:
        """Whether the process answers at all."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether answers can be asked for."""
        is_ready = service.engine.is_alive
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    if (PAGE / "index.html").is_file():

        @app.get("/")
        async def index() -> Response:
            return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

        app.mount("/page", _Page(directory=PAGE), name="page")
    return app


class _Page(StaticFiles):
    """The page's files. A browser asks for changes each time: modules of two versions do not fit each other."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "minimind_o_hf",
    }


__all__ = ["create_app"]
