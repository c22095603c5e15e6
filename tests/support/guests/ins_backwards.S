# std; rep insd of three items over the border of two absent pages.  Checksum: the last, and what lies below.
.intel_syntax noprefix
.set N, 3
.globl _start
_start: mov edx, 0x514
    mov eax, 0x44434241
    mov ecx, N
1:  out dx, eax
    loop 1b
    std
    mov edi, 0x101002
    mov ecx, N
    rep insd
    cld
    mov rax, [0x100ff6]         # 4 bytes of the image, then the item stored last
    mov edx, 1
    ret
