# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# world.sh: the smallest world in which tail_lifter has something to do, for the
# demo and the namespace tests. Sourced; `world_up` builds it, a trap takes it down.
#
#   client                       node                          pod-a, pod-b
#   100.64.0.7  ── TUN ──  100.64.0.1                 ┌── veth ── 10.42.0.5, fd42::5
#   fd7a::7     tailscale0     fd7a::1   cni0 (bridge)┤
#                                        10.42.0.1    └── veth ── 10.42.0.6, fd42::6
#
# The TUN is as tailscaled makes it (bare IP, offloads, MTU 1280). pod-b's veth has its
# transmit checksum offload off: a packet with a checksum that is only nearly right
# arrives at pod-a and not at pod-b.

world_ns() { echo "tl$$-$1"; }

# on HOST COMMAND...: run it there (`ip netns exec` would hide the bpffs)
on() { nsenter --net="/run/netns/$(world_ns "$1")" -- "${@:2}"; }

# world_run HOST COMMAND...: in the background; $world_pid is its pid
world_run() {
	nsenter --net="/run/netns/$(world_ns "$1")" -- "${@:2}" &
	world_pid=$!
	world_pids+=("$world_pid")
}

# world_start HOST COMMAND...: in the background, until it says it is ready
world_start() {
	local fifo=$world_dir/ready said ready
	mkfifo "$fifo"
	exec {ready}<>"$fifo"
	rm "$fifo"
	world_run "$@" >&"$ready" 2>>"$world_dir/log" {ready}<&-
	read -r -t 20 said <&"$ready" || true
	exec {ready}<&-
	[ "$said" = ready ] || { echo "did not start: $*" >&2; return 1; }
}

# world_host NAME: a namespace, gone with the others
world_host() {
	ip netns add "$(world_ns "$1")"
	world_hosts+=("$1")
	ip -n "$(world_ns "$1")" link set lo up
}

# world_pod NAME NUMBER [NODE SUBNET]: a host pod-NAME behind the node's cni0, 10.42.SUBNET.NUMBER
world_pod() {
	local ns node=${3:-node} subnet=${4:-0}
	ns=$(world_ns "pod-$1")
	world_host "pod-$1"
	ip link add eth0 mtu 1450 netns "$ns" type veth peer name "pod-$1" mtu 1450 netns "$(world_ns "$node")"
	on "$node" ip link set "pod-$1" master cni0 up
	ip -n "$ns" address add "10.42.$subnet.$2/24" dev eth0
	ip -n "$ns" address add "fd42:0:0:$subnet::$2/64" dev eth0 nodad
	ip -n "$ns" link set eth0 up
	ip -n "$ns" route add default via "10.42.$subnet.1"
	ip -n "$ns" -6 route add default via "fd42:0:0:$subnet::1"
	world_start "pod-$1" "$WORLD" pod "pod-$1" 8080
}

# world_node NAME SUBNET: a host that forwards, and its bridge for pods
world_node() {
	world_host "$1"
	on "$1" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
	on "$1" ip link add cni0 mtu 1450 type bridge
	on "$1" ip address add "10.42.$2.1/24" dev cni0
	on "$1" ip address add "fd42:0:0:$2::1/64" dev cni0 nodad
	on "$1" ip link set cni0 up
}

# world_tailnet: the TUN, addresses, routes
world_tailnet() {
	local host ns
	world_start client "$WORLD" tun "$(world_ns client)/tailscale0" "$(world_ns node)/tailscale0"
	# shellcheck disable=SC2034 # for who sources this
	tailnet_pid=$world_pid
	for host in client:7 node:1; do
		ns=$(world_ns ${host%:*})
		ip -n "$ns" address add "100.64.0.${host#*:}/32" dev tailscale0
		ip -n "$ns" address add "fd7a::${host#*:}/128" dev tailscale0 nodad
		ip -n "$ns" link set tailscale0 mtu 1280 up
		ip -n "$ns" route add 100.64.0.0/10 dev tailscale0
		ip -n "$ns" -6 route add fd7a::/48 dev tailscale0
	done
	ip -n "$(world_ns client)" route add 10.43.0.0/16 dev tailscale0
	ip -n "$(world_ns client)" -6 route add fd43::/112 dev tailscale0
}

# world_begin: an empty world, taken down when the script ends
world_begin() {
	world_dir=$(mktemp -d) world_pids=() world_hosts=()
	trap world_down EXIT
	trap 'exit 1' INT TERM
}

world_up() { # needs $WORLD, the program made of world.c
	world_begin
	world_host client
	world_node node 0
	world_tailnet
	world_pod a 5
	world_pod b 6
	on pod-b ethtool -K eth0 tx off >/dev/null
	on node ethtool -K pod-b tx off >/dev/null
}

world_down() {
	local host pid
	set +e
	for pid in "${world_pids[@]}"; do kill "$pid" 2>/dev/null; done
	for pid in "${world_pids[@]}"; do wait "$pid" 2>/dev/null; done
	for host in "${world_hosts[@]}"; do ip netns delete "$(world_ns "$host")" 2>/dev/null; done
	rm -rf "$world_dir"
}

# No host has met a packet with a wrong checksum; says which did.
world_sums_right() {
	local host
	for host in "${world_hosts[@]}"; do
		on "$host" awk '/^(Ip|IpExt|Tcp|Udp|Icmp):/ && !($1 in head) { split($0, n); for (i in n) name[$1, i] = n[i]; head[$1]; next }
			{ for (i = 2; i <= NF; i++) if (name[$1, i] == "InCsumErrors" && $i) { print "'$host'", $1, $i; bad = 1 } }
			END { exit bad }' /proc/net/snmp /proc/net/netstat || return 1
		on "$host" awk '/InCsumErrors/ && $2 { print "'$host'", $0; bad = 1 } END { exit bad }' /proc/net/snmp6 || return 1
	done
}

# The wire is watched, by $WIRE (router/wire.c).
# watch [N]: every packet on every interface of the world, or one in N, by chance: a million are
# more than can be looked at. watched NAME [WHAT...]: there was nothing
# wrong, but there may have been WHAT: unsure, checksums in quotes of packets that had none yet;
# strays, pods' answers that met no flow; lost, packets that came too fast to be looked at
watch() {
	local host list=()
	looked_at=${1:+1/$1}
	for host in "${world_hosts[@]}"; do
		case $host in client | laptop | guest*) list+=("$(world_ns "$host"),10.42.,fd42:") ;; *) list+=("$(world_ns "$host")") ;; esac
	done
	: >"$world_dir/wire"
	"$WIRE" check ${looked_at:+"$looked_at"} "${list[@]}" >"$world_dir/wire" &
	watcher=$!
	world_pids+=("$watcher")
	soon 5 grep -q ready "$world_dir/wire"
}
watched() {
	local status=0 line may
	kill "$watcher"
	wait "$watcher" || status=$?
	line=$(tail -n 1 "$world_dir/wire")
	echo "wire $1${looked_at:+, one in ${looked_at#*/}}: $line"
	for may in "${@:2}"; do line=$(sed "s/ $may [0-9]*/ $may 0/" <<<"$line"); done
	check "$1: every packet${looked_at:+ that was looked at} on every wire was right" right
}
right() { [ $status = 0 ] && [[ $line == *" unsure 0 wrong 0 strays 0 lost 0" ]] || { head -n 30 "$world_dir/wire"; return 1; }; }

# world_objects: what the API server would say: a Service `web`, ready in both pods
world_objects() {
	cat <<-'E'
		{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"default"},
		 "spec":{"clusterIP":"10.43.0.10","clusterIPs":["10.43.0.10","fd43::10"],"ipFamilies":["IPv4","IPv6"],
		 "ports":[{"name":"http","port":80,"protocol":"TCP"},{"name":"echo","port":80,"protocol":"UDP"}]}}
		{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","addressType":"IPv4",
		 "metadata":{"name":"web-4","namespace":"default","labels":{"kubernetes.io/service-name":"web"}},
		 "ports":[{"name":"http","port":8080,"protocol":"TCP"},{"name":"echo","port":8080,"protocol":"UDP"}],
		 "endpoints":[{"addresses":["10.42.0.5"],"nodeName":"node"},{"addresses":["10.42.0.6"],"nodeName":"node"}]}
		{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","addressType":"IPv6",
		 "metadata":{"name":"web-6","namespace":"default","labels":{"kubernetes.io/service-name":"web"}},
		 "ports":[{"name":"http","port":8080,"protocol":"TCP"},{"name":"echo","port":8080,"protocol":"UDP"}],
		 "endpoints":[{"addresses":["fd42::5"],"nodeName":"node"},{"addresses":["fd42::6"],"nodeName":"node"}]}
	E
}
