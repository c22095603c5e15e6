# lzcnt of an absent word, then of the same word, now present.  Checksum: 0 if both agree, else (first << 32) | second.
.intel_syntax noprefix
.globl _start
_start: mov edx, 1
    lzcnt rax, qword ptr [0x101000]
    lzcnt rcx, qword ptr [0x101000]
    cmp rax, rcx
    je 1f
    shl rax, 32
    or rax, rcx
    ret
1:  xor eax, eax
    ret
