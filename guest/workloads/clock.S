# clock: what KVM writes by itself, into pages that nothing has touched before.  kvmclock in the first of its pages and
# steal time in the second, each if the host has offered it (`pv`).  Each is switched on by an MSR and read as Linux
# does: again until the version is even and the same before and after.  A time is system_time plus the scaled TSC
# ticks since tsc_timestamp.  The checksum says what held: CLOCK_MOVES, the time grew from one reading to the next;
# CLOCK_SET_AGAIN, after a second write of the MSR version and time were others; CLOCK_STEAL, steal time had a version
# that grew with a return from the host.  An access is an MSR write.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.set MSR_KVM_SYSTEM_TIME_NEW, 0x4B564D01
.set MSR_KVM_STEAL_TIME, 0x4B564D03
.set MSR_ENABLED, 1

.set TIME_VERSION, 0                    # pvclock_vcpu_time_info
.set TIME_TSC_TIMESTAMP, 8
.set TIME_SYSTEM_TIME, 16
.set TIME_TSC_TO_SYSTEM_MUL, 24
.set TIME_TSC_SHIFT, 28
.set STEAL_VERSION, 8                   # kvm_steal_time

.set MOST_READINGS, 1000

.text
.globl workload_clock
workload_clock:
    mov r15, rdi
    mov r12, [rdi + BLOCK_FIRST_PAGE]
    xor ebp, ebp                        # what held
    xor r10d, r10d
    test dword ptr [r15 + BLOCK_PV], PV_CLOCK
    jz steal_time
    mov r8, r12
    page_address r8, rax
    add r8, CLOCK_OFFSET
    call set_clock
    call read_clock
    mov [r15 + BLOCK_CLOCK_FIRST], rax
    mov r13, rax
    mov r14d, ebx
    test rax, rax
    jz steal_time
    mov r9d, MOST_READINGS
1:  call read_clock
    cmp rax, r13
    ja 2f
    dec r9d
    jnz 1b
    jmp set_again
2:  or ebp, CLOCK_MOVES
set_again:
    call set_clock
    call read_clock
    mov [r15 + BLOCK_CLOCK_LAST], rax
    mov [r15 + BLOCK_CLOCK_VERSION], rbx
    cmp ebx, r14d
    je steal_time
    cmp rax, r13
    jbe steal_time
    or ebp, CLOCK_SET_AGAIN

steal_time:
    inc qword ptr [r15 + BLOCK_PROGRESS]
    test dword ptr [r15 + BLOCK_PV], PV_STEAL_TIME
    jz done
    lea r8, [r12 + 1]
    page_address r8, rax
    add r8, CLOCK_STEAL_OFFSET
    mov ecx, MSR_KVM_STEAL_TIME
    lea rdi, [r8 + MSR_ENABLED]
    call write_msr
    mov ebx, [r8 + STEAL_VERSION]
    mov edx, LOOPBACK_PORT
    out dx, al                          # a return from the host: KVM counts what was stolen meanwhile
    mov eax, [r8 + STEAL_VERSION]
    mov [r15 + BLOCK_STEAL_VERSION], rax
    test ebx, ebx
    jz done
    test eax, 1
    jnz done
    cmp eax, ebx
    je done
    or ebp, CLOCK_STEAL
done:
    inc qword ptr [r15 + BLOCK_PROGRESS]
    mov eax, ebp
    mov rdx, r10
    ret

# Switch kvmclock on, at r8.
set_clock:
    mov ecx, MSR_KVM_SYSTEM_TIME_NEW
    lea rdi, [r8 + MSR_ENABLED]

# Write rdi to the MSR ecx: in ring 0 oneself, for the gate cannot be relied upon there.
write_msr:
    inc r10
    cmp dword ptr [r15 + BLOCK_RING], 0
    je 1f
    mov eax, GATE_WRMSR
    int GATE_VECTOR
    ret
1:  mov eax, edi
    mov rdx, rdi
    shr rdx, 32
    wrmsr
    ret

# Read the clock at r8: rax = nanoseconds, 0 if it has no valid time; ebx = its version.
read_clock:
    mov r11d, MOST_READINGS
1:  mov ebx, [r8 + TIME_VERSION]
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [r8 + TIME_TSC_TIMESTAMP]
    mov cl, [r8 + TIME_TSC_SHIFT]
    test cl, cl
    js 2f
    shl rax, cl
    jmp 3f
2:  neg cl
    shr rax, cl
3:  mov edx, [r8 + TIME_TSC_TO_SYSTEM_MUL]
    mul rdx
    shrd rax, rdx, 32
    add rax, [r8 + TIME_SYSTEM_TIME]
    cmp ebx, [r8 + TIME_VERSION]
    jne 4f
    test ebx, 1
    jnz 4f
    test ebx, ebx
    jz 5f
    ret
4:  dec r11d
    jnz 1b
5:  xor eax, eax
    ret
