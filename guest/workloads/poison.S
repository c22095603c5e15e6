# poison: reads every word of its pages in RAM order, as checksum does.  A page that gives a machine check is left out as
# a whole: what it had added is taken back, and the walk goes on behind it.  The handler keeps the addresses.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_poison
workload_poison:
    lea rax, [rip + leave_out]
    mov [rdi + BLOCK_MC_RESUME], rax
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]
    xor edx, edx
    xor eax, eax
    xor ebx, ebx
2:  mov r14, rax                        # the checksum without this page
    mov r15, rbx
    mov r8, r12
    page_address r8, r9
    accumulate_page r8, ecx
    add rdx, WORDS_PER_PAGE
3:  inc r12
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r13
    jnz 2b
    mov [rdi + BLOCK_MC_RESUME], r13
    finish_checksum
    ret

leave_out:
    mov rax, r14
    mov rbx, r15
    jmp 3b
