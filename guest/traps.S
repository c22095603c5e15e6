# Ring-0 handlers: exceptions and the service gate.  Plain integer instructions only, since some hosts emulate ring 0.

.intel_syntax noprefix
.include "abi.inc"

.set MCG_CAP, 0x179
.set MCG_STATUS, 0x17A
.set MC0_STATUS, 0x401                  # 4 MSRs a bank: CTL, STATUS, ADDR, MISC
.set MC_STATUS_VALID_HIGH, 0x80000000
.set UD_VECTOR, 6
.set PF_VECTOR, 14
.set MC_VECTOR, 18

.set INT_GATE, GATE_VECTOR << 8 | 0xCD  # the bytes of int GATE_VECTOR

# The stack of `exception` once the registers it uses are saved.
.set FRAME_VECTOR, 5 * 8
.set FRAME_ERROR_CODE, 6 * 8
.set FRAME_RIP, 7 * 8
.set FRAME_CS, 8 * 8
.set FRAME_RFLAGS, 9 * 8
.set FRAME_RSP, 10 * 8

# Read the MSR ecx into rax; rdx is lost.
.macro read_msr
    rdmsr
    shl rdx, 32
    or rax, rdx
.endm

# Write 0 to the MSR ecx.
.macro clear_msr
    xor eax, eax
    xor edx, edx
    wrmsr
.endm

# Undo what `exception` and its stub pushed; what is left is the frame for iretq.
.macro restore_registers
    pop rdi
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
.endm

.text
.globl exception
exception:
    push rax
    push rcx
    push rdx
    push rbx
    push rdi
    cmp qword ptr [rsp + FRAME_VECTOR], UD_VECTOR
    je invalid_opcode
record:
    str edi                             # which vCPU this is: (selector - SELECTOR_TSS) / 16
    sub edi, SELECTOR_TSS
    shl edi, 8                          # times PARAMETERS_SIZE / 16
    mov eax, PARAMETERS_BASE
    add rdi, rax

    inc qword ptr [rdi + BLOCK_EXCEPTION_COUNT]
    mov rbx, [rsp + FRAME_VECTOR]
    mov [rdi + BLOCK_EXCEPTION_VECTOR], rbx
    mov rax, [rsp + FRAME_ERROR_CODE]
    mov [rdi + BLOCK_EXCEPTION_ERROR_CODE], rax
    mov rax, cr2
    mov [rdi + BLOCK_EXCEPTION_CR2], rax
    mov rax, [rsp + FRAME_RIP]
    mov [rdi + BLOCK_EXCEPTION_RIP], rax
    mov rax, [rsp + FRAME_RSP]
    mov [rdi + BLOCK_EXCEPTION_RSP], rax
    mov rax, [rsp + FRAME_RFLAGS]
    mov [rdi + BLOCK_EXCEPTION_RFLAGS], rax
    mov rax, [rsp + FRAME_CS]
    mov [rdi + BLOCK_EXCEPTION_CS], rax

    cmp rbx, PF_VECTOR
    je page_fault
    cmp rbx, MC_VECTOR
    je machine_check

report_exception:
    mov eax, REPORT_EXCEPTION
    mov edx, REPORT_PORT
    out dx, eax
    jmp halt

page_fault:
    inc qword ptr [rdi + BLOCK_PF_COUNT]
    mov rax, [rdi + BLOCK_PF_RESUME]

# Go on at rax in the interrupted ring, with the interrupted registers, if the workload has registered an address.
resume:
    test rax, rax
    jz report_exception
    mov [rsp + FRAME_RIP], rax
    restore_registers
    iretq

# KVM without hardware virtualisation (PVM) cannot deliver int from ring 3 and makes it #UD: do what it should have.
invalid_opcode:
    mov rdi, [rsp + FRAME_RIP]
    cmp word ptr [rdi], INT_GATE
    jne ask_host
    add qword ptr [rsp + FRAME_RIP], 2
    restore_registers
    jmp gate

# KVM's emulator makes #UD of an instruction that it has no word for, when that touches memory which is not there; the
# host makes the memory present then, and says so.  RSP is SavedRegisters (README.md, Ports).
ask_host:
    mov edx, REPORT_PORT
    in eax, dx
    test eax, eax
    jz record
    restore_registers
    iretq

machine_check:
    inc qword ptr [rdi + BLOCK_MC_COUNT]
    mov qword ptr [rdi + BLOCK_MC_BANK], -1
    mov ecx, MCG_CAP
    rdmsr
    movzx ebx, al                       # number of banks
    mov ecx, MC0_STATUS
1:  test ebx, ebx
    jz 3f
    rdmsr
    test edx, MC_STATUS_VALID_HIGH
    jnz 2f
    add ecx, 4
    dec ebx
    jmp 1b
2:  shl rdx, 32
    or rax, rdx
    mov [rdi + BLOCK_MC_STATUS], rax
    clear_msr
    lea eax, [rcx - MC0_STATUS]
    shr eax, 2
    mov [rdi + BLOCK_MC_BANK], rax
    inc ecx
    read_msr
    mov [rdi + BLOCK_MC_ADDRESS], rax
    mov rbx, [rdi + BLOCK_MC_COUNT]
    cmp rbx, MC_ADDRESSES
    ja 4f
    mov [rdi + rbx * 8 + BLOCK_MC_ADDRESSES - 8], rax
4:  inc ecx
    read_msr
    mov [rdi + BLOCK_MC_MISC], rax
3:  mov ecx, MCG_STATUS
    read_msr
    mov [rdi + BLOCK_MC_MCG_STATUS], rax
    clear_msr                           # MCIP left set would turn the next machine check into a shutdown
    mov rax, [rdi + BLOCK_MC_RESUME]
    jmp resume

# Function in eax, MSR or control register number in ecx, 64-bit argument in rdi, 64-bit result in rax.  All other
# registers are kept.
.globl gate
gate:
    cmp eax, GATE_HALT
    je halt
    cmp eax, GATE_RDMSR
    je gate_rdmsr
    cmp eax, GATE_WRMSR
    je gate_wrmsr
    cmp eax, GATE_INVLPG
    je gate_invlpg
    cmp eax, GATE_READ_CR
    je gate_read_cr
    cmp eax, GATE_WRITE_CR3
    je gate_write_cr3
    cmp eax, GATE_LIDT
    je gate_lidt
gate_refuse:
    mov rax, -1
    iretq

gate_rdmsr:
    push rdx
    read_msr
    pop rdx
    iretq

gate_wrmsr:
    push rdx
    mov eax, edi
    mov rdx, rdi
    shr rdx, 32
    wrmsr
    pop rdx
    iretq

gate_invlpg:
    invlpg [rdi]
    iretq

gate_read_cr:
    cmp ecx, 0
    je 1f
    cmp ecx, 2
    je 2f
    cmp ecx, 3
    je 3f
    cmp ecx, 4
    jne gate_refuse
    mov rax, cr4
    iretq
1:  mov rax, cr0
    iretq
2:  mov rax, cr2
    iretq
3:  mov rax, cr3
    iretq

gate_write_cr3:
    mov cr3, rdi
    iretq

gate_lidt:
    lidt [rdi]
    iretq
