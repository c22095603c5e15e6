# Entry of every vCPU, descriptor tables, and the way into the workload's ring.

.intel_syntax noprefix
.include "abi.inc"

.set CR4_MCE, 0x40
.set RFLAGS_IOPL3, 0x3002               # ring 3 may use all ports; interrupts stay off
.set TSS_STRIDE, 128
.set IO_BITMAP_PORTS, 0x600
.set ERROR_CODE_VECTORS, 0x60227D00     # bit n: the CPU pushes an error code for vector n
.set IST_DF, 1
.set IST_MC, 2

# Where RAM's hole begins is the same for every vCPU: workloads read it in vCPU 0's block.
.globl low_ram_end
.set low_ram_end, PARAMETERS_BASE + BLOCK_LOW_RAM_END

.section .boot, "awx"
.globl image
image:
    movabs rax, MAGIC
    mov ebx, FAILURE_ABI
    cmp [rdi + BLOCK_MAGIC], rax
    jne check_failed
    cmp dword ptr [rdi + BLOCK_VERSION], VERSION
    jne check_failed
    mov ebx, FAILURE_WORKLOAD
    mov eax, [rdi + BLOCK_WORKLOAD]
    cmp rax, [rip + workload_count]
    jae check_failed

    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    mov eax, esi
    shl eax, 4
    add eax, SELECTOR_TSS
    ltr ax
    mov eax, SELECTOR_DATA3
    mov ds, eax
    mov es, eax
    mov rax, cr4                        # without MCE a machine check shuts the vCPU down
    or rax, CR4_MCE
    mov cr4, rax

    cmp dword ptr [rdi + BLOCK_RING], 0
    je 1f
    mov rax, rsi
    shl rax, 15                         # STACK_SIZE
    mov ecx, STACKS_BASE + STACK_SIZE
    add rax, rcx
    push SELECTOR_DATA3
    push rax
    push RFLAGS_IOPL3
    push SELECTOR_CODE3
    jmp 2f
1:  mov rax, rsp
    push SELECTOR_DATA0
    push rax
    push RFLAGS_IOPL3
    push SELECTOR_CODE0
2:  lea rax, [rip + run_workload]
    push rax
    iretq

# In the workload's ring, on its stack: rdi = parameter block, rsi = vCPU index.
run_workload:
    push rdi
    sub rsp, 8                          # a call leaves rsp as the System V ABI has it at a function's entry
    mov eax, [rdi + BLOCK_WORKLOAD]
    lea rdx, [rip + workloads]
    call [rdx + rax * 8]
    add rsp, 8
    pop rdi
    mov [rdi + BLOCK_CHECKSUM], rax
    mov [rdi + BLOCK_ACCESSES], rdx
    mov eax, REPORT_DONE

# Tell the host eax and halt, from either ring.
.globl report
report:
    mov edx, REPORT_PORT
    out dx, eax
    mov eax, cs
    test al, 3
    jz halt
    mov eax, GATE_HALT
    int GATE_VECTOR

# Ring 0: rdi = parameter block, rbx = FAILURE_*.
check_failed:
    mov [rdi + BLOCK_FAILURE], rbx
    mov eax, REPORT_CHECK_FAILED
    mov edx, REPORT_PORT
    out dx, eax

.globl halt
halt:
    hlt
    jmp halt

# Exception stubs, 16 bytes apart: the stack holds the error code (0 where the CPU gives none) and the vector.
.balign 16, 0xCC
stubs:
.set vector, 0
.rept 32
    .ifeq (ERROR_CODE_VECTORS >> vector) & 1
    push 0
    .endif
    push vector
    jmp exception
    .balign 16, 0xCC
    .set vector, vector + 1
.endr

gate_stub:
    jmp gate

# Descriptors hold addresses in pieces, which no relocation can express.  They can be computed here because this
# section is linked at BOOT_BASE (link.ld asserts it) and all they point to lies in it.
.macro interrupt_gate handler, ist=0, dpl=0
    .word (BOOT_BASE + \handler - image) & 0xFFFF
    .word SELECTOR_CODE0
    .byte \ist, 0x8E | \dpl << 5
    .word (BOOT_BASE + \handler - image) >> 16
    .quad 0
.endm

.balign 16, 0
idt:
.set vector, 0
.rept 32
    .if vector == 8
    interrupt_gate stubs+16*vector, IST_DF
    .elseif vector == 18
    interrupt_gate stubs+16*vector, IST_MC
    .else
    interrupt_gate stubs+16*vector
    .endif
    .set vector, vector + 1
.endr
    .fill 2 * (GATE_VECTOR - 32), 8, 0
    interrupt_gate gate_stub, 0, 3
idt_end:

.balign 16, 0
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # SELECTOR_CODE0
    .quad 0x00CF93000000FFFF            # SELECTOR_DATA0
    .quad 0x00CFF3000000FFFF            # SELECTOR_DATA3
    .quad 0x00AFFB000000FFFF            # SELECTOR_CODE3
.set vcpu, 0
.rept MAX_VCPUS
    .word io_bitmap_end - tss - TSS_STRIDE * vcpu - 1
    .word (BOOT_BASE + tss + TSS_STRIDE * vcpu - image) & 0xFFFF
    .byte ((BOOT_BASE + tss + TSS_STRIDE * vcpu - image) >> 16) & 0xFF
    .byte 0x89, 0
    .byte (BOOT_BASE + tss + TSS_STRIDE * vcpu - image) >> 24
    .quad 0
    .set vcpu, vcpu + 1
.endr
gdt_end:

.balign TSS_STRIDE, 0
tss:
.set vcpu, 0
.rept MAX_VCPUS
    .set stack, STACKS_BASE + STACK_SIZE * vcpu
    .long 0
    .quad stack + RING0_STACK_SIZE      # RSP0
    .quad 0, 0, 0
    .quad stack + 0x1000                # IST_DF
    .quad stack + 0x2000                # IST_MC
    .quad 0, 0, 0, 0, 0, 0
    .word 0, io_bitmap - tss - TSS_STRIDE * vcpu
    .balign TSS_STRIDE, 0
    .set vcpu, vcpu + 1
.endr

# Shared by all TSSs: ring 3 may use the ports below IO_BITMAP_PORTS.  For KVM without hardware virtualisation (PVM),
# which does not keep IOPL 3.  The byte of ones at the end is demanded by the CPU.
io_bitmap:
    .fill IO_BITMAP_PORTS / 8, 1, 0
    .byte 0xFF
io_bitmap_end:

.balign 8, 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
