"""Machine checks for uncorrected memory errors, as the hardware reports one to software that can go on.

A load or a fetch that meets one is a *software recoverable action required* error (SRAR): the data is lost, the CPU's
state is not, and the program cannot go on without. A store does not wait for memory: its data is lost when the cache
writes it back, and the program is past it. That is a *software recoverable action optional* error (SRAO). Sources:
Intel SDM volume 3, chapter "Machine-Check Architecture": IA32_MCG_CAP, IA32_MCG_STATUS, IA32_MCi_STATUS, IA32_MCi_MISC,
and the error codes of SRAR and SRAO errors. Linux grades them in arch/x86/kernel/cpu/mce/severity.c: on an Intel CPU it
takes the page of such an SRAO error offline, and ignores an SRAR error with EIPV clear, for it is another thread's. KVM
takes these reports on other makers' CPUs too; they are in Intel's terms there as well. What the ioctls do with them:
Documentation/virt/kvm/api.rst, KVM_X86_SETUP_MCE and KVM_X86_SET_MCE.

Units: gpa in bytes.
"""

from __future__ import annotations

import enum

from kvmdp.abi.kvm_x86 import kvm_x86_mce

MC_VECTOR = 18

# IA32_MCG_CAP: number of banks in the low byte, and
MCG_SER_P = 1 << 24  # errors that software can recover from are told apart

# IA32_MCG_STATUS
MCG_STATUS_RIPV = 1 << 0  # the interrupted program can be gone on with
MCG_STATUS_EIPV = 1 << 1  # RIP is that of the instruction that met the error
MCG_STATUS_MCIP = 1 << 2  # a machine check is being dealt with: another one shuts the CPU down

# IA32_MCi_STATUS
MCI_STATUS_VAL = 1 << 63
MCI_STATUS_UC = 1 << 61
MCI_STATUS_EN = 1 << 60
MCI_STATUS_MISCV = 1 << 59
MCI_STATUS_ADDRV = 1 << 58
MCI_STATUS_S = 1 << 56  # signalled by #MC
MCI_STATUS_AR = 1 << 55  # action required: the access cannot be made good
MCACOD_DATA_LOAD = 0x134  # SRAR: cache hierarchy, data read, level 0
MCACOD_INSTRUCTION_FETCH = 0x150  # SRAR: cache hierarchy, instruction fetch, level 0
MCACOD_LAST_LEVEL_WRITE_BACK = 0x17A  # SRAO: cache hierarchy, explicit write-back of the last level

# IA32_MCi_MISC: how many low bits of the address mean nothing, and that it is a physical one
_MISC_PAGE_LSB = 12
_MISC_PHYSICAL = 2 << 6

BANKS = 10  # as many as QEMU gives a guest
# Intel's numbering: the first are the core's own. Which of those behind is the last level cache's depends on the model.
FETCH_BANK = 0  # the instruction fetch unit's
DATA_BANK = 1  # the data cache's: it is the load that meets the error
LAST_LEVEL_BANK = BANKS - 1


class PoisonedAccess(enum.Enum):
    """What has met poisoned memory."""

    LOAD = enum.auto()  # RIP is at the instruction, which has not happened
    FETCH = enum.auto()  # of the instruction that RIP is at
    LOST_STORE = enum.auto()  # of an instruction that is done with: RIP is behind it


def guest_mcg_cap(supported: int) -> int | None:
    """Return the MCG_CAP to give a guest, None if KVM's `supported` bits do not do (`Kvm.mce_capabilities`)."""
    return BANKS | MCG_SER_P if supported & MCG_SER_P else None


def memory_error(gpa: int, access: PoisonedAccess) -> kvm_x86_mce:
    """Return the report of an access to the poisoned page that holds `gpa`."""
    required, code, bank, at_access = {
        PoisonedAccess.LOAD: (MCI_STATUS_AR, MCACOD_DATA_LOAD, DATA_BANK, MCG_STATUS_EIPV),
        PoisonedAccess.FETCH: (MCI_STATUS_AR, MCACOD_INSTRUCTION_FETCH, FETCH_BANK, MCG_STATUS_EIPV),
        PoisonedAccess.LOST_STORE: (0, MCACOD_LAST_LEVEL_WRITE_BACK, LAST_LEVEL_BANK, 0),
    }[access]
    status = MCI_STATUS_VAL | MCI_STATUS_UC | MCI_STATUS_EN | MCI_STATUS_MISCV | MCI_STATUS_ADDRV
    return kvm_x86_mce(
        status=status | MCI_STATUS_S | required | code,
        addr=gpa >> _MISC_PAGE_LSB << _MISC_PAGE_LSB,
        misc=_MISC_PHYSICAL | _MISC_PAGE_LSB,
        mcg_status=MCG_STATUS_MCIP | MCG_STATUS_RIPV | at_access,
        bank=bank,
    )
