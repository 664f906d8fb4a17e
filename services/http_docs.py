"""The HTTP applications with pages that explain them, `/docs`, which open without any other server.

Swagger UI comes with the package fastapi-offline (MIT; Swagger UI itself is Apache-2.0) and is served from here.
"""

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from opd import __version__

ASSETS = "/static-offline-docs"
OPEN_PATHS = frozenset({"/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""They tell what this project's documentation tells, so nobody has to prove who they are."""


def documented_app(title: str, description: str) -> FastAPI:
    """An application with `/docs` and `/openapi.json`."""
    return FastAPIOffline(
        title=title,
        description=description,
        version=__version__,
        redoc_url=None,
        static_url=ASSETS,
        # Its default asks a public server whether the schema is sound.
        swagger_ui_parameters={"validatorUrl": None},
    )


def is_documentation(path: str) -> bool:
    """Whether a path belongs to these pages."""
    return path in OPEN_PATHS or path.startswith(f"{ASSETS}/")
