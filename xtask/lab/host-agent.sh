# First process of the host once the Debian tree is its root. Takes orders from `cargo xtask` on
# the port `control`, one a line, and answers there:
#
#   run NAME           runs /lab/jobs/NAME/run; then "exit STATUS"
#   shell ROWS COLS    an interactive shell on hvc0; then "exit STATUS"
#   size ROWS COLS     the terminal of the shell has a new size
#
# A job's output goes to ports of its own. After its last byte a marker is written to both, so that
# the other side knows when it has read everything.
export PATH=/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root USER=root LOGNAME=root SHELL=/bin/bash LANG=C.UTF-8 LAB=/lab

# join: makes this one of two hosts, $LAB_NUMBER of them. eth0 is for scripts, which may do with it what they like; by the
# other card they give orders to the other host all the same.
join() {
    local other=$((3 - LAB_NUMBER))
    echo "host$LAB_NUMBER" > /proc/sys/kernel/hostname
    printf '10.0.7.%s host%s\n' 1 1 2 2 >> /etc/hosts
    modprobe virtio_net
    ip link set eth1 name agent
    ip address add "10.0.8.$LAB_NUMBER/24" dev agent
    ip address add "10.0.7.$LAB_NUMBER/24" dev eth0
    ip link set agent up
    ip link set eth0 up
    export PEER=10.0.7.$other PEER_NAME=host$other PEER_AGENT=10.0.8.$other:1024
    peer-agent "10.0.8.$LAB_NUMBER:1024" &
}
[ -z "$LAB_NUMBER" ] || join

# Jobs must not know the marker: what prints its environment would end its output early.
marker=$LAB_MARKER terminal=$LAB_TERM
unset LAB_MARKER LAB_TERM LAB_NUMBER
exec 3<> /dev/lab/control 5> /dev/lab/out 6> /dev/lab/err
read -r uptime _ < /proc/uptime
echo "ready $uptime" >&3

finish() {
    printf %s "$marker" >&5
    printf %s "$marker" >&6
    sync -f /share /lab/jobs
    echo "exit $1" >&3
}

shell() {
    (
        # Held open, for a terminal that nobody has open forgets its size.
        exec < /dev/hvc0 > /dev/hvc0 2>&1 3>&- 5>&- 6>&-
        stty sane rows "$1" cols "$2"
        cd /root
        mountpoint --quiet /share && cd /share
        PS1='lab:\w# ' TERM=$terminal setsid --wait --ctty bash -l
    )
    finish $?
}

while read -r order first second <&3; do
    case $order in
        run)
            setsid --wait bash "/lab/jobs/$first/run" < /dev/lab/in >&5 2>&6 3>&- 5>&- 6>&-
            finish $?
            ;;
        shell)
            # Beside the orders, for the terminal's size may change.
            shell "$first" "$second" &
            ;;
        size)
            stty -F /dev/hvc0 rows "$first" cols "$second"
            ;;
    esac
done
