# disk: the first half of its pages goes out to the disk and comes back into the second half, DISK_SHIFT bytes further
# on, both as scatter lists whose segments cross pages, chunk by chunk: DISK_BATCH writes and the reads of the same
# chunks are in flight at once.  The first DISK_RING_PAGES pages hold the ring; they are zeros at the end.  A chunk's
# place on the disk is counted from the end of this vCPU's part.  The checksum is over the second half.  An access is a
# sector transferred.

.intel_syntax noprefix
.include "abi.inc"
.include "workload.inc"

.set CHUNK_SHIFT, 13
.set SECTOR_SHIFT, 9
.set TABLE_SHIFT, 7                     # room for 8 segments a request

# The frame: locals below rbp
.set HEADER, -8                         # gpa of the ring's header
.set REQUESTS, -16                      # gpa of the requests
.set TABLES, -24                        # gpa of the tables of segments
.set SOURCE, -32                        # offset in RAM
.set TARGET, -40
.set BYTES, -48                         # to be written, and read back
.set FIRST_SECTOR, -56
.set CHUNKS, -64
.set TARGET_PAGE, -72
.set TARGET_PAGES, -80
.set FRAME, 80

# Put the gpa of a page of the ring in \place.
.macro ring_page number, place
    mov rax, [rdi + BLOCK_FIRST_PAGE]
    add rax, \number
    page_address rax, rcx
    mov [rbp + \place], rax
.endm

.text
.globl workload_disk
workload_disk:
    push rbp
    mov rbp, rsp
    sub rsp, FRAME
    mov r15, rdi
    ring_page 0, HEADER
    ring_page 1, REQUESTS
    ring_page 2, TABLES
    mov rax, [rdi + BLOCK_FIRST_PAGE]
    mov rcx, rax
    shl rcx, PAGE_SHIFT - SECTOR_SHIFT
    mov [rbp + FIRST_SECTOR], rcx
    mov rdx, [rdi + BLOCK_PAGE_COUNT]
    sub rdx, DISK_RING_PAGES
    shr rdx, 1
    add rax, DISK_RING_PAGES
    mov rcx, rax
    shl rcx, PAGE_SHIFT
    mov [rbp + SOURCE], rcx
    add rax, rdx
    mov [rbp + TARGET_PAGE], rax
    mov [rbp + TARGET_PAGES], rdx
    shl rax, PAGE_SHIFT
    add rax, DISK_SHIFT
    mov [rbp + TARGET], rax
    shl rdx, PAGE_SHIFT
    sub rdx, DISK_SECTOR                # room for the shift
    mov [rbp + BYTES], rdx
    add rdx, DISK_CHUNK - 1
    shr rdx, CHUNK_SHIFT
    mov [rbp + CHUNKS], rdx

    mov rdi, [rbp + HEADER]
    call clear_page
    mov dword ptr [rdi + DISK_RING_VERSION], DISK_VERSION
    mov dword ptr [rdi + DISK_RING_ENTRIES], DISK_ENTRIES
    mov rax, [rbp + REQUESTS]
    mov [rdi + DISK_RING_REQUESTS], rax
    movabs rax, DISK_MAGIC
    mov [rdi + DISK_RING_MAGIC], rax    # last: the header is whole now

    xor r12d, r12d                      # chunks done
    xor r14d, r14d                      # requests submitted
next_batch:
    mov r13, [rbp + CHUNKS]
    sub r13, r12
    jz all_done
    mov eax, DISK_BATCH
    cmp r13, rax
    cmova r13, rax
    add r13, r12                        # end of the batch
    mov rbx, r12
1:  mov ecx, DISK_WRITE
    mov r8, [rbp + SOURCE]
    mov r9d, DISK_SEGMENT_OUT
    call make_request
    inc rbx
    cmp rbx, r13
    jne 1b
    mov rbx, r12
2:  mov ecx, DISK_READ
    mov r8, [rbp + TARGET]
    mov r9d, DISK_SEGMENT_IN
    call make_request
    inc rbx
    cmp rbx, r13
    jne 2b
    mov rdi, [rbp + HEADER]
    mov [rdi + DISK_RING_SUBMITTED], r14
    mov rax, rdi
    shr rax, PAGE_SHIFT
    mov edx, DISK_DOORBELL_PORT
    out dx, eax
wait_for_disk:
    cmp [rdi + DISK_RING_COMPLETED], r14
    je batch_done
    mov rbx, -1                         # no request's fault
    mov rax, [rdi + DISK_RING_STATUS]
    test rax, rax
    jnz disk_failed
    mov edx, DISK_WAIT_PORT
    in eax, dx
    jmp wait_for_disk
batch_done:
    mov rcx, r13
    sub rcx, r12
    add rcx, rcx                        # requests of the batch
    mov rbx, r14
    sub rbx, rcx
1:  call request_address
    mov rax, [r10 + DISK_REQUEST_STATUS]
    test rax, rax
    jnz disk_failed
    inc qword ptr [r15 + BLOCK_PROGRESS]
    inc rbx
    cmp rbx, r14
    jne 1b
    mov r12, r13
    jmp next_batch

all_done:
    mov rdi, [rbp + HEADER]
    mov qword ptr [rdi + DISK_RING_MAGIC], 0    # first: there is no ring any more
    call clear_page
    mov rdi, [rbp + REQUESTS]
    call clear_page
    mov rdi, [rbp + TABLES]
    call clear_page
    mov rdi, r15
    mov r12, [rbp + TARGET_PAGE]
    mov r13, [rbp + TARGET_PAGES]
    call sum_page_range
    finish_checksum
    mov rdx, [rbp + BYTES]
    shr rdx, SECTOR_SHIFT - 1           # out and in
    leave
    ret

# rax = status, rbx = index of the request.
disk_failed:
    mov qword ptr [r15 + BLOCK_FAILURE], FAILURE_DISK
    mov [r15 + BLOCK_CHECKSUM], rax
    mov [r15 + BLOCK_ACCESSES], rbx
    mov eax, REPORT_CHECK_FAILED
    jmp report

# Fill the page at rdi with zeros; keeps rdi.
clear_page:
    push rdi
    xor eax, eax
    mov ecx, WORDS_PER_PAGE
    rep stosq
    pop rdi
    ret

# rbx = index of a request; leaves its gpa in r10.
request_address:
    mov r10, rbx
    and r10d, DISK_ENTRIES - 1
    shl r10, 5                          # DISK_REQUEST_SIZE
    add r10, [rbp + REQUESTS]
    ret

# Make request number r14: chunk number rbx, ecx = operation, r8 = offset in RAM of all chunks, r9 = bytes of a segment.
make_request:
    push rbx
    xchg rbx, r14
    call request_address
    xchg rbx, r14
    mov r11, r14
    and r11d, DISK_ENTRIES - 1
    shl r11, TABLE_SHIFT
    add r11, [rbp + TABLES]
    mov [r10 + DISK_REQUEST_OPERATION], ecx
    mov [r10 + DISK_REQUEST_TABLE], r11
    mov qword ptr [r10 + DISK_REQUEST_STATUS], -1
    mov rax, [rbp + CHUNKS]
    dec rax
    sub rax, rbx
    shl rax, CHUNK_SHIFT - SECTOR_SHIFT
    add rax, [rbp + FIRST_SECTOR]
    mov [r10 + DISK_REQUEST_SECTOR], rax
    shl rbx, CHUNK_SHIFT
    add r8, rbx
    mov rsi, [rbp + BYTES]              # bytes of this chunk: the last is shorter
    sub rsi, rbx
    mov eax, DISK_CHUNK
    cmp rsi, rax
    cmova rsi, rax
    xor edx, edx
next_segment:
    mov rcx, r9
    cmp rcx, rsi
    cmova rcx, rsi
    end_at_hole r8, rcx, rax
    offset_address r8, rdi, rax
    mov [r11], rdi
    mov [r11 + 8], rcx
    add r11, 16
    inc edx
    add r8, rcx
    sub rsi, rcx
    jnz next_segment
    mov [r10 + DISK_REQUEST_SEGMENTS], edx
    inc r14
    pop rbx
    ret
