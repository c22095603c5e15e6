# string: string instructions, on pages that no other instruction has touched before.  Each page of the first half of
# its pages is paired with one of the second half.  Of a pair, rep movsq and rep stosq write the second; and bytes go
# out of the first to the loopback port (rep outsb; rep outsw across the page's end) and come in to the second from
# there (rep insb).  Ports and memory take turns in coming first, and bytes cross only into a pair where ports come
# first, so that each meets absent pages.  The checksum is over the second half, read back.  An access is a string
# instruction.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.text
.globl workload_string
workload_string:
    mov r15, rdi
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    mov r13, [rdi + BLOCK_PAGE_COUNT]
    shr r13, 1
    lea r14, [r12 + r13]
    push r13
    xor r10d, r10d
    xor ebp, ebp                        # number of the pair
next_pair:
    mov r8, r12
    page_address r8, rax
    mov r9, r14
    page_address r9, rax
    test ebp, 1
    jnz 1f
    call move_strings
    call port_strings
    jmp 2f
1:  call port_strings
    call move_strings
2:  inc qword ptr [r15 + BLOCK_PROGRESS]
    inc rbp
    inc r12
    inc r14
    dec r13
    jnz next_pair
    pop r13
    mov rdi, r15
    sub r14, r13
    mov r12, r14
    call sum_page_range
    finish_checksum
    mov rdx, r10
    ret

# r8, r9 = the pair; r14 = number of the second page.
move_strings:
    lea rsi, [r8 + STRING_MOVE_SOURCE]
    lea rdi, [r9 + STRING_MOVE_TARGET]
    mov ecx, STRING_MOVE_WORDS
    rep movsq
    movabs rax, GAMMA
    imul rax, r14
    lea rdi, [r9 + STRING_STORE_OFFSET]
    mov ecx, STRING_STORE_WORDS
    rep stosq
    add r10, 2
    ret

# r8, r9 = the pair, r12, r14 = the pages' numbers; ebp = the pair's number; r13 = pairs that are left, with this one.
port_strings:
    mov edx, LOOPBACK_PORT
    lea rsi, [r8 + STRING_OUT_OFFSET]
    mov ecx, STRING_OUT_BYTES
    rep outsb
    lea rdi, [r9 + STRING_IN_OFFSET]
    mov ecx, STRING_OUT_BYTES
    rep insb
    add r10, 2
    test ebp, 1
    jnz 1f
    cmp r13, 1                          # the page after this one is not of this half
    je 1f
    lea rdi, [r12 + 1]
    compare_with_hole rdi, rsi          # the next page is on the other side of the hole
    je 1f
    lea rdi, [r14 + 1]
    compare_with_hole rdi, rsi
    je 1f
    lea rsi, [r8 + STRING_CROSSING]
    mov ecx, STRING_CROSSING_WORDS
    rep outsw
    lea rdi, [r9 + STRING_CROSSING]
    mov ecx, STRING_CROSSING_WORDS * 2
    rep insb
    add r10, 2
1:  ret
