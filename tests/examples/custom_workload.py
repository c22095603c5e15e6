"""A workload of one's own: code for the guest, and beside it what the host expects of that code.

The guest adds 1 to the first word of each page, and returns the sum of what it found there. The host knows from the
source what that must be, so kvmdp can compare the sum and every byte of RAM after the run.

The code is a flat binary, which the machine puts into the guest's program area and calls on every vCPU. What it finds
in which register, and what it returns, is the guest's ABI (guest/README.md). The instructions stand beside the bytes,
so running it takes no assembler.

Run it on a machine with /dev/kvm:  python tests/examples/custom_workload.py [options of kvmdp run]
"""

from __future__ import annotations

import sys

import numpy as np

from kvmdp.cli.main import main
from kvmdp.machine.workloads import PageReader, Workload, register
from kvmdp.machine.workloads.arithmetic import Pages, Words
from kvmdp.memory.layout import LOW_RAM_END
from kvmdp.page import PAGE_SIZE

# RDI is the address of the vCPU's parameter block. RAX is returned as the checksum, RDX as the number of accesses.
CODE = bytes.fromhex(
    "48 8b 57 28"  #             mov rdx, [rdi + 0x28]          first_page
    "48 c1 e2 0c"  #             shl rdx, 12                    its address: RAM below the hole begins at 0
    "48 8b 4f 30"  #             mov rcx, [rdi + 0x30]          page_count
    "31 c0"  #                   xor eax, eax
    "48 03 02"  #            1:  add rax, [rdx]
    "48 ff 02"  #                inc qword ptr [rdx]
    "48 81 c2 00 10 00 00"  #    add rdx, 4096
    "48 ff 87 10 01 00 00"  #    inc qword ptr [rdi + 0x110]    progress
    "48 ff c9"  #                dec rcx
    "75 e7"  #                   jnz 1b
    "48 8b 57 30"  #             mov rdx, [rdi + 0x30]
    "c3"  #                      ret
)


class Increment(Workload):
    """Adds 1 to the first word of each page. The vCPUs have a share of the pages each (`self.shares`)."""

    name = "increment"
    program = CODE
    most_pages = LOW_RAM_END // PAGE_SIZE  # the code walks straight on, and would run into the hole

    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return what each vCPU must return, if RAM held `image` before."""
        return [int(image(share.pages)[:, 0].sum()) for share in self.shares]

    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return what these pages must hold afterwards, a row of 512 words each."""
        content = image(pages).copy()
        content[np.isin(pages, self.touched), 0] += np.uint64(1)
        return content


if __name__ == "__main__":
    register(Increment)
    sys.exit(main(["run", "--workload", "increment", "--trap", "mmio", "--memory", "16M", *sys.argv[1:]]))
