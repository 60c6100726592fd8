"""python3 -m tests.rig demo | test [pytest arguments] | serve [--port N] | thumbnails"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (said in plain words, before an older Python fails on the syntax)
    sys.exit("Python 3.10 or newer is needed; this is " + sys.version.split()[0])

import argparse
import os
import signal
import time

from ..rig import CACHE, PYTHON, ROOT, VENV, RigError, environment


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.rig", description="A real ComfyUI with the pack mounted.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="make a picture from words and a style picture")
    commands.add_parser("test", help="run every check and test; further arguments go to pytest")
    serve = commands.add_parser("serve", help="serve the page until Ctrl-C")
    serve.add_argument("--port", type=int, default=8188)
    commands.add_parser("thumbnails", help="run every example workflow and keep its picture beside it")
    arguments, further = parser.parse_known_args()
    if further and arguments.command != "test":
        parser.error(f"unknown arguments: {' '.join(further)}")

    environment.prepare()
    if sys.prefix != str(VENV):
        # The rest needs packages of .venv; same process, so that signals reach it.
        os.execv(PYTHON, [str(PYTHON), "-m", "tests.rig", *sys.argv[1:]])
    if arguments.command == "demo":
        from .demo import demo

        demo()
    elif arguments.command == "test":
        from .checks import run_checks

        return run_checks(further)
    elif arguments.command == "serve":
        _serve(arguments.port)
    else:
        from .thumbnails import make_thumbnails

        make_thumbnails()
    return 0


def _serve(port: int) -> None:
    from .host import ComfyServer

    print("host: starting ComfyUI", flush=True)
    with ComfyServer(CACHE / "serve", port=port) as server:
        print(f"{server.url}\nThe log is {server.log_path.relative_to(ROOT)}. Ctrl-C ends it.", flush=True)
        while server.alive:
            time.sleep(0.5)
        raise RigError("the host ended by itself; see its log")


def _end(*_: object) -> None:
    raise KeyboardInterrupt  # so that a terminated rig stops its server as Ctrl-C does


if __name__ == "__main__":
    os.chdir(ROOT)
    # Ctrl-C too: a shell has what it starts in the background ignore it, and so would every server started from here.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _end)
    try:
        sys.exit(main())
    except RigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
