# touch: one access to a page, `touches` times, in strided or random order.  A read takes the word that the page's
# number picks; a write stores a value of the vCPU's own in one of the 32 words that are the vCPU's in every page.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_touch
workload_touch:
    mov r8, [rdi + BLOCK_SEED]
    mov r9, [rdi + BLOCK_PAGE_COUNT]
    mov r10, [rdi + BLOCK_TOUCHES]
    mov r11, [rdi + BLOCK_FIRST_PAGE]
    mov r14, [rdi + BLOCK_STRIDE]
    mov r15, rsi
    shl r15, 5                          # first of the vCPU's 32 words
    movabs rbp, GAMMA
    xor eax, eax
    xor ebx, ebx
    xor r12d, r12d                      # strided: the next page
    xor r13d, r13d                      # strided: the page this lap began with
    cmp dword ptr [rdi + BLOCK_ORDER], ORDER_RANDOM
    jne next_strided
    mov r12, r8                         # random: the generator's state

next_random:
    add r12, rbp
    mov rcx, r12
    mix rcx, rdx
    shr rcx, 32
    imul rcx, r9
    shr rcx, 32
    jmp access

# Laps of every stride-th page, each one page further than the last: all pages once before any comes again.
next_strided:
    mov rcx, r12
    add r12, r14
    cmp r12, r9
    jb access
    inc r13
    cmp r13, r14
    jb 1f
    xor r13d, r13d
1:  mov r12, r13

access:
    add rcx, r11
    mov rdx, rcx
    imul rdx, rbp
    cmp dword ptr [rdi + BLOCK_WRITE], 0
    jne write
    shr rdx, 64 - 9
    page_address rcx, rsi
    accumulate [rcx+8*rdx]
    jmp accessed

write:
    lea rsi, [rdx + rbp]
    add rsi, r8
    shr rdx, 64 - 5
    add rdx, r15
    page_address rcx, rbp
    lea rcx, [rcx + 8 * rdx]
    mix rsi, rbp
    mov [rcx], rsi
    accumulate rsi
    movabs rbp, GAMMA

accessed:
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r10
    jz 2f
    cmp dword ptr [rdi + BLOCK_ORDER], ORDER_RANDOM
    je next_random
    jmp next_strided

2:  finish_checksum
    mov rdx, [rdi + BLOCK_TOUCHES]
    ret
