# movbe from an absent page.  Checksum: the word at 0x101000, its bytes reversed.
.intel_syntax noprefix
.globl _start
_start: mov edx, 1
    movbe rax, [0x101000]
    ret
