"""Files that commands are given: memory images, disks, programs. Each function returns what makes one at a path."""

import functools
import os
import random

PAGE = 4096


def _write(path, content):
    path.write_bytes(content)


def holds(content):
    """A file with these bytes."""
    return functools.partial(_write, content=content)


def _sparse(path, size, seed, filled):
    rng = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, size, 16 * PAGE):
            if rng.random() < filled:
                file.seek(start)
                file.write(rng.randbytes(min(rng.randint(1, 16 * PAGE), size - start)))
        file.truncate(size)


def image(size, seed, filled=1.0):
    """A memory image with runs of random bytes, of zeros that were written, and of holes."""
    return functools.partial(_sparse, size=size, seed=seed, filled=filled)


def link(target):
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def folder():
    """A folder."""
    return lambda path: path.mkdir()


def fifo():
    """A FIFO that nobody else has open."""
    return os.mkfifo
