# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# service.sh: a part of tests/ship: k3s/tail-lifter.service under a real systemd, this
# machine's, which is process 1 of a container of podman's with a root of its own: /usr
# from here to read, the few units below, nothing else, so that it starts nothing that
# could touch the machine. Expects mounts of its own: they go with the last process.

[ -n "${OWN_MOUNTS:-}" ] || { echo "tests/service.sh: run by ./build.sh test ship" >&2; exit 2; }
mount -t tmpfs tmpfs /mnt
units=/mnt/root/etc/systemd/system
mkdir -p /mnt/bin $units/tail-lifter.service.d /mnt/root/{usr,var,run,tmp,proc,sys,dev}
mount --bind /usr /mnt/root/usr
mount -o remount,bind,ro /mnt/root/usr
mount --bind /mnt/bin /mnt/root/usr/local/bin
for word in bin sbin lib lib64; do ln -s usr/$word /mnt/root/$word; done
cp /etc/{passwd,group,ld.so.cache} /mnt/root/etc/
for word in {basic,sysinit,shutdown,multi-user,network}.target systemd-journald{.service,.socket,-dev-log.socket}; do
	cp "/usr/lib/systemd/system/$word" $units/
done
# as the unit's comment and the README say
install -m 755 tail_lifter /mnt/root/usr/local/bin/
install -m 644 k3s/tail-lifter.service $units/

podman() { command podman --root /mnt/podman --runroot /mnt/podman-run --tmpdir /mnt/podman-tmp --storage-driver vfs \
	--cgroup-manager cgroupfs --events-backend none --runtime runc "$@"; }
inside() { podman exec systemd "$@"; }
state() { inside systemctl is-active tail-lifter | sed 's/^/is /'; }
is() { same "$(state)" "is $1"; }
of_unit() { inside systemctl show -P "$1" tail-lifter; }
log() { inside journalctl --no-pager -u tail-lifter -o cat | grep -E "$1"; }
status_has() { inside tail_lifter --status | grep -E "$1"; }
pinned() { inside ls /sys/fs/bpf/tail_lifter/svc_map; }
options() { # the drop-in of the comment
	printf '[Service]\n%s\n' "${1:+Environment=\"OPTIONS=$1\"}" >$units/tail-lifter.service.d/override.conf
	inside systemctl daemon-reload
}
mounted() { # POINT OPTION: as the service sees it
	inside cat "/proc/$(of_unit MainPID)/mountinfo" | awk -v p="$1" '$5 == p { print $6 }' | tail -n 1 | grep -E "^$2(,|$)"
}

check "service: systemd is up" podman run -d --rm --name systemd --rootfs --systemd always --privileged --network none \
	--cgroup-parent /tail_lifter-ship --ulimit nofile=20000:20000 --ulimit nproc=20000:20000 \
	--env SYSTEMD_UNIT_PATH=/etc/systemd/system /mnt/root /lib/systemd/systemd --unit=basic.target
check "service: systemd runs" soon 20 inside systemctl is-active basic.target
inside systemctl start systemd-journald
inside sh -c 'mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf # a whole systemd does that
	ip link add tailscale0 type veth peer name other && ip link set tailscale0 up' 2>/dev/null
check "service: systemd has nothing against it" same "$(inside systemd-analyze verify tail-lifter.service 2>&1)" ""
check "service: hardened" inside systemd-analyze security --no-pager --offline=yes --threshold=30 $units/tail-lifter.service

check "service: started without a cluster" inside systemctl start tail-lifter
check "service: it says so" soon 10 log 'no kubeconfig'
check "service: it is tried again" soon 20 eval '[ "$(of_unit NRestarts)" -ge 2 ]'
jq -n '{apiVersion: "v1", kind: "Service", metadata: {name: "web", namespace: "default"},
	spec: {clusterIP: "10.43.0.10", ports: [{port: 80}]}}' >/mnt/root/etc/objects.json
options "--from /etc/objects.json --node pi4"
check "service: with options it is restarted" inside systemctl restart tail-lifter
check "service: it runs, and serves" soon 10 status_has '^service: default/web'
check "service: is active" is active
check "service: it is attached" soon 10 status_has '^interface: tailscale0'
check "service: BPF and NET_ADMIN, and no other capability" same \
	"$(inside grep -E 'Cap(Eff|Bnd)|NoNew|Seccomp:' "/proc/$(of_unit MainPID)/status" | cut -f 2 | xargs)" "0000008000001000 0000008000001000 1 2"
for row in "/ ro" "/sys ro" "/proc/sys ro" "/usr ro" "/sys/fs/bpf rw"; do
	# shellcheck disable=SC2086 # two words
	check "service: it sees ${row% *} as ${row#* }" mounted $row
done

first=$(of_unit MainPID)
inside systemctl kill -s KILL tail-lifter
check "service: killed, it comes back" soon 30 eval '[ "$(of_unit MainPID)" != "$first" ] && is active && status_has "running, pid $(of_unit MainPID)"'
check "service: stopped" inside systemctl stop tail-lifter
check "service: stopped, the datapath stays" pinned
inside systemctl start tail-lifter
check "service: started again" soon 10 status_has 'running, pid'
check "service: --cleanup" inside tail_lifter --cleanup
check "service: --cleanup: nothing is left" fails pinned
sleep 3 # longer than RestartSec
check "service: --cleanup: it stays away" is inactive
check "service: --cleanup: still nothing is left" fails pinned

podman kill systemd >/dev/null
soon 10 find /sys/fs/cgroup -depth -type d -path '*/tail_lifter-ship*' -exec rmdir {} + || true
