# A guest program: counts the pages of RAM that begin with a zero word, and returns the number as its checksum.
#
#   as --64 -I guest -o hello.o guest/examples/hello.S
#   ld -Ttext 0xD0100000 --oformat binary -o hello.bin hello.o
#   kvmdp run --guest hello.bin

.intel_syntax noprefix
.include "abi.inc"

.globl _start
_start:                                 # rdi = parameter block, rsi = vCPU index
    mov rcx, [rdi + BLOCK_PAGE_COUNT]
    mov r8, rcx                         # accesses
    xor eax, eax
    xor edx, edx                        # gpa
    mov r9, [rdi + BLOCK_LOW_RAM_END]
1:  cmp rdx, r9
    jne 2f
    movabs rdx, HIGH_RAM_BASE
2:  cmp qword ptr [rdx], 1              # carry if the word is zero
    adc rax, 0
    inc qword ptr [rdi + BLOCK_PROGRESS]
    add rdx, 4096
    dec rcx
    jnz 1b
    mov rdx, r8
    ret                                 # done: rax = checksum, rdx = accesses
