# vector: loads, changes and stores 16 bytes (SSE2) and, if a flag allows, 32 bytes (AVX2, or AVX without integers),
# inside each page and across each boundary of two pages, never aligned.  A boundary gets the 32-byte access if the
# flag allows it and its lower page is odd.  The checksum is over the words stored; an access is a load or a store.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.macro access_sse address
    movdqu xmm0, [\address]
    paddq xmm0, xmm1
    movups [\address], xmm0
    accumulate [\address]
    accumulate [\address+8]
    add r11, 2
.endm

.macro access_avx address
    test r10d, FLAG_AVX2
    jz 1f
    vmovdqu ymm0, [\address]
    vpaddq ymm0, ymm0, ymm2
    vmovdqu [\address], ymm0
    jmp 2f
1:  vmovups ymm0, [\address]
    vxorps ymm0, ymm0, ymm2
    vmovups [\address], ymm0
2:  accumulate [\address]
    accumulate [\address+8]
    accumulate [\address+16]
    accumulate [\address+24]
    add r11, 2
.endm

.text
.globl workload_vector
workload_vector:
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]
    mov r10d, [rdi + BLOCK_FLAGS]
    movabs rbp, GAMMA
    xor eax, eax
    xor ebx, ebx
    xor r11d, r11d
    movdqu xmm1, [rip + addend]
    test r10d, FLAG_AVX
    jz next_page
    vmovdqu ymm2, [rip + addend]

next_page:
    mov rdx, r12
    imul rdx, rbp
    shr rdx, 64 - 8
    mov r8, r12
    page_address r8, r9
    lea rcx, [r8 + 4 * rdx + VECTOR_SSE_OFFSET]
    access_sse rcx
    test r10d, FLAG_AVX
    jz boundary
    lea rcx, [r8 + 4 * rdx + VECTOR_AVX_OFFSET]
    access_avx rcx

boundary:
    mov r14, r12
    inc r12
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r13
    jz done
    compare_with_hole r12, r9           # the next page is on the other side of the hole
    je next_page
    test r14d, 1
    jz boundary_sse
    test r10d, FLAG_AVX
    jz boundary_sse
    lea rcx, [r8 + VECTOR_AVX_CROSSING]
    access_avx rcx
    jmp next_page
boundary_sse:
    lea rcx, [r8 + VECTOR_SSE_CROSSING]
    access_sse rcx
    jmp next_page

done:
    finish_checksum
    mov rdx, r11
    ret

.section .rodata
.balign 8, 0
addend:
    .quad VECTOR_ADDEND_0, VECTOR_ADDEND_1, VECTOR_ADDEND_2, VECTOR_ADDEND_3
