# atomic: adds `amount` to one word of each page with a locked instruction, `iterations` times over all pages.  Every
# vCPU uses the same words in an order of its own: from `start`, in steps of `stride` modulo the number of pages.
# The checksum is the sum of all amounts added.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_atomic
workload_atomic:
    mov r8, [rdi + BLOCK_ITERATIONS]
    mov r9, [rdi + BLOCK_PAGE_COUNT]
    mov r11, [rdi + BLOCK_FIRST_PAGE]
    mov r12, [rdi + BLOCK_START]
    mov r14, [rdi + BLOCK_STRIDE]
    mov r15, [rdi + BLOCK_AMOUNT]
    movabs rbp, GAMMA
    xor ebx, ebx
    xor r10d, r10d
next_pass:
    mov r13, r9
next_page:
    lea rcx, [r12 + r11]
    mov rdx, rcx
    imul rdx, rbp
    shr rdx, 64 - 9
    page_address rcx, rsi
    lea rcx, [rcx + 8 * rdx]
    mov eax, [rdi + BLOCK_OPERATION]
    cmp eax, OPERATION_INC
    je increment
    cmp eax, OPERATION_XADD
    je exchange_add
    cmp eax, OPERATION_CMPXCHG
    je compare_exchange
    lock add [rcx], r15
    jmp added

increment:
    lock inc qword ptr [rcx]
    jmp added

exchange_add:
    mov rax, r15
    lock xadd [rcx], rax
    jmp added

compare_exchange:
    mov rax, [rcx]
1:  lea rdx, [rax + r15]
    lock cmpxchg [rcx], rdx
    jne 1b

added:
    add rbx, r15
    inc r10
    inc qword ptr [rdi + BLOCK_PROGRESS]
    add r12, r14
    cmp r12, r9
    jb 2f
    sub r12, r9
2:  dec r13
    jnz next_page
    dec r8
    jnz next_pass
    mov rax, rbx
    mov rdx, r10
    ret
