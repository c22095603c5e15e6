"""A descriptor of KVM's: `/dev/kvm`, a VM, a vCPU; the one place from which its calls are made.

Source: `Documentation/virt/kvm/api.rst`, section 3: how calls fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from kvmdp.abi import libc
from kvmdp.abi.kvm import KVM_CHECK_EXTENSION
from kvmdp.abi.kvm_cap import Cap
from kvmdp.closing import Closing
from kvmdp.kvm.errors import KvmError, KvmUnsupportedError, failed


class Handle(Closing):
    """An open descriptor, which it owns.

    Arguments: `of`, what is added to the names of calls in errors, as " of vCPU 0"; `asked`, the handle that answers
    KVM_CHECK_EXTENSION where this one does not (a vCPU's is its VM's).
    """

    def __init__(self, fd: int, of: str = "", asked: Handle | None = None) -> None:
        self.fd = fd
        self._of = of
        self._asked = asked or self

    def call(
        self,
        request: int,
        name: str,
        argument: libc.Argument = None,
        *,
        needs: Cap | None = None,
        remedies: Mapping[int, str] | None = None,
        details: Callable[[], str] | None = None,
    ) -> int:
        """Make an ioctl; return its non-negative result.

        `name` names it in errors, and `details()`, which only an error asks for, says what it was about; `needs` is the
        capability that gates it; `remedies` says by errno what would help.
        Raises KvmError with the kernel's errno; a KvmUnsupportedError, which is an UnsupportedError too, if the reason
        is that this KVM lacks `needs`; TypeError if `argument` has not the size that the request encodes.
        """
        try:
            return libc.ioctl(self.fd, request, argument, name)
        except OSError as error:
            name += details() if details is not None else ""
            raise self._failed(error, name + self._of, needs, remedies) from None

    def _failed(
        self, error: OSError, name: str, needs: Cap | None, remedies: Mapping[int, str] | None
    ) -> KvmError:
        # Asked only now: a call that works pays nothing. KVM has no errno of its own for a call that it does not know.
        if needs is not None and self._lacks(needs):
            return KvmUnsupportedError(error.errno or 0, name, _lacking(needs))
        return failed(error, name, remedies)

    def _lacks(self, capability: Cap) -> bool:
        try:
            return self.check_extension(capability) == 0
        except KvmError:  # closed: then that is why the call failed
            return False

    def check_extension(self, capability: Cap) -> int:
        """Return what KVM_CHECK_EXTENSION says of `capability`: 0 if it is absent. Raises KvmError if closed."""
        return self._asked.call(
            KVM_CHECK_EXTENSION, f"KVM_CHECK_EXTENSION of {capability.in_header}", capability
        )

    def require(self, capability: Cap, bits: int = 0) -> None:
        """Raise KvmUnsupportedError unless KVM has `capability`, with all `bits` in its value; KvmError if closed."""
        value = self.check_extension(capability)
        if not value or value & bits != bits:
            raise KvmUnsupportedError(
                errno.EOPNOTSUPP, f"use of {capability.in_header}{self._of}", _lacking(capability, bits)
            )

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _lacking(capability: Cap, bits: int = 0) -> str:
    what = f"{capability.in_header} with {bits:#x}" if bits else capability.in_header
    return f"this KVM lacks {what}: use a newer kernel, or another host"
