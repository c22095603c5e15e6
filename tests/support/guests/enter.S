# enter with a nesting level, its stack and its frames in absent pages.  Checksum: the frame pointers it pushed, added.
.intel_syntax noprefix
.globl _start
_start: mov rcx, rsp
    mov rsi, rbp
    mov esp, 0x102000
    mov ebp, 0x104000
    enter 0x20, 2
    mov rax, [rbp]                      # the frame pointer as it was, the outer frame's, this frame's
    add rax, [rbp - 8]
    add rax, [rbp - 16]
    mov rsp, rcx
    mov rbp, rsi
    mov edx, 1
    ret
