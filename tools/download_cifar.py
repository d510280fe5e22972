# SPDX-License-Identifier: BSD-3-Clause
"""Download CIFAR-10 or CIFAR-100, check it, and unpack it.

    python tools/download_cifar.py 10 /data       # makes /data/cifar-10-batches-py
    python tools/download_cifar.py 100 /data      # makes /data/cifar-100-python

After an interruption, the same command continues. The archives and their MD5 checksums are those of
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import NamedTuple, Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import console
from engine.errors import EXIT_FAILURE, UsageError, UserError, first_line
from engine.parser import OneLineParser, nonempty_path

URL = "https://www.cs.toronto.edu/~kriz/"
BLOCK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte


class Archive(NamedTuple):
    """An archive, its MD5 checksum, the folder that it unpacks to, and the files there that training reads."""

    name: str
    md5: str
    folder: str
    files: Sequence[str]


CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
ARCHIVES = {
    "10": Archive("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py", CIFAR10_FILES),
    "100": Archive(
        "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python", ["train", "test", "meta"]
    ),
}


class DownloadError(UserError):
    """The archive cannot be had, or is not the published one."""

    exit_code = EXIT_FAILURE


def download(url: str, path: str) -> None:
    """Download to a file, after the bytes that it holds already. Raises OSError or HTTPException."""
    done = os.path.getsize(path) if os.path.exists(path) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left behind these bytes
            return
        raise
    continues = response.status == 206  # else the server sends all of it
    done = done if continues else 0
    total = done + int(response.headers.get("Content-Length") or 0)
    with response, open(path, "ab" if continues else "wb") as file, console.progress(total, done, "Download", "B"):
        for block in iter(lambda: response.read(BLOCK), b""):
            file.write(block)
            console.advance(len(block))
    if os.path.getsize(path) < total:
        raise ConnectionError(f"the connection ended after {os.path.getsize(path):,} of {total:,} bytes")


def md5(path: str) -> str:
    checksum = hashlib.md5()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            checksum.update(block)
    return checksum.hexdigest()


def unpack(path: str, folder: str, target: str) -> None:
    """Unpack the files of `folder` in an archive to `target`, which is there only when it is whole. Raises OSError."""
    part = f"{target}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    with tarfile.open(path) as archive:
        for member in archive:
            parent, name = os.path.split(member.name)
            if member.isfile() and parent == folder:  # not: a path outside, a link, a device
                with open(os.path.join(part, name), "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)  # type: ignore[arg-type]
    os.rename(part, target)


def fetch(archive: Archive, folder: str, url: str) -> str:
    """Return the folder of the dataset, downloaded and unpacked if it is not there. Raises DownloadError, UsageError.

    An archive that lies there already is checked and kept.
    """
    target, path = os.path.join(folder, archive.folder), os.path.join(folder, archive.name)
    if os.path.lexists(target):
        for name in archive.files:
            if not os.path.isfile(os.path.join(target, name)):
                raise UsageError(f"{target}: there is no {name} in it: remove it, and run the same command again")
        return target
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"{folder}: expected a folder, this is a file")
    own = not os.path.exists(path)
    again = "run the same command again to continue"
    try:
        os.makedirs(folder, exist_ok=True)
        if own:
            part = f"{path}.part"
            download(url, part)
            found = md5(part)
            if found != archive.md5:
                os.remove(part)
                raise DownloadError(f"{url}: its MD5 is {found}, expected {archive.md5}: removed; try again")
            os.replace(part, path)
        elif md5(path) != archive.md5:
            raise UsageError(f"{path}: its MD5 is not {archive.md5}, that of the published archive: move it away")
        unpack(path, archive.folder, target)
    except (OSError, HTTPException, ValueError, tarfile.TarError) as error:  # ValueError: url is no address
        at = getattr(error, "filename", None) or url  # of an HTTPError, the url
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DownloadError(f"{at}: {reason}; {again}") from error
    if own:
        os.remove(path)
    return target


def main() -> int:
    parser = OneLineParser("tools/download_cifar.py", (__doc__ or "").splitlines()[0])
    parser.add_argument("classes", choices=list(ARCHIVES), help="10 for CIFAR-10, 100 for CIFAR-100")
    parser.add_argument("folder", type=nonempty_path, help="where to put it")
    parser.add_argument(
        "--url", default=URL, help="a mirror: the address in front of the archive's name (default: %(default)s)"
    )
    args = parser.parse_args()
    archive = ARCHIVES[args.classes]
    target = fetch(archive, args.folder, f"{args.url.rstrip('/')}/{archive.name}")
    console.result(f"=> {target}: train with `python main.py {target} @recipes/cifar{args.classes}.txt --amp`")
    return 0


if __name__ == "__main__":
    console.run_script(main)
