"""Files that take nothing, for the tests of what becomes of those who write there."""

import contextlib
import os


class Pipe:
    """A pipe that `fill` leaves without room, and whose reader may go; what was read is in `text`."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self.text = ""

    def fill(self):
        """Leave no room in it."""
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, bytes(4096))
        os.set_blocking(self.writer, True)

    def drain(self):
        """Read all that is there, and return all that has been read."""
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.reader, 65536):
                self.text += piece.decode().replace("\0", "")
        return self.text

    def close_reader(self):
        """Let the reader go."""
        os.close(self.reader)
        self.reader = -1

    def close(self):
        """Close both ends."""
        for descriptor in (self.reader, self.writer):
            if descriptor >= 0:
                os.close(descriptor)
        self.reader = self.writer = -1


@contextlib.contextmanager
def full():
    """A disk that is full."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def broken():
    """A pipe without a reader."""
    pipe = Pipe()
    try:
        pipe.close_reader()
        yield pipe.writer
    finally:
        pipe.close()


@contextlib.contextmanager
def stuck():
    """A pipe without room, whose reader reads nothing."""
    pipe = Pipe()
    try:
        pipe.fill()
        yield pipe.writer
    finally:
        pipe.close()


@contextlib.contextmanager
def impatient():
    """The same, and the pipe does not let its writers wait."""
    with stuck() as descriptor:
        os.set_blocking(descriptor, False)
        yield descriptor


KINDS = {"full": full, "broken": broken, "stuck": stuck, "impatient": impatient}
