"""The processes of the embedded backend: `python -m cookbook.backend supervise | control-plane | trainer | deployment`.

Each is started by the one above it (launcher, supervisor, control plane); everything it needs is on its command line.
A failure that the user can do something about is one line on stderr, `error: ...`, and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cookbook.backend.paths import BackendPaths
from cookbook.errors import BackendError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process to its end and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _run(args: argparse.Namespace) -> int:
    # Imported here: the supervisor stays small, and only a worker pays for torch.
    if args.process == "supervise":
        from cookbook.backend.supervisor import supervise

        return supervise(BackendPaths(args.home, args.version), port=args.port, idle_timeout_s=args.idle_timeout_s)
    if args.process == "control-plane":
        from cookbook.backend.control_plane.server import serve

        return serve(
            BackendPaths(args.home, args.version),
            listen_fd=args.listen_fd,
            parent_fd=args.parent_fd,
            idle_timeout_s=args.idle_timeout_s,
        )
    if args.process == "deployment":
        from cookbook.backend.deployment.worker import main as deploy

        deploy(args.job_dir)
    else:
        from cookbook.backend.trainer.worker import main as train

        train(args.job_dir)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cookbook.backend", description=__doc__)
    processes = parser.add_subparsers(dest="process", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", type=Path, required=True, help="COOKBOOK_HOME, absolute")
    shared.add_argument("--version", required=True, help="code version; names the folder under home/backend")
    shared.add_argument("--idle-timeout-s", type=float, required=True, help="end after this long without work")

    supervise = processes.add_parser("supervise", parents=[shared], help="own the port; keep a control plane running")
    supervise.add_argument("--port", type=int, default=0, help="0 = any free port")

    control_plane = processes.add_parser("control-plane", parents=[shared], help="serve the training API")
    control_plane.add_argument("--listen-fd", type=int, required=True, help="listening socket, inherited")
    control_plane.add_argument("--parent-fd", type=int, required=True, help="pipe that closes when the parent dies")

    for kind, what in (("trainer", "one trainer job"), ("deployment", "one deployment of a model")):
        worker = processes.add_parser(kind, help=what)
        worker.add_argument("--job-dir", type=Path, required=True, help="folder with spec.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
