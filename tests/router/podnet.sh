# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# podnet: tailscale0 is the pods' network too, as k3s's vpn-auth makes it: a request comes in by
# it, goes out by it to the other node's pod, masqueraded, and its reply comes back the same way
# to the node's own address, which may be a service's as well: its load balancer's.

# What goes from node to node goes by the tailnet, which here is where both TUNs end.
route client 10.42.0.0/24 fd42::/64 dev vpn1
route client 10.42.1.0/24 fd42:0:0:1::/64 dev vpn2
route node1 10.42.1.0/24 fd42:0:0:1::/64 dev tailscale0
route node2 10.42.0.0/24 fd42::/64 dev tailscale0
route node2 100.64.0.0/24 fd7a::/64 dev tailscale0
world_start client "$WORLD" pod client 8080
# The kernel tells by a redirect now and then, in IPv6 always, that a packet left by the link by which
# it came. On a tailnet it would end at the other side; here that forwards it, is told that the sender
# is of the link only, and the answer is of no flow that conntrack knows.
on client nft insert rule ip6 strict prerouting icmpv6 type nd-redirect drop

node1_at() { [ "$1" = 4 ] && echo 100.64.0.1 || echo fd7a::1; }
# pods_see SETTING FAMILY: whom pods of this node see of the client, then of the other
pods_see() {
	case $1:$2 in
	flannel:4) echo 100.64.0.7 100.64.0.1 ;;
	flannel:6) echo fd7a::7 fd7a::1 ;;
	both:4) echo 10.42.0.1 10.42.1.1 ;;
	both:6) echo fd42::1 fd42:0:0:1::1 ;;
	esac
}
both_nodes() { # SETTING: its rules
	flannel
	[ "$1" = flannel ] || { tailscaled node1 && tailscaled node2; }
}

# podnet SETTING FAMILY: all that a client asks of services
podnet() {
	local name="pods by tailscale0, $1, IPv$2" here there kind to
	read -r here there <<<"$(pods_see "$1" "$2")"
	for kind in tcp udp; do
		check "$name, $kind: the other node's pod" same "$(talk client ask $kind "$(vip "$2" 15)" 80 | cut -d ' ' -f 1-2)" "pod-c $there"
		check "$name, $kind: pods of both nodes" same "$(talk client who $kind "$(vip "$2" 14)" 80 40)" \
			"pod-a $here, pod-b $here, pod-c $there, pod-d $there"
		check "$name, $kind: a pod itself" same "$(talk client ask $kind "$(pod_address c "$2")" 8080 | cut -d ' ' -f 1)" pod-c
		check "$name, $kind: the load balancer at the node's address" same \
			"$(talk client who $kind "$(node1_at "$2")" 80 24)" "pod-a $here, pod-c $there"
		check "$name, $kind: the node itself at that address" same \
			"$(talk client ask $kind "$(node1_at "$2")" 8080 | cut -d ' ' -f 1-2)" "node1 $(own client "$2")"
		check "$name, $kind: the node asks the client" same \
			"$(talk node1 ask $kind "$(own client "$2")" 8080 | cut -d ' ' -f 1-2)" "client $(node1_at "$2")"
		# stateful filtering is against what pods begin
		[ "$1" = both ] || check "$name, $kind: pod to pod" same "$(talk pod-a ask $kind "$(pod_address c "$2")" 8080 | cut -d ' ' -f 1)" pod-c
	done
	check "$name: the node at that address is pinged" on client ping -c 1 -W 3 "$(node1_at "$2")"
	check "$name: a datagram in fragments, there and back" same "$(talk client ask udp "$(vip "$2" 15)" 80 3300 | cut -d ' ' -f 1-2)" "pod-c $there"
	to=$(vip "$2" 20)
	check "$name: nobody listens, udp" same "$(talk client refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
	check "$name: nobody listens, tcp" same "$(talk client ask tcp "$to" 80)" ECONNREFUSED
	to=$(vip "$2" 15)
	check "$name: TTL exceeded at the node" same "$(talk client ttl 1 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	check "$name: TTL exceeded at the other node" same "$(talk client ttl 3 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	forget_paths
	check "$name: UDP learns the MTU" same "$(talk client mtu udp "$to" 80)" \
		"EMSGSIZE from $to about $to:80, its own words, mtu 1300 1300, as long is answered"
	forget_paths
	check "$name: TCP learns the MTU" same "$(talk client mtu tcp "$to" 80)" "pod-c mtu 1420 then 1300"
	forget_paths
}

offload off
route node2 10.42.1.5 fd42:0:0:1::5 dev cni0 mtu 1300
before=$(lifter node1 --status -o json)
ports=$(on client sysctl -n net.ipv4.ip_local_port_range)
for setting in flannel both; do
	# ports of its own: what conntrack remembers of one setting is not the other's
	on client sysctl -qw net.ipv4.ip_local_port_range="$([ $setting = flannel ] && echo 10000 19999 || echo 20000 29999)"
	both_nodes $setting
	watch
	for family in 4 6; do podnet $setting $family; done
	watched "podnet, $setting" strays # on its way to the other node what a pod says passes the client's host
	no_rules
done
on client sysctl -qw net.ipv4.ip_local_port_range="$ports"
after=$(lifter node1 --status -o json)
for reason in no_port unanswered stale_reply icmp_stray; do
	check "pods by tailscale0: none was taken for a request to us: $reason" same \
		"$(jq -n --argjson a "$after" --argjson b "$before" "\$a.counters.$reason - \$b.counters.$reason")" 0
done
check "pods by tailscale0: errors came along their flows" test "$(jq -n --argjson a "$after" --argjson b "$before" '$a.counters.icmp_error - $b.counters.icmp_error')" -ge 20
ip -n "$(world_ns node2)" route delete 10.42.1.5
ip -n "$(world_ns node2)" -6 route delete fd42:0:0:1::5
offload on

on client nft delete rule ip6 strict prerouting handle "$(on client nft -a list chain ip6 strict prerouting | sed -n 's/.*nd-redirect drop # handle //p')"
for net in 10.42.0.0/24 10.42.1.0/24; do ip -n "$(world_ns client)" route delete $net; done
for net in fd42::/64 fd42:0:0:1::/64; do ip -n "$(world_ns client)" -6 route delete $net; done
route node1 10.42.1.0/24 fd42:0:0:1::/64 via 192.0.2.2 2001:db8::2 dev lan
route node2 10.42.0.0/24 fd42::/64 via 192.0.2.1 2001:db8::1 dev lan
routes_by 1
