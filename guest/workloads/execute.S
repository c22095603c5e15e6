# execute: calls functions that lie in its pages, one inside each page and one across each boundary of two pages.  The
# host has put them there: mov rax, imm64; ret.  The checksum is over what they return.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

# Call the function at `address` and take its result into the checksum; it may use nothing but rax.
.macro call_function address
    call \address
    add r10, rax
    add rbx, r10
    inc r11
.endm

.text
.globl workload_execute
workload_execute:
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]
    movabs rbp, GAMMA
    xor ebx, ebx
    xor r10d, r10d
    xor r11d, r11d
1:  mov rcx, r12
    mov rdx, r12
    imul rdx, rbp
    shr rdx, 64 - 8
    page_address rcx, rsi
    lea rdx, [rcx + 8 * rdx + EXECUTE_OFFSET]
    call_function rdx
    inc r12
    inc qword ptr [rdi + BLOCK_PROGRESS]
    dec r13
    jz 2f
    compare_with_hole r12, rdx          # the next page is on the other side of the hole
    je 1b
    lea rdx, [rcx + EXECUTE_CROSSING]
    call_function rdx
    jmp 1b
2:  mov rax, r10
    finish_checksum
    mov rdx, r11
    ret
