"""Ask an address whether a Prefect API is there, with nothing but the standard library, and find the configured one."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dotenv import dotenv_values

from cnnpipe.errors import ServerError, one_line

__all__ = ["answers_health", "check_configured", "configured_api_url"]

_LOCAL_TIMEOUT_SECONDS: Final = 5.0
_REMOTE_TIMEOUT_SECONDS: Final = 15.0
_PROBLEMS: Final = (OSError, ValueError, http.client.HTTPException)  # no connection, no JSON, no HTTP


def configured_api_url() -> tuple[str, str] | None:
    """Return the address of the API that the user has configured and where it is set, or None.

    The places and their order are prefect's own: the environment; `.env`, `prefect.toml` and `pyproject.toml` in the
    working folder; the active profile. Source: docs.prefect.io, "Settings and profiles".

    Raises:
        ServerError: one of the files cannot be read.
    """
    return next(((url.rstrip("/"), origin) for url, origin in _api_urls() if url), None)


def _api_urls() -> Iterator[tuple[str | None, str]]:
    """Yield what each place says, and its name; nothing of the later ones is read where an earlier one decides."""
    yield os.environ.get("PREFECT_API_URL"), "PREFECT_API_URL"
    yield dotenv_values(".env").get("PREFECT_API_URL"), "PREFECT_API_URL in .env"
    yield _read_toml(Path("prefect.toml")).get("api", {}).get("url"), "the api url in prefect.toml"
    tool = _read_toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {})
    yield tool.get("api", {}).get("url"), "the api url in pyproject.toml"
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = _read_toml(Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser())
    name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    url = profiles.get("profiles", {}).get(name, {}).get("PREFECT_API_URL")
    yield url, f"PREFECT_API_URL of the Prefect profile {name!r}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ServerError(f"cannot read Prefect's settings from {path}: {one_line(error)}; fix that file") from error


def check_configured(api_url: str, origin: str) -> None:
    """Make sure that a Prefect API answers at the configured address.

    Whether it lets this client in is left to prefect, which has the keys and the certificates.

    Args:
        origin: where the address is set, for the message.
    Raises:
        ServerError: nothing answers there, or something else does.
    """
    problem = "it is no Prefect API; does the address end in /api?"
    try:
        if _get(f"{api_url}/health", _REMOTE_TIMEOUT_SECONDS) is True:
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403) or "/workspaces/" in api_url:  # Prefect Cloud asks for the key first
            return
        if error.code != 404:
            problem = f"it answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return
        problem = f"no answer ({error.reason})"
    except TimeoutError:
        problem = f"no answer within {_REMOTE_TIMEOUT_SECONDS:.0f} s"
    except json.JSONDecodeError:
        pass  # a web page
    except _PROBLEMS as error:
        problem = f"no answer ({error})"
    raise ServerError(
        f"no Prefect server at {api_url}, which {origin} names: {problem}; start that server, or unset "
        "PREFECT_API_URL to have a local one started"
    )


def answers_health(api_url: str) -> bool:
    """Tell whether a server on this machine is ready."""
    try:
        return _get(f"{api_url}/health", _LOCAL_TIMEOUT_SECONDS) is True
    except _PROBLEMS:
        return False


def _get(url: str, timeout_seconds: float) -> Any:
    """Return the JSON at an address; asks no proxy about this machine."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://")
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 (checked just above)
    local = request.host.partition(":")[0] in ("127.0.0.1", "localhost")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
    with opener.open(request, timeout=timeout_seconds) as response:
        return json.load(response)
