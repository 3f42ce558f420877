#!/bin/sh
# The first process of a test machine: mounts, loads what the tests need, runs /run.sh, tells the exit status.
# ttyS0 is the console, ttyS1 takes the output of the tests, ttyS2 the exit status.
export PATH=/usr/sbin:/usr/bin HOME=/root TMPDIR=/tmp

# Gives "/" a parent mount, or pivot_root answers EINVAL on an initramfs.
if [ "$1" != moved ]; then
  mount --bind / /mnt
  cd /mnt
  mount --move . /
  exec chroot . /init moved
fi
cd /

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
chmod 1777 /tmp /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
ln -sf /proc/mounts /etc/mtab

# Not /sbin/modprobe: the booting kernel would start it dozens of times, for seconds.
echo /bin/modprobe > /proc/sys/kernel/modprobe
[ -e /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }
ip link set lo up
hostname vm

for tty in 1 2; do stty -F /dev/ttyS$tty raw -echo; done
sh /run.sh < /dev/null > /dev/ttyS1 2>&1
echo "status=$?" > /dev/ttyS2
sleep 0.2
# At once, without an orderly end; QEMU is told not to start again.
echo b > /proc/sysrq-trigger
