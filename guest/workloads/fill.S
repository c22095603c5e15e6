# fill: writes every word of its pages.  The words of a page count up by GAMMA from a key made of seed and page number.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_fill
workload_fill:
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]
    movabs rbp, GAMMA
    xor eax, eax
    xor ebx, ebx
1:  lea r10, [r12 + 1]
    imul r10, rbp
    add r10, [rdi + BLOCK_SEED]
    mix r10, r11
    mov r8, r12
    page_address r8, r9
    mov ecx, WORDS_PER_PAGE / 8
2:  .set step, 0
    .rept 8
    mov [r8 + 8 * step], r10
    accumulate r10
    add r10, rbp
    .set step, step + 1
    .endr
    add r8, 8 * 8
    dec ecx
    jnz 2b
    inc r12
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r13
    jnz 1b
    finish_checksum
    mov rdx, [rdi + BLOCK_PAGE_COUNT]
    shl rdx, 9                          # WORDS_PER_PAGE
    ret
