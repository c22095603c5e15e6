"""A guest on memory that is always present: what demand paging must not change."""

import contextlib
import ctypes
import threading

import numpy as np

from kvmdp.abi.mman import MADV_NOHUGEPAGE
from kvmdp.kvm import Cap, Interrupted, Io, Kvm
from kvmdp.machine.boot import BootSlot, guest_cpuid, set_boot_state, stock_image, vector_flags
from kvmdp.machine.disk import DiskDevice, DiskFile
from kvmdp.machine.guest_abi import DISK_DOORBELL_PORT, LOOPBACK_PORT
from kvmdp.machine.page_tables import PageTables
from kvmdp.machine.ports import Loopback, Ports
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE

TIMEOUT_SECONDS = 60


class PlainMemory:
    """`MemoryAccess` to RAM that is always present: a view of it, in the order of the RAM file."""

    def __init__(self, view, layout):
        self._view = view
        self._layout = layout

    def _at(self, gpa, length):
        page = self._layout.page_of_gpa(gpa)
        last = self._layout.page_of_gpa(gpa + max(length, 1) - 1)
        if page is None or last is None:
            raise ValueError(f"gpa {gpa:#x} is not guest RAM")
        at = page * PAGE_SIZE + gpa % PAGE_SIZE
        return slice(at, at + length)

    def read(self, gpa, length):
        return bytes(self._view[self._at(gpa, length)])

    def write(self, gpa, data):
        self._view[self._at(gpa, len(data))] = data

    def readv(self, segments):
        return b"".join(self.read(*each) for each in segments)

    def writev(self, segments, data):
        places = [self._at(*each) for each in segments]
        for place in places:
            length = place.stop - place.start
            self._view[place], data = data[:length], data[length:]

    def load64(self, gpa):
        return int.from_bytes(self.read(gpa, 8), "little")

    def store64(self, gpa, value):
        self.write(gpa, value.to_bytes(8, "little"))


class PlainGuest:
    """RAM of `memory_bytes`, zeros to begin with, and as many vCPUs as `blocks` has parameter blocks.

    `ram` is RAM as uint64[pages, 512]; `blocks` the parameter blocks in place; `vcpus` the vCPUs.
    """

    def __init__(self, memory_bytes, blocks, program=b""):
        with contextlib.ExitStack() as stack:
            layout = GuestLayout(memory_bytes)
            self._mapping = stack.enter_context(contextlib.closing(Mapping.anonymous(memory_bytes)))
            self._mapping.advise(MADV_NOHUGEPAGE)
            self.ram = np.frombuffer(self._mapping.view, dtype=np.uint64).reshape(layout.pages, -1)
            stack.callback(self._drop_views)
            kvm = stack.enter_context(Kvm())
            vm = stack.enter_context(kvm.create_vm())
            if vm.check_extension(Cap.EXIT_ON_EMULATION_FAILURE):
                vm.enable_cap(Cap.EXIT_ON_EMULATION_FAILURE, 1)
            tables = PageTables(layout, paged=False)
            self.boot = stack.enter_context(contextlib.closing(BootSlot(tables, stock_image(), program)))
            self.boot.map_into(vm)
            for slot, region in enumerate(layout.regions, start=1):
                vm.set_user_memory_region(slot, region.gpa, region.size, self._mapping.hva + region.offset)
            cpuid = guest_cpuid(kvm)
            self.vector_flags = vector_flags(kvm)
            self.blocks, self.vcpus = [], []
            self._ports = Ports()
            Loopback(self._ports, len(blocks))
            self._disk_file = stack.enter_context(DiskFile.temporary(memory_bytes))
            self._memory = PlainMemory(self._mapping.view, layout)
            self._ports.add(DISK_DOORBELL_PORT, self._serve_disk)
            for index, block in enumerate(blocks):
                place = self.boot.parameters(index)
                ctypes.pointer(place)[0] = block
                vcpu = stack.enter_context(vm.create_vcpu(index))
                set_boot_state(vcpu, cpuid, self.vector_flags, tables)
                self.blocks.append(place)
                self.vcpus.append(vcpu)
            self._stack = stack.pop_all()

    def run(self):
        """Run all vCPUs to their first report, halt or error; return that of each: a number or the exit."""
        self.ends = [None] * len(self.vcpus)
        threads = [threading.Thread(target=self._run, args=(vcpu,)) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        for thread, vcpu in zip(threads, self.vcpus, strict=True):
            thread.join(TIMEOUT_SECONDS)
            if thread.is_alive():
                vcpu.kick()
                thread.join()
        return self.ends

    def _run(self, vcpu):
        vcpu.attach_thread()
        exit_ = vcpu.run()
        while isinstance(exit_, Io) and exit_.port in (LOOPBACK_PORT, DISK_DOORBELL_PORT):
            self._ports.handle(vcpu.index, exit_)
            exit_ = vcpu.run()
        if isinstance(exit_, Io):
            self.ends[vcpu.index] = int.from_bytes(exit_.data, "little")
        elif isinstance(exit_, Interrupted):
            self.ends[vcpu.index] = f"timeout at {vcpu.regs.rip:#x}"
        else:
            self.ends[vcpu.index] = exit_
        vcpu.detach_thread()

    def _serve_disk(self, vcpu, io):
        DiskDevice(self._memory, self._disk_file).serve(int.from_bytes(io.data, "little") * PAGE_SIZE)

    def pages_in_memory(self):
        """Return the numbers of the RAM pages that have been accessed by whomever (Documentation: pagemap)."""
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self._mapping.hva // PAGE_SIZE * 8)
            entries = np.frombuffer(pagemap.read(len(self.ram) * 8), dtype=np.uint64)
        return np.flatnonzero(entries >> np.uint64(62))  # present or swapped

    def _drop_views(self):
        del self.ram

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.blocks.clear()
        self._stack.close()


def random_ram(patches, memory_bytes, seed=1):
    """Return random RAM with the patches in it: uint64[pages, 512]."""
    ram = np.random.default_rng(seed).integers(0, 1 << 64, memory_bytes // 8, dtype=np.uint64)
    raw = ram.view(np.uint8)
    for offset, data in patches:
        raw[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return ram.reshape(-1, PAGE_SIZE // 8)
