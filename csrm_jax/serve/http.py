"""The HTTP protocol of uvicorn, with a limit on how long a request may take to begin."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def protocol(timeout_s: float) -> type[HttpToolsProtocol]:
  """Returns a protocol that closes connections whose first headers do not come in time."""

  class Protocol(HttpToolsProtocol):
    """Uvicorn waits for ever for the headers of a request."""

    def connection_made(self, transport) -> None:
      super().connection_made(transport)
      self._arm()

    def on_message_begin(self) -> None:
      super().on_message_begin()
      if self._timer is None:  # a later request of the connection
        self._arm()

    def on_headers_complete(self) -> None:
      self._disarm()
      super().on_headers_complete()

    def connection_lost(self, exc) -> None:
      self._disarm()
      super().connection_lost(exc)

    def _arm(self) -> None:
      self._timer = self.loop.call_later(timeout_s, self.transport.close)

    def _disarm(self) -> None:
      if self._timer is not None:
        self._timer.cancel()
        self._timer = None

  return Protocol
