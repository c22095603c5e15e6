"""Signals of a vCPU thread: the kick, and the SIGBUS that carries a poisoned address.

Both are blocked in the thread and let through only while it is inside KVM_RUN
(KVM_SET_SIGNAL_MASK).  A signal that arrives makes KVM_RUN return EINTR and stays pending, so no
handler ever runs; it must then be taken, or every later KVM_RUN returns at once.
"""

from __future__ import annotations

import ctypes
import signal

from kvmdp.abi.libc import libc_held
from kvmdp.abi.signal import siginfo_t, sigset_mask, timespec

KICK_SIGNAL = signal.SIGUSR1

_GLIBC_SIGSET_WORDS = 16
_SIGBUS = int(signal.SIGBUS)  # on the way of every fault: a plain integer is compared without a call


class VcpuSignals:
    """The pending signals of the calling thread; make one in each vCPU thread, use it only there.

    Making it blocks `KICK_SIGNAL`, SIGBUS and SIGINT in the thread; `run_mask` is the
    64-bit mask for KVM_SET_SIGNAL_MASK, with the first two let through.
    """

    def __init__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL, signal.SIGBUS, signal.SIGINT})
        blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}
        awaited = {int(KICK_SIGNAL), int(signal.SIGBUS)}
        self.run_mask = sigset_mask(blocked - awaited)
        # Made once: taking a signal is on the path of every fault of the marker trap.
        self._info = siginfo_t()
        words = (ctypes.c_uint64 * _GLIBC_SIGSET_WORDS)(sigset_mask(awaited))
        self._set = words
        self._arguments = (ctypes.byref(words), ctypes.byref(self._info), ctypes.byref(timespec(0, 0)))
        self._take = libc_held.sigtimedwait

    def restore(self) -> None:
        """Give the thread back the mask it had, with nothing of ours pending."""
        self.take()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def take(self) -> tuple[int, int] | None:
        """Take all that is pending and return the SIGBUS's (hva, code), or None if there was none.

        A kick says nothing by itself: the kicker has set a flag that the thread looks at. A
        second SIGBUS cannot be pending: the vCPU raises one and stops.
        """
        found = None
        while True:
            number = self._take(*self._arguments)
            if number < 0:  # EAGAIN: nothing more
                return found
            if number == _SIGBUS:
                found = self._info.si_addr, self._info.si_code
