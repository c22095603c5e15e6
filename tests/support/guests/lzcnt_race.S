# Two vCPUs, in step, count zeros in the same absent pages.  Checksum: how often a count differs from a second one.
.intel_syntax noprefix
.globl _start
_start: push rbx
    mov r11d, 0xD0180000
    mov r8d, 0x1000               # first page... 0x1000 on
    xor r9d, r9d                  # round
    xor ebx, ebx                  # wrong ones
    mov r10d, 500
1:  inc r9d
    lock inc dword ptr [r11]
    lea ecx, [r9d*2]
2:  cmp dword ptr [r11], ecx
    jae 3f
    pause
    jmp 2b
3:  lzcnt rax, qword ptr [r8]
    lzcnt rcx, qword ptr [r8]
    cmp rax, rcx
    je 4f
    inc rbx
4:  add r8d, 4096
    dec r10d
    jnz 1b
    mov rax, rbx
    mov edx, 500
    pop rbx
    ret
