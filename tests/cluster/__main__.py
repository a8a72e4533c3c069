"""The command line: `python -m tests.cluster build|up|down|status|load|exec|stop|start|freeze|thaw|ctr …`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from tests.cluster import binaries, lifecycle, nodes, paths, processes
from tests.cluster.say import ClusterError, say


def main() -> int:
    """Runs one command; an error of the harness is printed without a stack."""
    try:
        return _run(_parser().parse_args())
    except ClusterError as error:
        say(f"error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="build programs that are missing in the cache")
    build.add_argument("names", nargs="*", help="all of them if none is named")
    up = verbs.add_parser("up", help="bring a cluster up")
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("archives", nargs="*", type=Path, help="image archives that every node gets")
    verbs.add_parser("down", help="remove the cluster, or what a dead run left of one")
    verbs.add_parser("status", help="its processes")
    verbs.add_parser("load", help="load an image archive into every node").add_argument("archive", type=Path)
    for verb in ("stop", "start", "freeze", "thaw"):
        verbs.add_parser(verb, help=f"{verb} a process of the cluster by its name").add_argument("name")
    verbs.add_parser("exec", help="run a command in the client's network").add_argument(
        "line", nargs=argparse.REMAINDER
    )
    ctr = verbs.add_parser("ctr", help="containerd's client on a node")
    ctr.add_argument("node")
    ctr.add_argument("line", nargs=argparse.REMAINDER)
    return parser


def _run(asked: argparse.Namespace) -> int:
    match asked.verb:
        case "build":
            _build(asked.names)
        case "up":
            lifecycle.up(asked.nodes, asked.archives)
        case "down":
            lifecycle.down()
        case "status":
            for process in processes.records():
                say(f"{'runs' if processes.alive(process) else 'ended'}\t{process.pid}\t{process.host}\t{process.name}")
        case "load":
            lifecycle.load(asked.archive)
        case "exec":
            _exec(asked.line)
        case "ctr":
            say(nodes.ctr(asked.node, *asked.line))
        case verb:
            _fault(verb, asked.name)
    return 0


def _build(names: list[str]) -> None:
    known = {program.name: program for program in binaries.PROGRAMS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ClusterError(f"no program {', '.join(unknown)}; there are {', '.join(known)}")
    binaries.build([known[name] for name in names] or binaries.PROGRAMS)


def _fault(verb: str, name: str) -> None:
    process = processes.record(name)
    match verb:
        case "stop":
            processes.stop(process)
        case "start":
            processes.again(name)
        case "freeze":
            processes.send(process, signal.SIGSTOP)
        case _:
            processes.send(process, signal.SIGCONT)


def _exec(line: list[str]) -> None:
    """Becomes the command: it keeps its terminal and its exit code."""
    if not lifecycle.is_up():
        raise ClusterError("no cluster is up; `make cluster` brings one up")
    env = os.environ | {"KUBECONFIG": str(paths.KUBECONFIG), "PATH": f"{paths.BINARIES}:{os.environ['PATH']}"}
    whole = processes.in_host("client", *line)
    os.execvpe(whole[0], whole, env)


if __name__ == "__main__":
    sys.exit(main())
