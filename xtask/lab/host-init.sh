#!/bin/busybox sh
# First program of the lab's host. Loads the modules that reach the Debian tree, lays a writable
# layer over it, and hands over to the agent inside it. /lab.conf says what this run wants.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /lower /rw /new
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in virtio_pci virtio_console 9pnet_virtio 9p overlay; do
    modprobe "$module" 2> /dev/null
done

. /lab.conf
nine="trans=virtio,version=9p2000.L,msize=512000"
date -s "@$LAB_TIME" > /dev/null
mount -t 9p -o "$nine,ro,cache=loose" root /lower
mount -t tmpfs -o size=80%,mode=755 tmpfs /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new
mkdir -p /new/lab /new/share /new/root /new/tmp
mount -t 9p -o "$nine,ro,cache=loose" lab /new/lab
mount -t 9p -o "$nine,cache=none" jobs /new/lab/jobs
if [ -n "$LAB_SHARE" ]; then
    mount -t 9p -o "$nine,cache=mmap" share /new/share
fi
if [ -n "$LAB_MODULES" ]; then
    mkdir -p "/new/usr/lib/modules/$LAB_MODULES"
    mount -t 9p -o "$nine,ro,cache=loose" modules "/new/usr/lib/modules/$LAB_MODULES"
fi
for point in proc sys dev; do
    mount --move "/$point" "/new/$point"
done
cp /agent /new/lab-agent
cd /new
mkdir -p dev/pts dev/shm dev/lab
mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t debugfs debugfs sys/kernel/debug
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
for port in sys/class/virtio-ports/vport*; do
    read -r name < "$port/name"
    ln -s "/dev/${port##*/}" "dev/lab/$name"
done
# Opening one of these loads its module.
mkdir dev/net
mknod dev/net/tun c 10 200
mknod dev/loop-control c 10 237
mknod dev/vhost-net c 10 238
mknod dev/vhost-vsock c 10 241
ip link set lo up
echo tagvisor-lab > proc/sys/kernel/hostname
exec switch_root /new /bin/bash /lab-agent
