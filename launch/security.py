"""Who may talk to Ray, and what must never be written down.

Anyone who reaches a Ray cluster without a token can run code on all its machines: such a cluster is not joined unless
the user says so. Ray fixes its mode when it is imported, so what is here imports nothing of it.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping

from dino_scale.errors import ConfigError, UserError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_SECRET_VARIABLES = (TOKEN, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN")
_SHORTEST_SECRET = 8  # characters; a shorter value would blank out ordinary words
_USER_PART = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+@")
_SECRET_PARAMETERS = re.compile(
    r"(?P<name>[?&](?:X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|X-Goog-Signature|AWSAccessKeyId|Signature"
    r"|sig|token|access_token|password|secret|key)=)[^&\s#'\"]+",
    re.IGNORECASE,
)
_HIDDEN = "***"
_PROBE_SECONDS = 60.0
# In a process of its own, without this one's token. The answer to a request without a token tells an open cluster.
_PROBE = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)
    print("open")
except AuthenticationError:
    print("closed")
"""


def authentication(environment: Mapping[str, str], local: bool, insecure: bool) -> dict[str, str]:
    """Variables to set before Ray is imported, so that it asks for a token and has one.

    A Ray of this machine's own (`local`) gets a token that only this process and its children know. UserError where the
    user has switched tokens off without saying `insecure`.
    """
    mode = environment.get(MODE)
    if mode not in (None, "token") and not insecure:
        raise UserError(
            f"{MODE} is '{mode}', which lets anyone who reaches Ray run code as you: unset it, or use --insecure"
        )
    wanted = {MODE: mode or ("disabled" if insecure and not local else "token")}
    if wanted[MODE] == "token" and local and TOKEN not in environment and TOKEN_PATH not in environment:
        wanted[TOKEN] = secrets.token_hex(32)
    return wanted


def require_closed(address: str) -> None:
    """UserError where the Ray cluster at host:port answers without a token, or where that cannot be found out."""
    environment = {name: value for name, value in os.environ.items() if name not in (TOKEN, TOKEN_PATH)}
    environment |= {MODE: "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS)
        answer, reason = done.stdout.strip(), (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        answer, reason = "", f"no answer within {_PROBE_SECONDS:.0f} s"
    if answer == "open":
        raise UserError(
            f"the Ray cluster at {address} asks for no token: anyone who reaches it can run code on its machines. "
            f"Start it with {MODE}=token (docs/launch), or join it all the same with --insecure"
        )
    if answer != "closed":
        raise UserError(
            f"whether the Ray cluster at {address} asks for a token could not be found out ({redacted(reason)}): look "
            "at its head's log, or join it all the same with --insecure"
        )


def require_no_secrets(texts: Mapping[str, object]) -> None:
    """ConfigError for a configuration (dotted key -> value) that holds a password or a signed address: it is written to
    the run folder, and addresses appear in messages."""
    for key, value in texts.items():
        if isinstance(value, str) and _without_credentials(value) != value:
            raise ConfigError(
                f"{key} is '{redacted(value)}' and holds a secret, which would be written to the run folder: put "
                "credentials into the environment or the store's own file, and give the plain address"
            )


def redacted(text: str) -> str:
    """The text without credentials of addresses and without the values of environment variables that hold secrets."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _HIDDEN)
    return _without_credentials(text)


def _without_credentials(text: str) -> str:
    text = _USER_PART.sub(lambda match: f"{match['scheme']}{_HIDDEN}@", text)
    return _SECRET_PARAMETERS.sub(lambda match: f"{match['name']}{_HIDDEN}", text)
