# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# net.sh: two nodes between two clients and their pods. Sourced after world.sh.
#
#   client  100.64.0.7, fd7a::7                        node1 (.1)   cni0 10.42.0.1 ── pod-a .5, pod-b .6
#     vpn1 ───────────── TUN, MTU 1420 ────────── tailscale0 │
#     vpn2 ──────────┐                                       ├── hop ── pod-h 10.42.9.5
#                    │         ┌────────────────────── vpn0  │ 10.42.8.1-2
#                    │         │                             │ lan 192.0.2.1
#                    │         │                             │
#   laptop  100.99.0.7, fd99::7│                             │ lan 192.0.2.2
#     vpn1 ────────────────────┘  └─ TUN ────── tailscale0   │
#     vpn2 ───────────── Ethernet, MTU 1500 ────────── vpn0 node2 (.2)   cni0 10.42.1.1 ── pod-c .5, pod-d .6
#
# IPv6 alike: fd7a::, fd99::, fd42:0:0:0:: and so on, 2001:db8::.
#
# A client speaks with the services by one node at a time (`routes_by`), as one on a tailnet
# does, and takes nothing that comes by the other: strict rp_filter, on all hosts, and the same
# for IPv6 by nft. Pods answer a client by the node it uses, as nodes do where one is the gateway.
#
# Checksum offloads: off at pod-b, pod-c and at the laptop's second link, on elsewhere, so that
# each kind of checksum meets each kind of link.

clients="client laptop"
nodes="node1 node2"

# in HOST FILE: sysctl -w, of a net. name
router_host() {
	on "$1" sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1 \
		net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
	on "$1" nft -f - <<-'E'
		table ip6 strict {
			chain prerouting {
				type filter hook prerouting priority -300
				ip6 saddr != fe80::/10 ip6 saddr != :: fib saddr . iif oif missing counter drop
			}
		}
	E
}

# joined HOST-A IFACE-A HOST-B IFACE-B: an Ethernet link
joined() {
	ip -n "$(world_ns "$1")" link add "$2" type veth peer name "$4" netns "$(world_ns "$3")"
	ip -n "$(world_ns "$1")" link set "$2" up
	ip -n "$(world_ns "$3")" link set "$4" up
}

# address HOST IFACE V4 V6
address() {
	ip -n "$(world_ns "$1")" address add "$3" dev "$2"
	ip -n "$(world_ns "$1")" address add "$4" dev "$2" nodad
}

# route HOST V4 V6 HOW...: HOW is "via 4 6 dev IFACE" or "dev IFACE"
route() {
	local ns six=("${@:4}")
	ns=$(world_ns "$1")
	if [ "$4" = via ]; then
		ip -n "$ns" route replace "$2" via "$5" "${@:7}"
		ip -n "$ns" -6 route replace "$3" via "$6" "${@:7}"
	else
		ip -n "$ns" route replace "$2" "${six[@]}"
		ip -n "$ns" -6 route replace "$3" "${six[@]}"
	fi
}

# routes_by N: the clients' way to the services, and everybody's way to the clients
routes_by() {
	local other=$((3 - $1))
	route client 10.43.0.0/16 fd43::/112 dev "vpn$1"
	route laptop 10.43.0.0/16 fd43::/112 via "100.99.0.$1" "fd99::$1" dev "vpn$1"
	route "node$1" 100.64.0.0/24 fd7a::/64 dev tailscale0
	route "node$1" 100.99.0.0/24 fd99::/64 dev vpn0
	route "node$other" 100.64.0.0/24 fd7a::/64 via "192.0.2.$1" "2001:db8::$1" dev lan
	route "node$other" 100.99.0.0/24 fd99::/64 via "192.0.2.$1" "2001:db8::$1" dev lan
}

router_up() {
	local n host
	world_begin
	for host in $clients; do
		world_host "$host"
		router_host "$host"
		on "$host" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
	done
	for n in 1 2; do
		world_node "node$n" $((n - 1))
		router_host "node$n"
		world_start client "$WORLD" tun "$(world_ns client)/vpn$n" "$(world_ns "node$n")/tailscale0"
		ip -n "$(world_ns client)" link set "vpn$n" mtu 1420 up
		ip -n "$(world_ns "node$n")" link set tailscale0 mtu 1420 up
		joined laptop "vpn$n" "node$n" vpn0
		address client "vpn$n" 100.64.0.7/32 fd7a::7/128
		address laptop "vpn$n" 100.99.0.7/32 fd99::7/128
		address "node$n" tailscale0 "100.64.0.$n/32" "fd7a::$n/128"
		address "node$n" vpn0 "100.99.0.$n/32" "fd99::$n/128"
		route client "100.64.0.$n" "fd7a::$n" dev "vpn$n"
		route laptop "100.99.0.$n" "fd99::$n" dev "vpn$n"
		on "node$n" nft -f - <<-'E' # as kube-proxy has it; the sets tell who it was
			table inet watch {
				set who {
					typeof meta l4proto . @th,0,32 . @th,96,32
					flags dynamic
					size 64
				}
				set from {
					typeof ip saddr . ip daddr
					flags dynamic
					size 64
				}
				set from6 {
					typeof ip6 saddr . ip6 daddr
					flags dynamic
					size 64
				}
				chain odd {
					counter
					add @who { meta l4proto . @th,0,32 . @th,96,32 }
					add @from { ip saddr . ip daddr }
					add @from6 { ip6 saddr . ip6 daddr }
					drop
				}
				chain forward {
					type filter hook forward priority 0
					ct state invalid jump odd
				}
				chain input {
					type filter hook input priority 0
					ct state invalid jump odd
				}
			}
		E
	done
	on laptop ethtool -K vpn2 tx off >/dev/null
	on node2 ethtool -K vpn0 tx off >/dev/null
	joined node1 lan node2 lan
	world_node hop 9
	router_host hop
	joined node1 to-hop hop to-node
	for n in 1 2; do address "node$n" lan "192.0.2.$n/24" "2001:db8::$n/64"; done
	address node1 to-hop 10.42.8.1/24 fd42:0:0:8::1/64
	address hop to-node 10.42.8.2/24 fd42:0:0:8::2/64
	route hop default default via 10.42.8.1 fd42:0:0:8::1 dev to-node
	route node1 10.42.1.0/24 fd42:0:0:1::/64 via 192.0.2.2 2001:db8::2 dev lan
	route node1 10.42.9.0/24 fd42:0:0:9::/64 via 10.42.8.2 fd42:0:0:8::2 dev to-hop
	route node2 10.42.0.0/24 fd42::/64 via 192.0.2.1 2001:db8::1 dev lan
	world_pod a 5 node1 0
	world_pod b 6 node1 0
	world_pod c 5 node2 1
	world_pod d 6 node2 1
	world_pod h 5 hop 9
	for n in a b c d; do world_start "pod-$n" "$WORLD" pod "pod-$n" 8081; done
	for n in $nodes; do world_start "$n" "$WORLD" pod "$n" 8080; done
	for n in "b node1" "c node2"; do
		on "pod-${n% *}" ethtool -K eth0 tx off >/dev/null
		on "${n#* }" ethtool -K "pod-${n% *}" tx off >/dev/null
	done
	routes_by 1
}

declare -A pod_at=([a]="10.42.0.5 fd42::5 node1" [b]="10.42.0.6 fd42::6 node1" [c]="10.42.1.5 fd42:0:0:1::5 node2"
	[d]="10.42.1.6 fd42:0:0:1::6 node2" [h]="10.42.9.5 fd42:0:0:9::5 hop"
	[n]="192.0.2.1 2001:db8::1 node1" [m]="192.0.2.2 2001:db8::2 node2") # the nodes themselves

pod_address() { # POD FAMILY
	local four six
	read -r four six _ <<<"${pod_at[$1]}"
	[ "$2" = 4 ] && echo "$four" || echo "$six"
}

# slice NAME FAMILY PORT TARGET PODS: its endpoints of that family and target port
slice() {
	local pod four six node list=
	for pod in $5; do
		read -r four six node <<<"${pod_at[$pod]}"
		[ "$2" = 4 ] || four=$six
		list+="${list:+,}{\"addresses\":[\"$four\"],\"nodeName\":\"$node\"}"
	done
	cat <<-E
		{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","addressType":"IPv$2",
		 "metadata":{"name":"$1-$2-$4","namespace":"default","labels":{"kubernetes.io/service-name":"$1"}},
		 "ports":[{"name":"t","port":$4,"protocol":"TCP"},{"name":"u","port":$4,"protocol":"UDP"}],"endpoints":[$list]}
	E
}

# service NAME NUMBER PORT TARGET=PODS...: TCP and UDP at 10.43.0.NUMBER and fd43::NUMBER
service() {
	local target family
	cat <<-E
		{"apiVersion":"v1","kind":"Service","metadata":{"name":"$1","namespace":"default"},
		 "spec":{"clusterIP":"10.43.0.$2","clusterIPs":["10.43.0.$2","fd43::$2"],"ipFamilies":["IPv4","IPv6"],
		 "ports":[{"name":"t","port":$3,"protocol":"TCP"},{"name":"u","port":$3,"protocol":"UDP"}]}}
	E
	for target in "${@:4}"; do
		for family in 4 6; do slice "$1" $family "$3" "${target%=*}" "${target#*=}"; done
	done
}

# host_behind HOST NAME N: one that has only HOST as router, 198.18.N.5 and 2001:db8:N::5
host_behind() {
	world_host "$2"
	router_host "$2"
	joined "$1" "to-$2" "$2" eth0
	address "$1" "to-$2" "198.18.$3.1/24" "2001:db8:$3::1/64"
	address "$2" eth0 "198.18.$3.5/24" "2001:db8:$3::5/64"
	route "$2" default default via "198.18.$3.1" "2001:db8:$3::1" dev eth0
}

# offload on|off: of checksums, where packets begin. What an ICMP error quotes whole has a
# checksum that can be checked (and mended, when addresses in it change) only if it was there
# already when the packet was quoted.
offload() {
	local host
	for host in $clients; do on "$host" ethtool -K vpn1 tx "$1" >/dev/null; done
	on pod-a ethtool -K eth0 tx "$1" >/dev/null
}

# forget_paths: what clients have learnt of MTUs
forget_paths() {
	local host
	for host in $clients; do
		on "$host" ip route flush cache
		on "$host" ip -6 route flush cache
	done
}

# bridge_looks NODE 0|1: whether netfilter looks at IPv6 on its bridge. Where it does, fragments are
# put together there, and cut up anew by the bridge's MTU, whatever the pod has learnt of the path.
bridge_looks() { on "$1" sysctl -qw net.bridge.bridge-nf-call-ip6tables="$2" 2>/dev/null || true; }

# flood_way: flood0, by which wire.c asks, and who asks there; once
flood_way() {
	local node
	ip -n "$(world_ns node1)" tuntap add flood0 mode tun 2>/dev/null || return 0
	ip -n "$(world_ns node1)" link set flood0 up
	route node1 100.80.0.0/16 fd80::/64 dev flood0
	route node2 100.80.0.0/16 fd80::/64 via 192.0.2.1 2001:db8::1 dev lan
	for node in $nodes; do # conntrack would be full first
		on "$node" nft -f - <<-'E'
			table inet flood {
				chain prerouting {
					type filter hook prerouting priority raw
					ip saddr 100.80.0.0/16 notrack
					ip daddr 100.80.0.0/16 notrack
					ip6 saddr fd80::/64 notrack
					ip6 daddr fd80::/64 notrack
				}
			}
		E
	done
}

### what others do on a node

. ../flannel.sh
in_ns() { on "$@"; }

# rules NODE TOOL LINES: appended as they are; no_rules: none but what was there at first. The
# tables stay: without one conntrack would forget to translate what it remembers as translated.
rules() { on "$1" "$2-restore" -n; }
no_rules() {
	local node family table
	for node in $nodes; do
		for family in ip ip6; do
			for table in filter nat; do on "$node" nft flush table $family $table 2>/dev/null || true; done
		done
	done
}
flannel() {
	flannel_rules node1 iptables 10.42.0.0/16 10.42.0.0/24 224.0.0.0/4
	flannel_rules node1 ip6tables fd42::/32 fd42::/64 ff00::/8
	flannel_rules node2 iptables 10.42.0.0/16 10.42.1.0/24 224.0.0.0/4
	flannel_rules node2 ip6tables fd42::/32 fd42:0:0:1::/64 ff00::/8
}
# tailscaled NODE: as it writes them, with --stateful-filtering and --snat-subnet-routes.
tailscaled() {
	local tool
	for tool in iptables ip6tables; do
		rules "$1" $tool <<-E
			*filter
			:ts-forward - [0:0]
			-I FORWARD -j ts-forward
			-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
			-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
			-A ts-forward -o tailscale0 -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP
			-A ts-forward -o tailscale0 -j ACCEPT
			COMMIT
			*nat
			:ts-postrouting - [0:0]
			-I POSTROUTING -j ts-postrouting
			-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
			COMMIT
		E
	done
}
