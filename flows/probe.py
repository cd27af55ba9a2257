"""Ask an address whether a Prefect API is there, with nothing but the standard library, and find the configured one."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

from cnnpipe.errors import ServerError

__all__ = ["answers_health", "check_configured", "configured_api_url", "is_usable_local"]

_LOCAL_TIMEOUT_SECONDS: Final = 5.0
_REMOTE_TIMEOUT_SECONDS: Final = 15.0
_PROBLEMS: Final = (OSError, ValueError, http.client.HTTPException)  # no connection, no JSON, no HTTP


def configured_api_url() -> tuple[str, str] | None:
    """Return the address of the API that the user has configured and where it is set, or None.

    The places are prefect's own: the environment, then the active profile.

    Raises:
        ServerError: the file of profiles cannot be read.
    """
    url = os.environ.get("PREFECT_API_URL")
    if url:
        return url.rstrip("/"), "PREFECT_API_URL"
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ServerError(f"cannot read Prefect's profiles from {path}: {error}; mend or remove that file") from error
    name = os.environ.get("PREFECT_PROFILE") or profiles.get("active", "")
    url = profiles.get("profiles", {}).get(name, {}).get("PREFECT_API_URL")
    return (url.rstrip("/"), f"PREFECT_API_URL of the Prefect profile {name!r}") if url else None


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


def is_usable_local(api_url: str, own_home: Path) -> bool:
    """Tell whether a Prefect 3 server runs at an address of this machine, and still has its data.

    A server whose folder was removed, say with a clone of this project, answers but keeps nothing.

    Args:
        own_home: the folder of this project's server, which is known not to run: who has it now is such a server.
    """
    try:
        if not str(_get(f"{api_url}/admin/version", _LOCAL_TIMEOUT_SECONDS)).startswith("3."):
            return False
        home = Path(_get(f"{api_url}/admin/settings", _LOCAL_TIMEOUT_SECONDS)["home"])
    except (*_PROBLEMS, KeyError, TypeError):
        return False
    # The parent: a server in a container has a folder that this machine does not see.
    return home != own_home and os.path.lexists(home.parent)


def _get(url: str, timeout_seconds: float) -> Any:
    """Return the JSON at an address; asks no proxy about this machine."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("it must begin with http:// or https://")
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310 (checked just above)
    local = request.host.partition(":")[0] in ("127.0.0.1", "localhost")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
    with opener.open(request, timeout=timeout_seconds) as response:
        return json.load(response)
