# The guest's side of the table of instruction forms: asks the host for one, loads every register, runs it, leaves every
# register.  GS is where a vCPU finds its scratch area when no register is left for that.  exchange.py has the host's view
# of the numbers here.

.intel_syntax noprefix
.include "abi.inc"

.set NEXT_PORT, 0x540
.set IDT_PORT, 0x548                    # gives the address of the interrupt table
.set SLOTS_OFFSET, 0x1000               # where the forms begin, from the program's start

# Where things lie in the scratch part of the parameter block.  First what a form leaves:
.set LEFT_FX, 0x000
.set LEFT_YMM, 0x200                    # the upper halves
.set LEFT_REGISTERS, 0x300
.set LEFT_FLAGS, 0x380
.set LEFT_SELECTORS, 0x388              # CS, SS, DS, ES, FS
.set STACK, 0x398
.set MEETING, 0x3A0                     # in that of vCPU 0: how often vCPUs have come to a form, all together
.set HOME_SELECTORS, 0x3A8              # DS, ES, FS as the driver found them
.set DONE, 0x3B0                        # written by the driver: where forms end
# Written by the handler of single steps: how many there were, DR6 at the first, and the RIP it came to.
.set STEPS, 0x480
.set STEP_DR6, 0x488
.set STEP_RIP, 0x490
# What the host gives:
.set ENTRY, 0x3B8                       # 0: there is none left
.set MEET_AT, 0x3C0                     # not 0: wait until MEETING is that
.set HAS_AVX, 0x3C8
.set GIVEN_FLAGS, 0x3D0
.set FS_BASE, 0x3D8                     # not 0: set the base of FS
.set SELF, 0x3E0                        # written by the driver: the address of all this
.set GIVEN_REGISTERS, 0x400
.set GIVEN_FX, 0x500
.set GIVEN_YMM, 0x700

.set INTERRUPTS, 16 * (GATE_VECTOR + 1)  # bytes

.set MSR_FS_BASE, 0xC0000100
.set MSR_GS_BASE, 0xC0000101

# The end of a form's code, wherever that lies.
.macro end_form
    jmp qword ptr gs:[DONE]
.endm

.macro store_register register, number
    mov gs:[LEFT_REGISTERS + 8 * \number], \register
.endm

.macro load_register register, number
    mov \register, gs:[GIVEN_REGISTERS + 8 * \number]
.endm

# In the order of the instruction set's numbers; RSP, which is number 4, goes by itself.
.macro all_registers what
    \what rax, 0
    \what rcx, 1
    \what rdx, 2
    \what rbx, 3
    \what rbp, 5
    \what rsi, 6
    \what rdi, 7
    \what r8, 8
    \what r9, 9
    \what r10, 10
    \what r11, 11
    \what r12, 12
    \what r13, 13
    \what r14, 14
    \what r15, 15
.endm

.macro store_upper_halves
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vextractf128 gs:[LEFT_YMM + 16 * \number], ymm\number, 1
    .endr
.endm

.macro load_upper_halves
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vinsertf128 ymm\number, ymm\number, gs:[GIVEN_YMM + 16 * \number], 1
    .endr
.endm

start:
    lea rdi, [rdi + BLOCK_SCRATCH]
    mov ecx, MSR_GS_BASE
    call set_msr
    mov gs:[SELF], rdi
    call handle_single_steps
    mov gs:[STACK], rsp
    lea rax, [rip + done]
    mov gs:[DONE], rax
    mov rdi, gs:[SELF]
    mov [rdi + BLOCK_PF_RESUME - BLOCK_SCRATCH], rax
    mov [rdi + BLOCK_MC_RESUME - BLOCK_SCRATCH], rax
    mov word ptr gs:[LEFT_SELECTORS], cs
    mov word ptr gs:[LEFT_SELECTORS + 2], ss
    mov word ptr gs:[HOME_SELECTORS], ds
    mov word ptr gs:[HOME_SELECTORS + 2], es
    mov word ptr gs:[HOME_SELECTORS + 4], fs

next:
    mov edx, NEXT_PORT
    xor eax, eax
    out dx, eax
    cmp qword ptr gs:[ENTRY], 0
    je finish

    mov ds, word ptr gs:[HOME_SELECTORS]
    mov es, word ptr gs:[HOME_SELECTORS + 2]
    mov fs, word ptr gs:[HOME_SELECTORS + 4]
    mov rdi, gs:[FS_BASE]
    test rdi, rdi
    jz 1f
    mov ecx, MSR_FS_BASE
    call set_msr
1:  mov rdi, gs:[SELF]
    fxrstor [rdi + GIVEN_FX]            # KVM's emulator leaves the base of GS out of this instruction and FXSAVE
    cmp dword ptr gs:[HAS_AVX], 0
    je 1f
    load_upper_halves
1:  mov rcx, gs:[MEET_AT]
    jrcxz 2f
    mov edx, PARAMETERS_BASE + BLOCK_SCRATCH + MEETING
    lock inc qword ptr [rdx]
1:  pause
    cmp [rdx], rcx
    jb 1b
2:  push qword ptr gs:[GIVEN_FLAGS]
    popfq
    all_registers load_register
    mov rsp, gs:[GIVEN_REGISTERS + 8 * 4]
    jmp qword ptr gs:[ENTRY]

done:
    all_registers store_register
    store_register rsp, 4
    mov rsp, gs:[STACK]
    pushfq
    pop qword ptr gs:[LEFT_FLAGS]
    cld
    mov word ptr gs:[LEFT_SELECTORS], cs
    mov word ptr gs:[LEFT_SELECTORS + 2], ss
    mov word ptr gs:[LEFT_SELECTORS + 4], ds
    mov word ptr gs:[LEFT_SELECTORS + 6], es
    mov word ptr gs:[LEFT_SELECTORS + 8], fs
    mov rdi, gs:[SELF]
    fxsave [rdi + LEFT_FX]
    cmp dword ptr gs:[HAS_AVX], 0
    je next
    store_upper_halves
    jmp next

finish:
    mov eax, 1
    mov edx, 1
    ret

# Set the MSR ecx to rdi; rax and rdx are lost.  It needs ring 0.
set_msr:
    mov eax, cs
    test al, 3
    jz 1f
    mov eax, GATE_WRMSR
    int GATE_VECTOR
    ret
1:  mov eax, edi
    mov rdx, rdi
    shr rdx, 32
    wrmsr
    ret

# Have a table of interrupts of our own, which is the guest's but for the gate of #DB.
handle_single_steps:
    mov edx, IDT_PORT
    in eax, dx
    mov esi, eax
    lea rdi, [rip + interrupts]
    mov ecx, INTERRUPTS
    rep movsb
    lea rdi, [rip + interrupts + 16]
    lea rax, [rip + single_step]
    mov [rdi], ax
    shr rax, 16
    mov [rdi + 6], ax
    lea rdi, [rip + interrupts_pointer]
    lea rax, [rip + interrupts]
    mov [rdi + 2], rax
    mov eax, cs
    test al, 3
    jz 1f
    mov eax, GATE_LIDT
    int GATE_VECTOR
    ret
1:  lidt [rdi]
    ret

# Ring 0: note the first step of a form, and go on without.  The guest finds its parameter block as traps.S does.
single_step:
    push rax
    push rdi
    str edi
    sub edi, SELECTOR_TSS
    shl edi, 8
    mov eax, PARAMETERS_BASE + BLOCK_SCRATCH
    add rdi, rax
    inc qword ptr [rdi + STEPS]
    cmp qword ptr [rdi + STEPS], 1
    jne 1f
    mov rax, dr6
    mov [rdi + STEP_DR6], rax
    mov rax, [rsp + 16]
    mov [rdi + STEP_RIP], rax
1:  mov eax, 0xFFFF0FF0
    mov dr6, rax
    and dword ptr [rsp + 32], ~0x100
    pop rdi
    pop rax
    iretq

.balign 8, 0
interrupts_pointer:
    .word INTERRUPTS - 1
    .quad 0
.balign 16, 0
interrupts:
    .fill INTERRUPTS, 1, 0
