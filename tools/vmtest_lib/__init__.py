"""The parts of tools/vmtest, which boots stock Debian kernels in QEMU and runs commands in them."""
