"""TCP proxies on loopback: one that can cut every line, and a CONNECT proxy as hospitals have."""

import contextlib
import socket
import threading
import time


class FaultProxy:
    """Forwards to a port until it is told not to."""

    def __init__(self, target):
        self._target, self._is_cut, self._delay = target, False, 0.0
        self._lines, self._lock = set(), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cut()
        self._listener.close()

    def cut(self):
        """End every line; new ones are shut at once."""
        self._is_cut = True
        with self._lock:
            lines, self._lines = self._lines, set()
        for line in lines:
            shut(line)

    def heal(self):
        """Forward again."""
        self._is_cut = False

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                shut(near)
                continue
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near):
        try:
            far = self._far(near)
        except OSError:
            shut(near)
            return
        with self._lock:
            self._lines |= {near, far}
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _far(self, near):
        return socket.create_connection(self._target, 10)

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                time.sleep(self._delay)
                sink.sendall(data)
        shut(source)
        shut(sink)


class ConnectProxy(FaultProxy):
    """Opens a line to where CONNECT says (RFC 9110, 9.3.6); it alone knows the names."""

    def __init__(self, names, *, delay=0.0):
        """Use the addresses of names; every other one is unknown.

        Args:
            names: address of each.
            delay: seconds by which a line holds back whatever it carries, as a far one does.
        """
        self._names, self.asked = names, set()
        super().__init__(None)
        self._delay = delay

    def _far(self, near):
        near.settimeout(10)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = near.recv(1)
            if not more or len(head) > 10_000:
                raise OSError("no request")
            head += more
        method, where, _ = head.split(b"\r\n")[0].decode().split()
        name, port = where.rsplit(":", 1)
        self.asked.add(where)
        if method != "CONNECT" or name not in self._names:
            near.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            raise OSError("not here")
        far = socket.create_connection((self._names[name], int(port)), 10)
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        near.settimeout(None)
        return far


def shut(line):
    """Close a socket under whatever is waiting on it."""
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()
