# The table of workloads; a workload's number is its place here and in kvmdp/machine/guest_abi.py.

.intel_syntax noprefix
.include "abi.inc"

.section .rodata
.balign 8, 0
.globl workloads
workloads:
    .quad PROGRAM_BASE                  # 0: a flat binary put there by the host
    .quad workload_checksum
    .quad workload_touch
    .quad workload_fill
    .quad workload_atomic
    .quad workload_copy
    .quad workload_execute
    .quad workload_vector
    .quad workload_string
    .quad workload_clock
    .quad workload_disk
    .quad workload_poison
workloads_end:

.globl workload_count
workload_count:
    .quad (workloads_end - workloads) / 8
