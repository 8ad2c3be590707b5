"""Where the page is served."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from systems.settings.reader import ConfigError


@dataclass(frozen=True)
class Address:
    """Network interface and port of the page.

    Args:
        host: Network interface; the default is reachable from this machine alone.
        port: TCP port.
    """

    host: str = "127.0.0.1"
    port: int = 8080

    @classmethod
    def read(
        cls, words: Sequence[str], option: str = "--view", port: int = 8080
    ) -> Address:
        """From `host=…` and `port=…`.

        Args:
            words: The settings.
            option: The option of `launch.py` that reads them.
            port: The default port.

        Raises:
            ConfigError: There is another word, or the port is no port.
        """
        found: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in ("host", "port") or not value:
                raise ConfigError(
                    f"`{word}` is no setting of `{option}`: write `port=8081` or "
                    "`host=0.0.0.0`."
                )
            found[key] = value
        given = str(found.get("port", port))
        if not given.isdecimal() or not 0 < int(given) < 2**16:
            raise ConfigError(f"`port={given}` is no port: write `port=8081`.")
        return cls(found.get("host", cls.host), int(given))

    def check(self) -> None:
        """Try to listen there.

        Raises:
            ConfigError: The port is taken, or the interface does not exist.
        """
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((self.host, self.port))
            except OSError as error:
                reason = (
                    "is taken"
                    if error.errno == errno.EADDRINUSE
                    else f"cannot be used ({error.strerror or error})"
                )
                raise ConfigError(
                    f"Port {self.port} of {self.host} {reason}: write "
                    f"`port={self.port % 65535 + 1}`."
                ) from error
