"""What passes between a machine and its peers in other processes: devices and fault handlers.

Plain data and sockets. Knows nothing of KVM, of sources or of paging, so that all of them may speak it.
"""
