"""A study's server: personal links, pairs, answers. Pages are made here and work without scripts; htmx only makes them smooth.

There are no accounts and no cookies: who holds a link is the annotator. Every form carries a token that was made for it, so no
other page can send one. Answers are idempotent, everything is in the database when it is acknowledged, and a server that was
killed goes on where it stood.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

try:
    from fastapi import Depends, FastAPI, Form, Path, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, RedirectResponse, Response
except ImportError as error:
    raise ValueError("serving a study needs FastAPI: pip install 'fewstep[web]'") from error

from sqlalchemy.exc import SQLAlchemyError

from fewstep import __version__
from fewstep.study import ballots, database, links, store
from fewstep.study.ballots import Turned
from fewstep.study.leases import Now
from fewstep.study.limits import DAY, Addresses, Guard, Limiter, Limits
from fewstep.study.pages import STATIC, Pages
from fewstep.study.store import Store

MOST = 2**31 - 1  # of numbers in forms: what every database keeps
IMAGE = re.compile(r"[0-9a-f]{32}")
RELOAD = "Please reload this page and go on."
WORDS = {404: "There is no such page here.", 405: "This page cannot be used so.", 422: f"Something is missing. {RELOAD}"}
KEPT = {"Cache-Control": "private, max-age=86400, immutable"}  # by the browser: an image's name stands for its content

Number = Annotated[int, Form(ge=1, le=MOST)]
Token = Annotated[str, Form(alias="form", min_length=1, max_length=64)]
Viewport = Annotated[Literal["phone", "tablet", "desktop", "unknown"], Form()]
Reference = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]
Link = Annotated[str, Path(min_length=1, max_length=200)]
FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"text/html": {}}}
    for code, text in {
        403: "not allowed", 404: "not here", 409: "out of order", 413: "too large", 422: "malformed", 429: "too often",
    }.items()
}  # fmt: skip


class Desk:
    """What requests of one server share: pages, limits, and who a link belongs to."""

    def __init__(self, study: Store, limits: Limits) -> None:
        self.study, self.pages = study, Pages(study)
        self.answers = Limiter(limits.answers, limits.answers_at_once)
        self.views = Limiter(limits.pages, limits.pages_at_once)
        self.strangers = Limiter(limits.strangers, limits.strangers_at_once)
        self.addresses = Addresses()

    def known(self, request: Request, token: str, limiter: Limiter) -> int:
        """Number of the annotator whose link this is.

        Raises:
            Turned: 403 for a link that does not hold; 429 for one that comes too often, or an address that tries many.
        """
        ballots.tidy(self.study)
        try:
            claim = links.read(self.study.secret, token, self.study.clock())
        except links.Refused as error:
            self.stranger(request)
            raise Turned(403, str(error)) from error
        self.wait(limiter, str(claim.annotator))
        return claim.annotator

    def stranger(self, request: Request) -> None:
        """Count a request of somebody without a link."""
        self.wait(self.strangers, self.addresses.key(request.client.host if request.client else ""))

    def wait(self, limiter: Limiter, key: str) -> None:
        """Raises Turned, 429, where something is asked too often."""
        seconds = limiter.take(key)
        if seconds:
            raise Turned(429, "That was very fast. Please wait a moment and try again.", math.ceil(seconds))

    def own(self, who: int, purpose: str, form: str) -> None:
        """Raises Turned, 403, for a form that was not made for this annotator and purpose."""
        if not links.form_is_own(self.study.secret, who, purpose, form):
            raise Turned(403, f"This form is not one of yours. {RELOAD}")

    def answer(self, request: Request, who: int, token: str, now: Now) -> Response:
        """What follows a form: the next part for htmx, and the whole page by its address for a browser without scripts."""
        if request.headers.get("hx-request"):
            return HTMLResponse(self.pages.stage(who, token, now, whole=False))
        return RedirectResponse(f"/s/{token}", 303)


def reader(request: Request, token: Link) -> int:
    """Whose page it is."""
    desk: Desk = request.app.state.desk
    return desk.known(request, token, desk.views)


def writer(request: Request, token: Link) -> int:
    """Whose form it is."""
    desk: Desk = request.app.state.desk
    return desk.known(request, token, desk.answers)


Reader = Annotated[int, Depends(reader)]
Writer = Annotated[int, Depends(writer)]


def app(study: Store, *, open_to_all: bool = False, link_days: float = 30.0, limits: Limits | None = None) -> FastAPI:
    """The server's application.

    Args:
        study: to serve.
        open_to_all: whether `/join` makes a link for whoever asks; it takes PROLIFIC_PID, STUDY_ID and SESSION_ID.
        link_days: how long such a link holds.
        limits: how often one may ask.

    Raises:
        ValueError: a study that cannot be served, such as an imported one, or days out of range.
    """
    links.mac(study.secret, "check", "")
    links.check_days(link_days, "--link-days")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        study.owed.set()  # a server that was killed may have left something in the log
        yield
        database.fold(study.engine)  # whoever copies the file of a stopped study has every vote
        study.engine.dispose()

    desk = Desk(study, limits or Limits())
    made = FastAPI(
        title="fewstep study", version=__version__, openapi_url=None, docs_url=None, redoc_url=None,
        default_response_class=HTMLResponse, lifespan=lifespan,
    )  # fmt: skip
    made.state.desk = desk
    made.mount("/static", StaticFiles(directory=STATIC), name="static")
    _failures(made, desk)
    _public(made, desk, open_to_all, link_days)
    _personal(made, desk)
    _heads(made, open_to_all)
    made.add_middleware(Guard)
    return made


def _failures(made: FastAPI, desk: Desk) -> None:
    """Whatever goes wrong ends in a page, or a part of one, that says what to do."""

    def say(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        part = bool(request.headers.get("hx-request"))
        token = str(request.path_params.get("token", ""))
        token = token if links.TOKEN.fullmatch(token) else ""
        heading = {404: "Not found", 429: "One moment"}.get(status, "That did not work")
        return HTMLResponse(desk.pages.notice(heading, message, not part, token), status, headers)

    @made.exception_handler(Turned)
    def turned(request: Request, error: Turned) -> Response:
        return say(request, error.status, str(error), {"Retry-After": str(error.after)} if error.after else None)

    @made.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        where = next((e["loc"] for e in error.errors() if e["loc"][0] == "query"), None)
        unfilled = f"{where[1]} in the address is empty, or was not filled in by the service that sent you." if where else ""
        return say(request, 422, unfilled or WORDS[422])

    @made.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> Response:
        return say(request, error.status_code, WORDS.get(error.status_code, "This cannot be read."), dict(error.headers or {}))

    @made.exception_handler(SQLAlchemyError)
    def database(request: Request, error: SQLAlchemyError) -> Response:
        message = "The study's database cannot be reached just now. Your answer will be sent again; nothing of it is lost."
        return say(request, 503, message, {"Retry-After": "3"})


def _public(made: FastAPI, desk: Desk, open_to_all: bool, link_days: float) -> None:
    """Pages without a link."""
    study = desk.study

    def link(who: int) -> Response:
        token = links.sign(study.secret, who, int(study.clock() + link_days * DAY))
        return RedirectResponse(f"/s/{token}", 303)

    def invited(request: Request) -> None:
        if not open_to_all:
            raise Turned(403, "This study is by invitation: please open the personal link that you were sent.")
        desk.stranger(request)

    @made.get("/", responses=FAILURES)
    def root() -> Response:
        """Who comes without a link is told that one is needed."""
        message = "This study is taken part in by a personal link. Please open the one that you were sent."
        return HTMLResponse(desk.pages.notice(str(study.protocol["title"]), message, True))

    @made.get("/health", responses=FAILURES)
    def health() -> Response:
        """Whether the server and its database answer."""
        ballots.tidy(study)
        with database.reading(study.engine) as connection:
            connection.exec_driver_sql("SELECT 1")
        return Response('{"ok": true}', media_type="application/json")

    @made.get("/join", responses=FAILURES, dependencies=[Depends(invited)])
    def join(PROLIFIC_PID: Reference = None, STUDY_ID: Reference = None, SESSION_ID: Reference = None) -> Response:  # noqa: N803
        """A personal link for who comes from a recruiting service; the same person gets the same place."""
        if PROLIFIC_PID is None:
            return HTMLResponse(desk.pages.join(links.form_token(study.secret, 0, "join")))
        return link(ballots.enrol(study, PROLIFIC_PID, STUDY_ID, SESSION_ID))

    @made.post("/join", responses=FAILURES, dependencies=[Depends(invited)])
    def joined(form: Token) -> Response:
        """A personal link for somebody new."""
        desk.own(0, "join", form)
        return link(ballots.enrol(study))

    @made.get("/i/{name}", responses=FAILURES)
    def image(name: Annotated[str, Path(max_length=64)]) -> Response:
        """An image by its opaque name. Nothing tells when or by whom its file was made."""
        path = study.folder / store.IMAGES / f"{name}.png"
        if not IMAGE.fullmatch(name) or not path.is_file():
            raise Turned(404, "There is no such image.")
        return Response(path.read_bytes(), media_type="image/png", headers=KEPT)


def _personal(made: FastAPI, desk: Desk) -> None:
    """Pages and forms of an annotator."""
    study = desk.study

    post: Callable[[str], Any] = lambda path: made.post(path, responses=FAILURES)  # noqa: E731

    @made.get("/s/{token}", responses=FAILURES)
    def here(request: Request, token: Link, who: Reader) -> Response:
        """Where the annotator is: on whatever device, after whatever interruption."""
        part = bool(request.headers.get("hx-request"))
        return HTMLResponse(desk.pages.stage(who, token, ballots.now(study, who), whole=not part))

    @post("/s/{token}/consent")
    def consent(request: Request, token: Link, who: Writer, form: Token, agree: Annotated[Literal["yes"], Form()]) -> Response:
        """Agree to take part."""
        desk.own(who, "consent", form)
        return desk.answer(request, who, token, ballots.consent(study, who))

    @post("/s/{token}/begin")
    def begin(request: Request, token: Link, who: Writer, form: Token, block: Number) -> Response:
        """Begin a block, its introduction read."""
        desk.own(who, f"begin {block}", form)
        return desk.answer(request, who, token, ballots.begin(study, who, block))

    @post("/s/{token}/vote")
    def vote(
        request: Request,
        token: Link,
        who: Writer,
        form: Token,
        assignment: Number,
        seq: Number,
        side: Annotated[Literal["left", "right", "tie", "both_bad"], Form()],
        rt_ms: Annotated[str, Form(pattern=r"^[0-9]{0,9}$")] = "",
        zoomed: Annotated[Literal["0", "1"], Form()] = "0",
        viewport: Viewport = "unknown",
    ) -> Response:
        """Answer the pair that was shown. Sent again, it changes nothing."""
        desk.own(who, f"vote {assignment}", form)
        taken = int(rt_ms) if rt_ms else None
        now = ballots.vote(study, who, assignment, side, seq, taken, zoomed == "1", viewport)
        return desk.answer(request, who, token, now)

    @post("/s/{token}/undo")
    def undo(request: Request, token: Link, who: Writer, form: Token, vote_id: Number) -> Response:
        """Take the last answer back, and be shown its pair again."""
        desk.own(who, f"undo {vote_id}", form)
        return desk.answer(request, who, token, ballots.undo(study, who, vote_id))

    @made.get("/s/{token}/leave", responses=FAILURES)
    def leave(token: Link, who: Reader) -> Response:
        """Ask whether all answers are to be deleted."""
        return HTMLResponse(desk.pages.leave(who, token, ballots.now(study, who).answered))

    @post("/s/{token}/leave")
    def left(request: Request, token: Link, who: Writer, form: Token) -> Response:
        """Delete all answers of the annotator, for good."""
        desk.own(who, "leave", form)
        ballots.withdraw(study, who)
        return desk.answer(request, who, token, Now("withdrawn"))


def _heads(made: FastAPI, open_to_all: bool) -> None:
    """HEAD, by which link checkers of mail programs look whether a page is there: answered without a look at the study.

    A GET of these would enrol somebody, or lease pairs.
    """

    def there() -> Response:
        found = HTMLResponse()
        del found.headers["content-length"]  # the page of a GET is not empty
        return found

    def linked(who: Reader) -> Response:
        return there()

    for path in ("/", "/health", *(["/join"] if open_to_all else [])):
        made.head(path, include_in_schema=False)(there)
    for path in ("/s/{token}", "/s/{token}/leave"):
        made.head(path, include_in_schema=False)(linked)


def run(made: FastAPI, host: str, port: int, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until stopped. Requests are not logged: a log would hold addresses and links.

    Args:
        made: of `app`.
        host: address to listen on.
        port: to listen on.
        ready: called when the server can be reached.

    Raises:
        ValueError: uvicorn is missing, or the port is none or taken.
    """
    if not 0 < port < 2**16:
        raise ValueError(f"--port must be 1 to {2**16 - 1}, not {port}")
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("serving a study needs uvicorn: pip install 'fewstep[web]'") from error

    class Listening(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            logging.getLogger("uvicorn.error").disabled = True  # it says in its own words what is said below
            await super().startup(sockets)
            logging.getLogger("uvicorn.error").disabled = False
            ready()

    try:
        Listening(uvicorn.Config(made, host, port, access_log=False, log_level="warning", server_header=False)).run()
    except SystemExit as error:
        raise ValueError(f"cannot listen on {host}, port {port}: is another server there? give another --port") from error
    except KeyboardInterrupt:
        return  # the way to stop it
    finally:
        logging.getLogger("uvicorn.error").disabled = False
