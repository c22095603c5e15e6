# checksum: reads every word of its pages in RAM order.  `tail_words` words follow in the pages of later vCPUs, so
# that the checksums of all vCPUs add up to the one of all pages.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_checksum
workload_checksum:
    call sum_pages
    mov rcx, [rdi + BLOCK_TAIL_WORDS]
    imul rcx, rax
    add rbx, rcx
    finish_checksum
    ret

# Sum the words of `page_count` pages from `first_page` on; rdi = parameter block.  Leaves a in rax, b in rbx and
# the number of words in rdx.
.globl sum_pages
sum_pages:
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]

# The same for r13 pages from r12 on.
.globl sum_page_range
sum_page_range:
    mov rdx, r13
    shl rdx, 9                          # WORDS_PER_PAGE
    xor eax, eax
    xor ebx, ebx
2:  mov r8, r12
    page_address r8, r9
    accumulate_page r8, ecx
    inc r12
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r13
    jnz 2b
    ret
