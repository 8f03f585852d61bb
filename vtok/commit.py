"""Which source runs: the commit of a checkout, and what differs from it, files that git does not know yet with it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

CODE = ("vtok",)  # where a file that nobody has added runs all the same


def git(root: Path, *words: str) -> str | None:
    """What git says of a checkout; None where there is none, or no git."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # a difference between two files ends with 1 where there is one
    good = done.returncode == 0 or (done.returncode == 1 and "--no-index" in words)
    return done.stdout.decode(errors="surrogateescape") if good else None


def new_files(root: Path, code: Sequence[str] = CODE) -> list[str]:
    """Files of the code that are not in the commit and not ignored."""
    listed = git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *code)
    return [name for name in (listed or "").split("\0") if name]


def commit_of(root: Path, code: Sequence[str] = CODE) -> str | None:
    """The commit, with "+changes" where files differ or are new; that of a snapshot which slurm/submit.py made; None
    for an installed package."""
    if (root / "COMMIT").is_file():
        return (root / "COMMIT").read_text().strip()
    sha = (git(root, "rev-parse", "HEAD") or "").strip()
    changed = (git(root, "status", "--porcelain", "-uno") or "").strip() or new_files(root, code)
    return (sha + ("+changes" if changed else "")) or None


def difference(root: Path, code: Sequence[str] = CODE) -> str:
    """What `git apply` makes the commit into the tree with."""
    new = [git(root, "diff", "--no-index", "--binary", "--", "/dev/null", name) for name in new_files(root, code)]
    return "".join([git(root, "diff", "HEAD", "--binary") or "", *(text or "" for text in new)])
