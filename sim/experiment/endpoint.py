"""The address of a cloud and the name of the variable with its key: what a file from elsewhere may say of them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from untether.sim.core.errors import UserError
from untether.sim.core.text import shown

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_KEY_NAME = re.compile(r"(?:[A-Z][A-Z0-9_]*_)?API_KEY|UNTETHER_[A-Z0-9_]+|HF_TOKEN")
_SECRET = ("key", "token", "secret", "password", "signature", "sig", "auth")


def is_loopback(url: str) -> bool:
    """Returns whether a URL's host is this machine, by name or by address."""
    host = urlsplit(url).hostname or ""
    return host in _LOOPBACK or host.startswith("127.") and host.replace(".", "").isdigit()


def check_address(url: str, variable: str, key: str) -> None:
    """Raises UserError where a URL cannot be asked, or not without showing a secret: nothing was sent."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"cloud.base_url = {url!r} is no address: it must be like https://api.example.com/v1")
    if key and parts.scheme == "http" and not is_loopback(url):
        raise UserError(
            f"cloud.base_url = {url} is plain HTTP to another machine, where everyone on the way could read the key in "
            f"{variable} (cloud.api_key_env). Give an https:// address, a tunnel on 127.0.0.1, or, if the endpoint "
            'needs no key, cloud.api_key_env = ""'
        )


def check_key_name(name: str) -> str:
    """Returns a variable that may hold an endpoint's key. Raises ValueError for any other: an experiment's file comes
    from elsewhere at times, and must not choose which of this machine's secrets is sent to the address that it also
    chooses.
    """
    if name and not _KEY_NAME.fullmatch(name):
        raise ValueError(
            f"{shown(name, 60)} is no name for an endpoint's key: only a variable called ..._API_KEY, UNTETHER_... or "
            f"HF_TOKEN is read. Set one, such as UNTETHER_KEY=${shown(name, 60)}, and name it here"
        )
    return name


def check_url(url: str) -> str:
    """Returns an address without a secret in it. Raises ValueError, which does not repeat the secret, for one that has
    any.
    """
    if found := secret_in(url):
        raise ValueError(
            f"{found} stands in the address {without_credentials(url)}, and addresses are written down. Leave it out, "
            "and put the key into the environment variable that cloud.api_key_env names"
        )
    return url


def without_credentials(url: str) -> str:
    """Returns a URL as it may be shown: no user, no password, no query."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return shown(urlunsplit((parts.scheme, host, parts.path, "", "")) if parts.netloc else url, 200)
    except ValueError:
        return "(an address that cannot be read)"


def secret_in(url: str) -> str:
    """Returns what in a URL is a credential: a user or password, or a query field such as `api_key`; empty for none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    if "@" in parts.netloc:
        return "a user name or password"
    names = [field.partition("=")[0] for field in parts.query.split("&")]
    named = next((name for name in names if any(word in name.lower() for word in _SECRET)), "")
    return f"the field `{shown(named, 30)}`" if named else ""
