# copy: the first half of its pages to the second half, COPY_SHIFT bytes further on, in chunks of COPY_CHUNK bytes, so
# that neither end of a chunk is aligned and chunks cross pages.  Offsets are in RAM order: a chunk ends at the hole.
# The checksum is over the second half, read back.  An access is a byte copied.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_copy
workload_copy:
    mov r15, rdi
    mov r8, [rdi + BLOCK_FIRST_PAGE]
    mov r9, [rdi + BLOCK_PAGE_COUNT]
    shr r9, 1
    mov r13, r9                         # for the sum: pages, and the first of them
    lea r12, [r8 + r9]
    shl r8, PAGE_SHIFT                  # offset of the source
    shl r9, PAGE_SHIFT
    mov r10, r9
    sub r10, COPY_SHIFT                 # bytes left
    mov r14, r10
    lea r9, [r8 + r9 + COPY_SHIFT]      # offset of the destination
next_chunk:
    mov ecx, COPY_CHUNK
    cmp rcx, r10
    cmova rcx, r10
    end_at_hole r8, rcx, rax
    end_at_hole r9, rcx, rax
    offset_address r8, rsi, rax
    offset_address r9, rdi, rax
    add r8, rcx
    add r9, rcx
    sub r10, rcx
    rep movsb
    inc qword ptr [r15 + BLOCK_PROGRESS]
    test r10, r10
    jnz next_chunk
    mov rdi, r15
    call sum_page_range
    finish_checksum
    mov rdx, r14
    ret
