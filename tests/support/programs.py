"""Guest programs, assembled by hand: each is called at 0xd0100000, in ring 3 unless a test says otherwise."""

PROGRAM = 0xD0100000
RETURN = bytes.fromhex("31c0 31d2 c3")  # xor eax, eax; xor edx, edx; ret

LOOP = bytes.fromhex("ebfe")  # jmp to itself
# lidt [rip + 2]: the ten zero bytes after ud2, an IDT in which no vector fits
TRIPLE_FAULT = bytes.fromhex("0f011d02000000 0f0b") + bytes(10)
HALT = bytes.fromhex("f4")
OUT_TO_NOWHERE = bytes.fromhex("66ba9902 ee")  # mov dx, 0x299; out dx, al
IN_FROM_NOWHERE = bytes.fromhex("66ba9902 ec")  # mov dx, 0x299; in al, dx
STORE_TABLE = bytes.fromhex("0f01042500001000") + RETURN  # sgdt [0x100000]
# Reads a word of each page in turn, with 16 million instructions between two: a run whose end no test waits for.
#     xor edx, edx;  1: mov rax, [rdx];  mov ecx, 0x1000000;  2: dec ecx; jnz 2b;  add rdx, 4096;  jmp 1b
SLOW_WALK = bytes.fromhex("31d2 488b02 b900000001 ffc9 75fc 4881c200100000 ebeb")


def load(address):
    """mov rax, [address]"""
    return bytes.fromhex("488b0425") + address.to_bytes(4, "little")


def store(address):
    """mov [address], rax"""
    return bytes.fromhex("48890425") + address.to_bytes(4, "little")
