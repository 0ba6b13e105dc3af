"""The pages for people: chat at `/`, `/dashboard`, and the files they load.

They need nothing from elsewhere, and a policy header forbids them to ask: not for scripts, and not for images that an
answer may name. Knows files alone; what the pages show they get from the API.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from pathlib import Path

from flask import Blueprint, Response, request

from pagegraph.web.errors import ApiError

_FOLDER = Path(__file__).parent / "static"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PAGES = {"/": "chat.html", "/dashboard": "dashboard.html"}
FILES = "/static/"  # what the pages load is below it

blueprint = Blueprint("pages", __name__)


@blueprint.get("/")
@blueprint.get("/dashboard")
def page() -> Response:
    """A page for people."""
    return _file(PAGES[request.path])


@blueprint.get(FILES + "<path:name>")
def file(name: str) -> Response:
    """What a page loads."""
    if name not in _names():
        raise ApiError(404, f"there is no file {name!r} here")
    return _file(name)


def is_open(path: str) -> bool:
    """Whether browsers may have it without a key, which they do not send: it tells nothing of the server."""
    return path in PAGES or path.startswith(FILES)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(path.relative_to(_FOLDER).as_posix() for path in _FOLDER.rglob("*") if path.is_file())


@functools.cache
def _content(name: str) -> tuple[bytes, str]:
    content = (_FOLDER / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:32]


def _file(name: str) -> Response:
    content, tag = _content(name)
    mimetype = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    response = Response(content, mimetype=mimetype)
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Cache-Control"] = "no-cache"  # asked for each time, sent when it has changed
    response.headers["Referrer-Policy"] = "no-referrer"
    response.set_etag(tag)
    response.make_conditional(request)  # in place
    return response
