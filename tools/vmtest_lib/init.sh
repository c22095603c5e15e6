#!/bin/sh
# First process of the emulated machine. With /vmtest/command in the image it runs that and reports on three
# virtio-serial ports: "stdout", "stderr", and "result" ("started", then "exit STATUS", then the bytes of
# $VMTEST_REPORT if the command wrote that file). Each port's bytes end with those of /vmtest/end. Without
# /vmtest/command it starts a shell on the serial console, and powers the machine off when the shell ends.

. /vmtest/environment

mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
hostname vmtest
ifconfig lo 127.0.0.1 up

# In the order of their names, which follows their dependencies.
for module in /vmtest/modules/*.ko; do
    insmod "$module" || echo "vmtest: $module did not load"
done
[ -c /dev/kvm ] && chown 0:kvm /dev/kvm && chmod 660 /dev/kvm

cd /kvmdp || exit

if [ ! -e /vmtest/command ]; then
    setsid cttyhack sh
    poweroff -f
fi

# The ports appear some time after their driver. The loop has no end of its own: vmtest has a time limit.
until stdout=$(grep -lx stdout /sys/class/virtio-ports/*/name) &&
    stderr=$(grep -lx stderr /sys/class/virtio-ports/*/name) &&
    result=$(grep -lx result /sys/class/virtio-ports/*/name); do
    sleep 0.1
done 2>/dev/null
device() { basename "$(dirname "$1")"; }
exec 3>"/dev/$(device "$stdout")" 4>"/dev/$(device "$stderr")" 5>"/dev/$(device "$result")"

# Pipes stand between the command and the ports: a port takes 32 KiB a write, and not every program goes on after a
# write that was taken in part.
mkfifo /run/vmtest-stdout /run/vmtest-stderr
# Held open here, or the readers would end with the command and not wait for the mark.
exec 6<>/run/vmtest-stdout 7<>/run/vmtest-stderr
cat /run/vmtest-stdout >&3 &
cat /run/vmtest-stderr >&4 &

echo started >&5
setsid sh /vmtest/command </dev/null >/run/vmtest-stdout 2>/run/vmtest-stderr 3>&- 4>&- 5>&- 6>&- 7>&-
echo "exit $?" >&5
[ -e "$VMTEST_REPORT" ] && cat "$VMTEST_REPORT" >&5
cat /vmtest/end >&5
# Through the pipes, behind all that the command wrote; what it left running may hold them open for ever.
cat /vmtest/end >&6
cat /vmtest/end >&7

# The reader of the ports ends the emulator: powering off here could cut off what is still on its way.
while :; do sleep 60; done
