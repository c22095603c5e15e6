# vpgatherdd whose four lanes are one word of an absent page.  Checksum: that word.
.intel_syntax noprefix
.globl _start
_start: mov eax, 0x101000
    vpcmpeqd xmm1, xmm1, xmm1
    vpxor xmm2, xmm2, xmm2
    vpgatherdd xmm0, [rax+xmm2*4], xmm1
    vmovd eax, xmm0
    mov edx, 1
    ret
