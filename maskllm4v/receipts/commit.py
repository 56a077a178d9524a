"""What the commit holds that results are compared with; read by git, which need not be there."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

WRITTEN = ("reports/", "dvc.lock", "README.md", "docs/findings.md")  # by the pipeline: these may differ
UNREADABLE = "git cannot read the commit"
CODE = ("maskllm4v/", "stages/", "experiments/")  # where a file that git does not know could matter, too


class NoCommitError(Exception):
    """There is no commit to compare with; its message says why, in words that name no path."""


@dataclass(frozen=True)
class Commit:
    """HEAD of the checkout that a folder is in, or lies in."""

    sha: str
    root: Path

    def files(self, *paths: str) -> dict[str, bytes]:
        """Files and all that is in folders, by path; those that are missing there are left out."""
        listed = git(self.root, "ls-tree", "-r", "-z", "HEAD", "--", *paths).split(b"\0")
        names: list[str] = []
        ids: list[bytes] = []
        for entry in filter(None, listed):
            about, _, path = entry.partition(b"\t")
            _, kind, digest = about.split(b" ")
            if kind == b"blob":
                names.append(os.fsdecode(path))
                ids.append(digest)
        contents = git(self.root, "cat-file", "--batch", send=b"".join(digest + b"\n" for digest in ids))
        found: dict[str, bytes] = {}
        place = 0
        for name in names:  # "<id> blob <size>\n<content>\n", one after the other
            end = contents.index(b"\n", place)
            if contents[place:end].endswith(b" missing"):
                raise NoCommitError(UNREADABLE)
            size = int(contents[place:end].rsplit(b" ", 1)[1])
            found[name] = contents[end + 1 : end + 1 + size]
            place = end + size + 2
        return found

    def changed(self) -> list[str]:
        """Files that differ from the commit and that the pipeline does not write, and code that git does not know."""
        prefix = os.fsdecode(git(self.root, "rev-parse", "--show-prefix").rstrip(b"\n"))
        listed = git(self.root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".")
        found = []
        for entry in filter(None, listed.split(b"\0")):
            state, name = entry[:2], os.fsdecode(entry[3:]).removeprefix(prefix)
            counts = name.startswith(CODE) if state == b"??" else not name.startswith(WRITTEN)
            if counts:
                found.append(name)
        return found


def find_commit(root: Path) -> Commit:
    """HEAD of the checkout that ``root`` is in.

    Raises:
        NoCommitError: git is not installed, this is not a checkout, or nothing in this folder was committed.
    """
    git(root, "rev-parse", "--is-inside-work-tree", failed="this is no git checkout")
    sha = git(root, "rev-parse", "--verify", "--quiet", "HEAD", failed="this checkout has no commit yet")
    if not git(root, "ls-tree", "--name-only", "HEAD", "./"):
        raise NoCommitError("this folder was never committed")
    return Commit(sha.decode().strip(), root)


def git(root: Path, *arguments: str, send: bytes = b"", failed: str = UNREADABLE) -> bytes:
    """What a git command says.

    Args:
        root: where it runs.
        arguments: of the command.
        send: what it reads.
        failed: what it means if it fails.

    Raises:
        NoCommitError: it fails, or there is no git.
    """
    command = ["git", "--no-optional-locks", *arguments]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, input=send, capture_output=True, check=True)
    except OSError as error:
        raise NoCommitError("git is not installed") from error
    except subprocess.CalledProcessError as error:
        foreign = b"dubious ownership" in error.stderr  # the checkout is another user's
        raise NoCommitError("git takes this checkout for unsafe" if foreign else failed) from error
    return done.stdout
