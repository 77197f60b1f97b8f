"""The rounds as a process: ``python -m huizhen.server.conduct FOLDER``; ``up`` keeps it alive."""

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from huizhen.protocol.errors import HuizhenError, StorageError
from huizhen.server.conductor import Conductor
from huizhen.server.desk import alone, open_desk
from huizhen.server.home import Home
from huizhen.server.studies import sweep
from huizhen.server.supervisor import die_with_parent, link_of

logger = logging.getLogger(__name__)


def main(folder: str) -> int:
    """Run the rounds of a coordinator's folder until SIGTERM."""
    die_with_parent()
    if os.getppid() == 1:  # it died before the kernel was told
        return 1
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it names every request
    logging.getLogger("alembic").setLevel(logging.WARNING)
    home, stop = Home(Path(folder)), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        with alone(home, "rounds"), open_desk(home) as desk:
            try:
                logger.info("objects that nothing names are removed: count=%d", sweep(desk))
            except StorageError as error:  # rounds need no tidy folder
                logger.error("nothing is removed: %s", error)
            owner = f"{socket.gethostname()}:{home.folder.absolute()}"
            conductor = Conductor(
                desk.parts, desk.registry.trust, desk.registry.keys_at, owner=owner
            )
            conductor.run(link_of(home, desk.settings), stop)
    except HuizhenError as error:
        logger.error("rounds stop: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
