"""KVM's paravirtual CPUID leaves and MSRs, after `asm/kvm_para.h` (x86).

The MSRs that enable a feature name a guest-physical address; from then on KVM writes there by
itself, with no vCPU access that could trap.
"""

from __future__ import annotations

KVM_CPUID_SIGNATURE = 0x40000000
KVM_CPUID_FEATURES = 0x40000001

MSR_KVM_WALL_CLOCK = 0x11
MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MSR_KVM_ASYNC_PF_EN = 0x4B564D02
MSR_KVM_STEAL_TIME = 0x4B564D03
MSR_KVM_PV_EOI_EN = 0x4B564D04

KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_ASYNC_PF = 4
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6

# Sizes of what KVM writes, in bytes
WALL_CLOCK_BYTES = 12  # struct pvclock_wall_clock
TIME_INFO_BYTES = 32  # struct pvclock_vcpu_time_info
STEAL_TIME_BYTES = 64  # struct kvm_steal_time
