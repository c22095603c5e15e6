"""A vCPU's side of demand paging: the gate before KVM_RUN, and from an exit to the fault and back into the guest."""
