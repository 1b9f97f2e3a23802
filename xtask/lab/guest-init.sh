#!/bin/busybox sh
# First program of the lab's guests. Loads the modules of the guest's devices (others load with
# modprobe), then runs the words that the kernel's command line holds after `--`, as one shell
# command, or a shell if there are none.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
read -r uptime _ < /proc/uptime
echo "guest: userspace $uptime"
modprobe virtio_mmio
# The driver may be built in: modprobe's complaint is then of no use.
for device in /sys/bus/virtio/devices/*/modalias; do
    [ -e "$device" ] && read -r alias < "$device" && modprobe -q "$alias"
done
mount -t tmpfs tmpfs /tmp
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
ip link set lo up
sh -c "${*:-exec setsid cttyhack sh}"
echo "guest: exit $?"
# Setting a mode, whichever, waits until all is said: the power goes off without.
stty opost
poweroff -f
