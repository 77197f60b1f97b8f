"""A TCP proxy on loopback that can cut every line and refuse new ones."""

import contextlib
import socket
import threading


class FaultProxy:
    """Forwards to a port until it is told not to."""

    def __init__(self, target):
        self._target, self._is_cut = target, False
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
            try:
                far = socket.create_connection(self._target, 10)
            except OSError:
                shut(near)
                continue
            with self._lock:
                self._lines |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        shut(source)
        shut(sink)


def shut(line):
    """Close a socket under whatever is waiting on it."""
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()
