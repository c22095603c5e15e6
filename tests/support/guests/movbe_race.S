# Two vCPUs, in step, load from the same absent pages with movbe.  Checksum: the last word, its bytes reversed.
.intel_syntax noprefix
.globl _start
_start: mov r11d, 0xD0180000
    mov r8d, 0x1000
    xor r9d, r9d
    mov r10d, 500
1:  inc r9d
    lock inc dword ptr [r11]
    lea ecx, [r9d*2]
2:  cmp dword ptr [r11], ecx
    jae 3f
    pause
    jmp 2b
3:  movbe rax, qword ptr [r8]
    add r8d, 4096
    dec r10d
    jnz 1b
    mov edx, 500
    ret
